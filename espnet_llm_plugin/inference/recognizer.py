"""Speech to text with a trained model, one utterance at a time.

T frames, D encoder size, V tokens, L labels (label = token id - 1).
"""

from dataclasses import dataclass
from typing import Optional, Union

import numpy as np
import torch
from espnet.nets.scorer_interface import BatchScorerInterface

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.external_lm import ExternalLM
from espnet_llm_plugin.inference.ctc import CTCSearch
from espnet_llm_plugin.inference.loading import LoadedASR
from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch

Search = Union[TransducerSearch, CTCSearch]

# Prefixes kept at once: a bound on memory for long recordings, out of reach of short ones.
MAX_PREFIXES = 5000


@dataclass(frozen=True)
class Recognition:
    """One entry of an n-best list: text (None without a tokenizer), tokens, and the scores."""

    text: Optional[str]
    tokens: list[str]
    token_ids: list[int]
    hypothesis: Hypothesis


class Recognizer:
    """A model with a search.

    Args:
        asr: From :func:`~espnet_llm_plugin.inference.loading.load_asr`.
        lm: External LM, from :func:`~espnet_llm_plugin.inference.loading.load_lm`.
        scales: Weights of the search; see :func:`default_scales`.
        beam_size: Hypotheses kept after a frame; 1 is greedy.
        max_symbols_per_frame: Labels a frame at most (transducers).
        nbest: Length of the result.
        normalize_length: Rank by the score per symbol.
    """

    def __init__(
        self,
        asr: LoadedASR,
        lm: Optional[BatchScorerInterface] = None,
        *,
        scales: Optional[Scales] = None,
        beam_size: int = 8,
        max_symbols_per_frame: int = 3,
        nbest: int = 1,
        normalize_length: bool = False,
    ):
        self.asr = asr
        self.scales = default_scales(asr) if scales is None else scales
        check_scales(asr, self.scales, has_lm=lm is not None)
        self.search = build_search(
            asr, lm, beam_size=beam_size, max_symbols_per_frame=max_symbols_per_frame
        )
        self.nbest = nbest
        self.normalize_length = normalize_length

    def encode(self, speech: Union[np.ndarray, torch.Tensor]) -> torch.Tensor:
        """Encoder output (T, D) of samples (N,) or features (N, F).

        Raises:
            espnet.nets.pytorch_backend.transformer.subsampling.TooShortUttError: Too short.
        """
        return encode(self.asr.model, speech)

    def decode(self, encoder_out: torch.Tensor) -> list[Recognition]:
        """The n-best list of an encoder output (T, D)."""
        hyps = self.search(encoder_out, self.scales, self.nbest, self.normalize_length)
        return [self.recognition(hyp) for hyp in hyps]

    def recognition(self, hypothesis: Hypothesis) -> Recognition:
        """Tokens and text of a hypothesis."""
        ids = [label + 1 for label in hypothesis.labels]
        tokens = self.asr.text.tokens(ids)
        return Recognition(self.asr.text.text(tokens), tokens, ids, hypothesis)

    def __call__(self, speech: Union[np.ndarray, torch.Tensor]) -> list[Recognition]:
        """The n-best list of samples (N,) or features (N, F)."""
        return self.decode(self.encode(speech))


@torch.inference_mode()
def encode(model: torch.nn.Module, speech: Union[np.ndarray, torch.Tensor]) -> torch.Tensor:
    """Encoder output (T, D) of one utterance: samples (N,) or features (N, F)."""
    parameter = next(model.parameters())
    speech = torch.as_tensor(speech).to(parameter)[None]
    lengths = torch.tensor([speech.size(1)], device=speech.device)
    encoder_out, encoder_lengths = model.encode(speech, lengths)
    if isinstance(encoder_out, tuple):  # with intermediate CTC outputs
        encoder_out = encoder_out[0]
    return encoder_out[0, : int(encoder_lengths[0])]


def build_search(
    asr: LoadedASR,
    lm: Optional[BatchScorerInterface] = None,
    *,
    beam_size: int = 8,
    max_symbols_per_frame: int = 3,
) -> Search:
    """The search of a model, with an external LM if given."""
    if beam_size < 1 or max_symbols_per_frame < 1:
        raise UserError(
            f"beam size {beam_size}, max_symbols_per_frame {max_symbols_per_frame}: "
            "both must be at least 1"
        )
    vocab_size = len(asr.model.token_list)
    device = next(asr.model.parameters()).device
    if asr.is_ctc:
        external = lm and ExternalLM(lm, vocab_size, vocab_size - 2, device)
        return CTCSearch(
            asr.model.ctc, beam_size=beam_size, external_lm=external, max_prefixes=MAX_PREFIXES
        )
    scorer = build_scorer(asr.model)
    # Label l is token l + 1; an RNN-T has <sos/eos> among its labels, though it never trains it.
    eos = [asr.model.eos - 1] if scorer.num_labels >= asr.model.eos else []
    return TransducerSearch(
        scorer,
        beam_size=beam_size,
        max_symbols_per_frame=max_symbols_per_frame,
        external_lm=lm and ExternalLM(lm, vocab_size, scorer.num_labels, device),
        forbidden_labels=eos,
        max_prefixes=MAX_PREFIXES,
    )


def is_factorized(asr: LoadedASR) -> bool:
    """Whether alpha and beta mean something."""
    return isinstance(asr.model.decoder, FactorizedTransducerDecoder)


def default_scales(
    asr: LoadedASR,
    alpha: Optional[float] = None,
    beta: Optional[float] = None,
    label_bonus: Optional[float] = None,
    lm_weight: float = 0.0,
) -> Scales:
    """Scales given, the others from the model's ``decoder_conf``."""
    if is_factorized(asr):
        decoder = asr.model.decoder
        alpha = decoder.decoding_alpha if alpha is None else alpha
        beta = decoder.beta if beta is None else beta
        label_bonus = decoder.label_bonus if label_bonus is None else label_bonus
    return Scales(alpha, beta or 0.0, lm_weight, label_bonus or 0.0)


def check_scales(asr: LoadedASR, scales: Scales, has_lm: bool) -> None:
    """Refuse scales without an effect.

    Raises:
        UserError: alpha or beta for a model without predictor LM, or an LM weight without LM.
    """
    if not is_factorized(asr) and (scales.alpha is not None or scales.beta):
        raise UserError(
            "alpha and beta scale the predictor LM of a factorized_transducer; this model "
            f"({type(asr.model).__name__}) has none"
        )
    if scales.lm_weight and not has_lm:
        raise UserError("an LM weight is given, but no LM: add --lm_train_config and --lm_file")
