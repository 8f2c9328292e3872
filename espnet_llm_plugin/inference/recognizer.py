"""Speech to text with a trained model.

B utterances, T frames, D encoder size, V tokens, L labels (label = token id - 1).
"""

from dataclasses import dataclass, field
from typing import Mapping, Optional, Sequence, Union

import numpy as np
import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.encoder.streaming import AbsStreamingEncoder
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_search import CTCSearch
from espnet_llm_plugin.fusion.external_lm import ExternalLM
from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.inference.fusion_options import LABEL_WISE, FusionOptions, build_fusion
from espnet_llm_plugin.inference.loading import LoadedASR
from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.ilm import WithBigramILM
from espnet_llm_plugin.transducer.llm_predictor import LLMPredictor
from espnet_llm_plugin.transducer.prefix_tree import MAX_BYTES
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch

Search = Union[TransducerSearch, CTCSearch]
Samples = Union[np.ndarray, torch.Tensor]


@dataclass(frozen=True)
class Recognition:
    """One entry of an n-best list: text (None without a tokenizer), tokens, and the scores.

    Of a model that knows languages also their codes: ``lang``, of the soft prompt, and
    ``lang_predicted``.
    """

    text: Optional[str]
    tokens: list[str]
    token_ids: list[int]
    hypothesis: Hypothesis
    languages: Mapping[str, str] = field(default_factory=dict)


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
        fusion: How an LM is combined with the search.
        ilm: See :func:`build_search`.
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
        fusion: FusionOptions = LABEL_WISE,
        ilm: Optional[LabelNgram] = None,
    ):
        self.asr = asr
        self.scales = default_scales(asr) if scales is None else scales
        check_scales(asr, self.scales, has_lm=lm is not None or fusion.has_lm)
        self.search = build_search(
            asr,
            lm,
            beam_size=beam_size,
            max_symbols_per_frame=max_symbols_per_frame,
            fusion=fusion,
            ilm=ilm,
        )
        self.nbest = nbest
        self.normalize_length = normalize_length

    def __call__(self, speech: Samples) -> list[Recognition]:
        """The n-best list of samples (N,) or features (N, F)."""
        return self.batch([speech])[0]

    def batch(self, speech: Sequence[Samples]) -> list[list[Recognition]]:
        """The n-best lists of B utterances, decoded together."""
        return self.decode(*self.encode(speech))

    def encode(self, speech: Sequence[Samples]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder outputs (B, T, D) and their lengths (B,) of B utterances.

        Raises:
            espnet.nets.pytorch_backend.transformer.subsampling.TooShortUttError: Too short.
        """
        return encode(self.asr.model, speech)

    def decode(self, encoder_out: torch.Tensor, lengths: torch.Tensor) -> list[list[Recognition]]:
        """The n-best lists of encoder outputs (B, T, D) of ``lengths`` (B,) frames."""
        lists = self.search.batch(
            encoder_out, lengths, self.scales, self.nbest, self.normalize_length
        )
        return [[self.recognition(hyp) for hyp in hyps] for hyps in lists]

    def lm_use(self) -> tuple[int, int]:
        """Calls of the LM so far, external or an LLM as the predictor, and tokens read in them."""
        predictor = getattr(self.asr.model.decoder, "predictor", None)
        own = predictor.use if isinstance(predictor, LLMPredictor) else (0, 0)
        return tuple(map(sum, zip(own, lm_use(self.search))))

    def recognition(self, hypothesis: Hypothesis) -> Recognition:
        """Tokens and text of a hypothesis."""
        ids = [label + 1 for label in hypothesis.labels]
        tokens = self.asr.text.tokens(ids)
        return Recognition(self.asr.text.text(tokens), tokens, ids, hypothesis)


@torch.inference_mode()
def encode(model: torch.nn.Module, speech: Sequence[Samples]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder outputs of utterances: samples (N,) or features (N, F) each.

    Each by itself: in a padded batch ESPnet's subsampling gives an utterance up to two frames
    more, made of padding, and every frame attends to them. On a GPU :func:`encode_batch` where it
    gives the same; a CPU gains nothing by it.

    Returns:
        (B, T, D) on the model's device, and the lengths (B,).

    Raises:
        espnet.nets.pytorch_backend.transformer.subsampling.TooShortUttError: One is too short.
    """
    parameter = next(model.parameters())
    rows = [torch.as_tensor(one).to(parameter)[None] for one in speech]
    if len(rows) > 1 and parameter.is_cuda and encodes_batches(model):
        return encode_batch(model, rows)
    outputs = []
    for row in rows:
        encoder_out, lengths = model.encode(row, torch.tensor([row.size(1)], device=row.device))
        if isinstance(encoder_out, tuple):  # with intermediate CTC outputs
            encoder_out = encoder_out[0]
        outputs.append(encoder_out[0, : int(lengths[0])])
    return pad_sequence(outputs, batch_first=True), torch.tensor([len(out) for out in outputs])


@torch.inference_mode()
def encode_batch(
    model: torch.nn.Module, rows: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder outputs (B, T, D) and their lengths (B,) by one call of the encoder.

    Args:
        model: One for which :func:`encodes_batches`.
        rows: Samples (1, N) or features (1, N, F) of each utterance, on the model's device.
    """
    # Features one by one: an utterance's last frames see its end mirrored, not padding.
    features = [features_of(model, row) for row in rows]
    lengths = torch.tensor([len(one) for one in features], device=rows[0].device)
    encoder_out, lengths, _ = model.encoder(pad_sequence(features, batch_first=True), lengths)
    return encoder_out, lengths.cpu()


def encodes_batches(model: torch.nn.Module) -> bool:
    """Whether the encoder gives each utterance of a padded batch what it gets alone.

    The streaming encoders of this package do.
    """
    return (
        isinstance(model.encoder, AbsStreamingEncoder)
        and model.preencoder is None
        and model.postencoder is None
    )


def features_of(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    """Normalised features (T, F) of samples (1, N) or features (1, N, F)."""
    size = torch.tensor([row.size(1)], device=row.device)
    features = model.collect_feats(row, size, text=None, text_lengths=None)
    features, lengths = features["feats"], features["feats_lengths"]
    if model.normalize is not None:
        features, lengths = model.normalize(features, lengths)
    return features[0, : int(lengths[0])]


def build_search(
    asr: LoadedASR,
    lm: Optional[BatchScorerInterface] = None,
    *,
    beam_size: int = 8,
    max_symbols_per_frame: int = 3,
    fusion: FusionOptions = LABEL_WISE,
    ilm: Optional[LabelNgram] = None,
) -> Search:
    """The search of a model, with an external LM or a prior if given.

    ``ilm`` takes the place of the RNN-T's own internal LM.
    """
    if ilm is not None and (asr.is_ctc or is_factorized(asr)):
        raise UserError(
            "--ilm bigram is for an RNN-T; this model is "
            + ("CTC" if asr.is_ctc else "a factorized_transducer, whose predictor is its LM")
        )
    if beam_size < 1 or max_symbols_per_frame < 1:
        raise UserError(
            f"beam size {beam_size}, max_symbols_per_frame {max_symbols_per_frame}: "
            "both must be at least 1"
        )
    vocab_size = len(asr.model.token_list)
    device = next(asr.model.parameters()).device
    how = build_fusion(asr, fusion, lm is not None, device)

    def external_lm(num_labels: int) -> Optional[ExternalLM]:
        if fusion.ngram is not None:
            return ExternalLM(fusion.ngram, vocab_size, num_labels, device)
        return lm and ExternalLM(lm, vocab_size, num_labels, device, fusion.temperature)

    if asr.is_ctc:
        return CTCSearch(
            asr.model.ctc,
            beam_size=beam_size,
            external_lm=external_lm(vocab_size - 2),
            fusion=how,
            recombination=fusion.recombination,
            top_labels=fusion.top_labels,
            max_bytes=MAX_BYTES,
        )
    scorer = build_scorer(asr.model)
    if ilm is not None:
        scorer = WithBigramILM(scorer, ilm)
    # Label l is token l + 1; an RNN-T has <sos/eos> among its labels, though it never trains it.
    eos = [asr.model.eos - 1] if scorer.num_labels >= asr.model.eos else []
    return TransducerSearch(
        scorer,
        beam_size=beam_size,
        max_symbols_per_frame=max_symbols_per_frame,
        external_lm=external_lm(scorer.num_labels),
        forbidden_labels=eos,
        max_bytes=MAX_BYTES,
        fusion=how,
    )


def lm_use(search: Search) -> tuple[int, int]:
    """Calls of a search's external LM so far, and tokens that it has read in them."""
    llm = getattr(search.fusion, "llm", None)
    if llm is not None:
        return llm.num_calls, llm.num_tokens
    if search.external_lm is not None:
        return search.external_lm.num_calls, search.external_lm.num_prefixes
    return 0, 0


def is_factorized(asr: LoadedASR) -> bool:
    """Whether alpha and beta mean something."""
    return isinstance(asr.model.decoder, FactorizedTransducerDecoder)


def default_scales(
    asr: LoadedASR,
    alpha: Optional[float] = None,
    beta: Optional[float] = None,
    label_bonus: Optional[float] = None,
    lm_weight: float = 0.0,
    ilm_weight: float = 0.0,
    blank_scale: float = 1.0,
    prior_weight: float = 0.0,
) -> Scales:
    """Scales given, the others from the model's ``decoder_conf``.

    ``ilm_weight`` times the internal LM is subtracted: of a factorized transducer the predictor's
    LM, of an RNN-T the estimate without the encoder.

    Raises:
        UserError: alpha or beta for a model without predictor LM, or its internal LM added.
    """
    if is_factorized(asr):
        decoder = asr.model.decoder
        alpha = decoder.decoding_alpha if alpha is None else alpha
        beta = decoder.beta if beta is None else beta
        label_bonus = decoder.label_bonus if label_bonus is None else label_bonus
    elif alpha is not None or beta:  # here: the internal LM's weight is added to beta below
        raise _no_predictor_lm(asr)
    elif ilm_weight < 0:
        raise UserError(f"--ilm_weight {ilm_weight}: the internal LM is subtracted; give 0 or more")
    beta = (beta or 0.0) - ilm_weight
    return Scales(alpha, beta, lm_weight, label_bonus or 0.0, blank_scale, prior_weight)


def check_scales(asr: LoadedASR, scales: Scales, has_lm: bool) -> None:
    """Refuse scales without an effect.

    Raises:
        UserError: alpha or beta for a model without predictor LM, an internal LM weight for CTC,
            or an LM weight without LM.
    """
    if asr.is_ctc and scales.beta < 0:
        raise UserError("an internal LM weight is given, but a CTC model has no internal LM")
    if not is_factorized(asr) and (scales.alpha is not None or scales.beta > 0):
        raise _no_predictor_lm(asr)
    if scales.lm_weight and not has_lm:
        raise UserError(
            "an LM weight is given, but no LM: add --lm_train_config and --lm_file, --fusion_llm, "
            "or --fusion_ngram"
        )


def _no_predictor_lm(asr: LoadedASR) -> UserError:
    return UserError(
        "alpha and beta scale the predictor LM of a factorized_transducer; this model "
        f"({type(asr.model).__name__}) has none (of an RNN-T --ilm_weight weighs the internal LM)"
    )
