"""Scores that a search asks of a transducer: one utterance, many label prefixes.

T frames, N prefixes, L labels (label = token id - 1), D encoder width, J joiner width.
"""

from typing import Any, NamedTuple, Optional, Protocol, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.transducer.joint import ResidualJoint, posterior
from espnet_llm_plugin.transducer.model import FactorizedTransducerModel, TransducerModel


class TransducerScorer(Protocol):
    """One utterance's scores. Prefixes are opaque and may be kept and extended at any time.

    A prefix depends on labels only, not on the utterance: prefixes made before ``begin`` of
    another utterance stay valid.
    """

    num_labels: int

    def begin(self, encoder_out: Tensor) -> None:
        """Take the encoder output (T, D) of an utterance and precompute what frames need."""

    def root(self) -> Any:
        """The empty prefix."""

    def extend(self, parents: Sequence[Any], labels: Sequence[int]) -> list[Any]:
        """Append a label to each parent; the predictor runs once for all of them."""

    def scores(
        self, frame: int, prefixes: Sequence[Any]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """log P(blank) (N,), log P(label) (N, L), and the predictor's log-probs (N, L) or None."""


class FactorizedPrefix(NamedTuple):
    """A label prefix of the factorized transducer."""

    lm: Tensor  # (L,) predictor's log-probabilities of the next label
    blank: Tensor  # (J,) blank predictor's part of the joiner's input
    state: Any  # the predictor's


class FactorizedScorer:
    """Scores of a factorized transducer.

    ``alpha`` is an ordinary attribute: it may be changed between (or within) searches, prefixes
    stay valid.

    Args:
        model: the trained model, in evaluation mode.
        alpha: LM scale inside the softmax; default: the decoder's.
    """

    def __init__(self, model: FactorizedTransducerModel, alpha: Optional[float] = None):
        self.decoder = model.decoder
        self.alpha = self.decoder.decoding_alpha if alpha is None else alpha
        self.num_labels = self.decoder.num_labels
        self.device = self.decoder.acoustic_output.weight.device

    @torch.no_grad()
    def begin(self, encoder_out: Tensor) -> None:
        self._acoustic, self._acoustic_blank = self.decoder.acoustic(encoder_out)
        self._encoder_part = self.decoder.blank.project(encoder_out)

    @torch.no_grad()
    def root(self) -> FactorizedPrefix:
        lm, state = self.decoder.predictor.start(self.device)
        start = torch.tensor(0, device=self.device)
        return FactorizedPrefix(lm, self.decoder.blank.predict(start), state)

    @torch.no_grad()
    def extend(
        self, parents: Sequence[FactorizedPrefix], labels: Sequence[int]
    ) -> list[FactorizedPrefix]:
        if not parents:
            return []
        last = torch.tensor(labels, device=self.device)
        lm, states = self.decoder.predictor.extend(last, [parent.state for parent in parents])
        blank = self.decoder.blank.predict(last + 1)
        return [FactorizedPrefix(*prefix) for prefix in zip(lm, blank, states)]

    @torch.no_grad()
    def scores(
        self, frame: int, prefixes: Sequence[FactorizedPrefix]
    ) -> tuple[Tensor, Tensor, Tensor]:
        lm = torch.stack([prefix.lm for prefix in prefixes])
        joined = self.decoder.blank.join(
            self._encoder_part[frame], torch.stack([prefix.blank for prefix in prefixes])
        )
        blank, labels = posterior(
            self._acoustic[frame],
            lm,
            joined + self._acoustic_blank[frame],
            self.alpha,
            self.decoder.blank_norm,
        )
        return blank, labels, lm


class RNNTPrefix(NamedTuple):
    """A label prefix of the RNN-T."""

    predictor: Tensor  # (J,) decoder's part of the joint network's input
    state: Any  # the decoder's


class RNNTScorer:
    """Scores of an RNN-T with ESPnet's decoder and joint network.

    The labels are the token ids 1..V-1, ``<sos/eos>`` included (it is never seen in training).
    """

    def __init__(self, model: TransducerModel):
        self.decoder = model.decoder
        self.joint = model.joint_network
        self.num_labels = model.vocab_size - 1
        self.device = self.joint.lin_out.weight.device

    @torch.no_grad()
    def begin(self, encoder_out: Tensor) -> None:
        self._encoder_part = self.joint.lin_enc(encoder_out)
        self._residual = None
        if isinstance(self.joint, ResidualJoint):
            self._residual = self.joint.acoustic_output(encoder_out)

    @torch.no_grad()
    def root(self) -> RNNTPrefix:
        self.decoder.set_device(self.device)
        return self._step([0], self.decoder.init_state(1))[0]

    @torch.no_grad()
    def extend(self, parents: Sequence[RNNTPrefix], labels: Sequence[int]) -> list[RNNTPrefix]:
        if not parents:
            return []
        states = self.decoder.create_batch_states(None, [parent.state for parent in parents])
        return self._step([label + 1 for label in labels], states)

    def _step(self, tokens: Sequence[int], states: Any) -> list[RNNTPrefix]:
        embedded = self.decoder.embed(torch.tensor(tokens, device=self.device)[:, None])
        output, states = self.decoder.rnn_forward(embedded, states)
        parts = self.joint.lin_dec(output[:, 0])
        return [
            RNNTPrefix(part, self.decoder.select_state(states, i)) for i, part in enumerate(parts)
        ]

    @torch.no_grad()
    def scores(self, frame: int, prefixes: Sequence[RNNTPrefix]) -> tuple[Tensor, Tensor, None]:
        parts = torch.stack([prefix.predictor for prefix in prefixes])
        logits = self.joint.lin_out(self.joint.joint_activation(self._encoder_part[frame] + parts))
        if self._residual is not None:
            logits = logits + self._residual[frame]
        log_probs = logits.float().log_softmax(dim=-1)
        return log_probs[:, 0], log_probs[:, 1:], None


def build_scorer(model: torch.nn.Module, alpha: Optional[float] = None) -> TransducerScorer:
    """The scorer of a trained model of this package."""
    if isinstance(model, FactorizedTransducerModel):
        return FactorizedScorer(model, alpha)
    if isinstance(model, TransducerModel):
        return RNNTScorer(model)
    raise TypeError(f"not a transducer of this package: {type(model).__name__}")
