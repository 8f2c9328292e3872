"""The factorized transducer's decoder: acoustic logits, predictor, blank branch, ESPnet's searches.

B utterances, T frames, U labels, N hypotheses, L labels, V = L + 2 tokens, D encoder width,
J joiner width.
"""

from typing import Any, NamedTuple, Optional, Sequence

import torch
from espnet2.asr.decoder.abs_decoder import AbsDecoder
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.transducer.abs_predictor import as_history
from espnet_llm_plugin.transducer.blank import BlankBranch
from espnet_llm_plugin.transducer.loss import check_blank_norm
from espnet_llm_plugin.transducer.predictors import build_predictor

# ESPnet's default search stays at a frame for as long as labels cost less than blank. With a label
# bonus, or an untrained model, that may be for ever; a beam of 50 needs a few hundred expansions.
MAX_EXPANSIONS = 3000


class FactorizedOutput(NamedTuple):
    """The three factors of a batch; see ``transducer.loss.factorized_rnnt_loss``."""

    acoustic_logits: Tensor  # (B, T, L)
    lm_log_probs: Tensor  # (B, U+1, L)
    blank_logits: Tensor  # (B, T, U+1)


class FactorizedTransducerDecoder(AbsDecoder):
    """Factorized transducer with a replaceable language model as its predictor.

    ``P_nb(v|t,u) = softmax_v(a[t,v] + alpha l[u,v])``, ``P(blank|t,u) = sigmoid(z[t,u])``
    [Transducer-Llama, arXiv 2412.16464; HAT normalisation].

    Args:
        vocab_size: V, with ``<blank>`` = 0 and ``<sos/eos>`` = V - 1; both are not labels.
        encoder_output_size: D.
        predictor: ``stateless`` (weak LM), ``lstm`` or ``llm`` (frozen).
        predictor_conf: options of the predictor.
        joint_dim: J, width of the blank joiner.
        blank_embed_dim: embedding width of the blank branch's stateless predictor.
        blank_norm: ``sigmoid`` (HAT) or ``softmax`` (FNT: one softmax over blank and labels).
        acoustic_blank: add the blank logit of ``acoustic_output``, as a CTC layer has one, to
            the joiner's.
        lm_scale: alpha in training.
        alpha: LM scale inside the softmax in decoding; default: ``lm_scale``.
        beta: LM scale outside the softmax in decoding.
        label_bonus: added to the score of every label in decoding; moves with beta.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_output_size: int,
        predictor: str = "stateless",
        predictor_conf: Optional[dict] = None,
        joint_dim: int = 256,
        blank_embed_dim: int = 256,
        blank_norm: str = "sigmoid",
        acoustic_blank: bool = True,
        lm_scale: float = 1.0,
        alpha: Optional[float] = None,
        beta: float = 0.0,
        label_bonus: float = 0.0,
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown(
            "decoder_conf of 'factorized_transducer'",
            unknown,
            FactorizedTransducerDecoder.__init__,
            ("self", "vocab_size", "encoder_output_size"),
        )
        check_blank_norm(blank_norm)
        if vocab_size < 3:
            raise UserError(
                f"the token list has {vocab_size} tokens; a factorized transducer needs <blank>, "
                "at least one label, and <sos/eos>"
            )
        self.num_labels = vocab_size - 2
        self.joint_dim = joint_dim
        self.blank_norm = blank_norm
        self.acoustic_blank = acoustic_blank
        self.lm_scale = lm_scale
        self.alpha = alpha
        self.beta = beta
        self.label_bonus = label_bonus

        # laid out as ESPnet's ctc.ctc_lo, so that --init_param can copy one into the other
        self.acoustic_output = torch.nn.Linear(encoder_output_size, vocab_size)
        self.blank = BlankBranch(encoder_output_size, self.num_labels, blank_embed_dim, joint_dim)
        self.predictor = build_predictor(predictor, self.num_labels, **(predictor_conf or {}))

        # ESPnet's BeamSearchTransducer reads these
        self.odim = vocab_size
        self.dunits = self.num_labels + joint_dim
        self.blank_id = 0
        self.device = torch.device("cpu")
        self._frame = 0
        self._expansions = 0

    @property
    def decoding_alpha(self) -> float:
        """The LM scale inside the softmax in decoding."""
        return self.lm_scale if self.alpha is None else self.alpha

    def acoustic(self, encoder_out: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder output (..., D) -> acoustic logits (..., L) and acoustic blank logit (...)."""
        weight, bias = self.acoustic_output.weight, self.acoustic_output.bias
        # rows of the layer, not columns of its output: no second (B, T, V) for their gradient
        labels = torch.nn.functional.linear(encoder_out, weight[1:-1], bias[1:-1])
        if not self.acoustic_blank:
            return labels, labels.new_zeros(labels.shape[:-1])
        blank = torch.nn.functional.linear(encoder_out, weight[:1], bias[:1]).squeeze(-1)
        if self.blank_norm == "sigmoid":
            # the log-odds of blank, so that its sigmoid is the posterior of a softmax
            blank = blank.float() - labels.float().logsumexp(dim=-1)
        return labels, blank

    def forward(
        self, hs_pad: Tensor, hlens: Tensor, ys_in_pad: Tensor, ys_in_lens: Tensor
    ) -> FactorizedOutput:
        """The factors of the lattice of a batch, for training.

        Args:
            hs_pad: (B, T, D) encoder output.
            hlens: (B,) its lengths (not needed: every frame is computed on its own).
            ys_in_pad: (B, U) labels in [0, L), right-padded with any valid label.
            ys_in_lens: (B,) their numbers (not needed: no label sees later ones).
        """
        acoustic, acoustic_blank = self.acoustic(hs_pad)
        joined = self.blank.join(
            self.blank.project(hs_pad).unsqueeze(2),
            self.blank.predict(as_history(ys_in_pad)).unsqueeze(1),
        )
        return FactorizedOutput(
            acoustic_logits=acoustic,
            lm_log_probs=self.predictor(ys_in_pad),
            blank_logits=joined.float() + acoustic_blank.unsqueeze(2),
        )

    # --- ESPnet's BeamSearchTransducer: hyp.dec_state is the state before hyp.yseq[-1] ---

    def set_device(self, device: torch.device) -> None:
        """Set where the searches' tensors live."""
        self.device = device

    def init_state(self, batch_size: int) -> list[None]:
        """States of ``batch_size`` hypotheses before their first token ``<blank>``."""
        return [None] * batch_size

    def select_state(self, states: Sequence[Any], idx: int) -> Any:
        """The state of one hypothesis of a batch."""
        return states[idx]

    def create_batch_states(
        self, states: Sequence[Any], new_states: Sequence[Any], check_list: Any = None
    ) -> list[Any]:
        """The states of a new batch of hypotheses; the old batch's ``states`` are not needed."""
        return list(new_states)

    def score(self, hyp: Any, cache: dict) -> tuple[Tensor, Any, Tensor]:
        """Decoder output (L + J,), state after the hypothesis, and its last token (1,)."""
        self._expansions = self._expansions + 1 if cache else 1  # an empty cache: a new search
        if self._expansions > MAX_EXPANSIONS:
            raise UserError(
                f"the search expanded {MAX_EXPANSIONS} hypotheses without leaving a frame: labels "
                f"go on for ever with this model, label_bonus={self.label_bonus} and "
                f"beta={self.beta}. Lower label_bonus, or use search_type tsd, alsd, nsc or maes, "
                "which bound the labels per frame"
            )
        decoder_out, states = self._score_batch([hyp], cache)
        return decoder_out[0], states[0], torch.tensor([hyp.yseq[-1]], device=self.device)

    def at_frame(self, encoder_out: Tensor) -> None:
        """Notice that a search has moved on to another frame."""
        if encoder_out.data_ptr() != self._frame:
            self._frame, self._expansions = encoder_out.data_ptr(), 0

    def batch_score(
        self, hyps: Sequence[Any], dec_states: Sequence[Any], cache: dict, use_lm: bool
    ) -> tuple[Tensor, list[Any], Optional[Tensor]]:
        """Decoder outputs (N, L + J), states after the hypotheses, and last tokens (N, 1)."""
        decoder_out, states = self._score_batch(hyps, cache)
        last = None
        if use_lm:
            last = torch.tensor([[hyp.yseq[-1]] for hyp in hyps], device=self.device)
        return decoder_out, states, last

    def _score_batch(self, hyps: Sequence[Any], cache: dict) -> tuple[Tensor, list[Any]]:
        """One predictor call for all label sequences that this search has not seen yet."""
        new = {tuple(hyp.yseq): hyp.dec_state for hyp in hyps if tuple(hyp.yseq) not in cache}
        start = (self.blank_id,)
        if start in new:
            del new[start]
            cache[start] = self._entry(*self.predictor.start(self.device), token=0)
        if new:
            # <sos/eos> has score minus infinity, yet a beam wider than the vocabulary lets ESPnet
            # extend it; such a hypothesis can never win, so any label will do
            tokens = [seq[-1] if 0 < seq[-1] <= self.num_labels else 1 for seq in new]
            labels = torch.tensor(tokens, device=self.device) - 1
            log_probs, states = self.predictor.extend(labels, list(new.values()))
            for seq, *entry, token in zip(new, log_probs, states, tokens):
                cache[seq] = self._entry(*entry, token=token)
        found = [cache[tuple(hyp.yseq)] for hyp in hyps]
        return torch.stack([out for out, _ in found]), [state for _, state in found]

    def _entry(self, log_probs: Tensor, state: Any, token: int) -> tuple[Tensor, Any]:
        predictor_part = self.blank.predict(torch.tensor(token, device=self.device))
        return torch.cat([log_probs.to(predictor_part.dtype), predictor_part]), state
