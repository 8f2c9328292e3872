"""Scores that a search asks of a transducer: many utterances, frames and label prefixes at once.

B utterances, T frames, M cells (a cell is a frame of an utterance and a prefix), P of them,
L labels (label = token id - 1), D encoder width, J joiner width.
"""

from typing import Any, NamedTuple, Optional, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from espnet_llm_plugin.transducer.joint import ResidualJoint, posterior
from espnet_llm_plugin.transducer.model import FactorizedTransducerModel, TransducerModel
from espnet_llm_plugin.transducer.prefix_tree import ROOT, RowStore

# The blank predictor looks at one label: up to this vocabulary size it is a table (40 MB at J 512).
MAX_TABLE = 20000


class Cells(Protocol):
    """Scores of M cells.

    Attributes:
        blank: log P(blank) (M,).
        ceiling: No label of the cell has a log-probability above this (M,).
    """

    blank: Tensor
    ceiling: Tensor

    def labels(self, which: Tensor) -> Tensor:
        """log P(label) of the cells ``which`` (P): (P, L), the caller's to change."""


class PrefixPool(Protocol):
    """The predictor's data of the prefixes of a search, by node number; node 0 is there."""

    def compute(self, nodes: np.ndarray, parents: np.ndarray, labels: np.ndarray) -> None:
        """Run the predictor once for M prefixes, each a computed parent and a label."""

    def lm(self, nodes: np.ndarray) -> Tensor:
        """The (internal) LM's log-probs, finite, of the labels after computed nodes: (M, L)."""

    def free(self, nodes: Sequence[int]) -> None:
        """Forget nodes; their numbers may come back for other prefixes."""


class TransducerScorer(Protocol):
    """A transducer as a search sees it. It keeps nothing between two calls.

    Attributes:
        num_labels: L.
        alpha: The model's LM scale inside the softmax, for settings that give none.
        blank_needs_predictor: Whether the cells of a prefix, and not only their labels, need the
            predictor to have run for it.
    """

    num_labels: int
    alpha: float
    blank_needs_predictor: bool

    def frames(self, encoder_out: Tensor) -> Any:
        """What only depends on the encoder output (B, T, D)."""

    def prefixes(self) -> PrefixPool:
        """The pool of a new search."""

    def cells(
        self,
        frames: Any,
        utterance: Tensor,
        frame: Tensor,
        pool: PrefixPool,
        nodes: np.ndarray,
        last: np.ndarray,
        alpha: Tensor,
    ) -> Cells:
        """Scores of M cells; all arguments but the first and ``pool`` have M entries.

        Args:
            frames: From :meth:`frames`.
            utterance: In [0, B).
            frame: In [0, T).
            pool: Of the search.
            nodes: Prefixes.
            last: Their last labels, -1 for the empty prefix.
            alpha: LM scale inside the softmax.
        """


class FactorizedFrames(NamedTuple):
    """Encoder side of a factorized transducer."""

    acoustic: Tensor  # (B, T, L)
    acoustic_blank: Tensor  # (B, T)
    blank_part: Tensor  # (B, T, J) of the joiner's input


class FactorizedPool:
    """LM rows and predictor states of a factorized transducer's prefixes."""

    def __init__(self, predictor: torch.nn.Module, device: torch.device):
        self.predictor = predictor
        self.device = device
        self._rows = RowStore()
        with torch.no_grad():
            lm, state = predictor.start(device)
        self._states = {ROOT: state}
        self._rows.put("lm", torch.tensor([ROOT]), self._finite(lm[None]))

    @staticmethod
    def _finite(lm: Tensor) -> Tensor:
        # Zero times -inf would be NaN; e^-10000 is zero all the same.
        return lm.clamp(min=-1e4)

    @torch.no_grad()
    def compute(self, nodes: np.ndarray, parents: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`PrefixPool`."""
        last = torch.from_numpy(labels).to(self.device)
        states = [self._states[parent] for parent in parents.tolist()]
        lm, new = self.predictor.extend(last, states)
        self._rows.put("lm", torch.from_numpy(nodes), self._finite(lm))
        self._states.update(zip(nodes.tolist(), new))

    @torch.no_grad()
    def lm(self, nodes: np.ndarray) -> Tensor:
        """See :class:`PrefixPool`."""
        return self._rows["lm"][torch.from_numpy(nodes).to(self.device)]

    def free(self, nodes: Sequence[int]) -> None:
        """See :class:`PrefixPool`."""
        for node in nodes:
            self._states.pop(node, None)


class FactorizedCells:
    """Cells of a factorized transducer; with ``blank_norm`` sigmoid labels cost on demand only."""

    def __init__(
        self, scorer: "FactorizedScorer", frames: FactorizedFrames, at: tuple, pool, nodes, z, alpha
    ):
        self._frames, self._at, self._pool = frames, at, pool
        self._nodes, self._z, self._alpha = nodes, z, alpha
        self._labels = None
        self._norm = scorer.decoder.blank_norm
        if self._norm == "sigmoid":
            self.blank, self.ceiling = logsigmoid(z), logsigmoid(-z)
        else:
            everything = torch.arange(len(z), device=z.device)
            self.blank, self._labels = self._posterior(everything)
            self.ceiling = self._labels.amax(dim=1)

    @torch.no_grad()
    def _posterior(self, which: Tensor) -> tuple[Tensor, Tensor]:
        utterance, frame = self._at
        return posterior(
            self._frames.acoustic[utterance[which], frame[which]],
            self._pool.lm(self._nodes[which.cpu().numpy()]),
            self._z[which],
            self._alpha[which, None],
            self._norm,
        )

    def labels(self, which: Tensor) -> Tensor:
        """See :class:`Cells`."""
        return self._posterior(which)[1] if self._labels is None else self._labels[which]


class FactorizedScorer:
    """Scores of a factorized transducer.

    Args:
        model: the trained model, in evaluation mode.
        alpha: LM scale inside the softmax; default: the decoder's.
    """

    def __init__(self, model: FactorizedTransducerModel, alpha: Optional[float] = None):
        self.decoder = model.decoder
        self.alpha = self.decoder.decoding_alpha if alpha is None else alpha
        self.num_labels = self.decoder.num_labels
        self.device = self.decoder.acoustic_output.weight.device
        # The sigmoid's blank looks at the last label alone, through its own predictor.
        self.blank_needs_predictor = self.decoder.blank_norm == "softmax"
        self._blank_parts: Optional[Tensor] = None
        if self.num_labels < MAX_TABLE:
            history = torch.arange(self.num_labels + 1, device=self.device)
            with torch.no_grad():
                self._blank_parts = self.decoder.blank.predict(history)

    @torch.no_grad()
    def frames(self, encoder_out: Tensor) -> FactorizedFrames:
        """See :class:`TransducerScorer`."""
        return FactorizedFrames(
            *self.decoder.acoustic(encoder_out), self.decoder.blank.project(encoder_out)
        )

    @torch.no_grad()
    def prefixes(self) -> FactorizedPool:
        """See :class:`TransducerScorer`."""
        return FactorizedPool(self.decoder.predictor, self.device)

    @torch.no_grad()
    def cells(self, frames, utterance, frame, pool, nodes, last, alpha) -> FactorizedCells:
        """See :class:`TransducerScorer`."""
        history = torch.from_numpy(last + 1).to(self.device)
        if self._blank_parts is None:
            predicted = self.decoder.blank.predict(history)
        else:
            predicted = self._blank_parts[history]
        z = frames.acoustic_blank[utterance, frame] + self.decoder.blank.join(
            frames.blank_part[utterance, frame], predicted
        )
        return FactorizedCells(self, frames, (utterance, frame), pool, nodes, z, alpha)


class RNNTFrames(NamedTuple):
    """Encoder side of an RNN-T."""

    part: Tensor  # (B, T, J) of the joint network's input
    residual: Optional[Tensor]  # (B, T, V) acoustic logits


class RNNTPool:
    """Decoder outputs and states of an RNN-T's prefixes, in tensors."""

    def __init__(self, scorer: "RNNTScorer"):
        self._scorer = scorer
        self._rows = RowStore()
        scorer.decoder.set_device(scorer.device)
        self._run(np.array([ROOT]), [0], scorer.decoder.init_state(1))

    @torch.no_grad()
    def compute(self, nodes: np.ndarray, parents: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`PrefixPool`."""
        before = torch.from_numpy(parents).to(self._scorer.device)
        names = ("hidden", "cell") if self._has_cell else ("hidden",)
        states = [self._rows[name][before].transpose(0, 1).contiguous() for name in names]
        self._run(nodes, labels + 1, (states[0], states[1] if self._has_cell else None))

    @torch.no_grad()
    def _run(self, nodes: np.ndarray, tokens: Sequence[int], states: tuple) -> None:
        scorer, at = self._scorer, torch.from_numpy(nodes)
        last = torch.as_tensor(tokens, device=scorer.device)
        output, (hidden, cell) = scorer.decoder.rnn_forward(
            scorer.decoder.embed(last[:, None]), states
        )
        self._has_cell = cell is not None
        self._rows.put("part", at, scorer.joint.lin_dec(output[:, 0]))
        self._rows.put("hidden", at, hidden.transpose(0, 1))
        if self._has_cell:
            self._rows.put("cell", at, cell.transpose(0, 1))

    def parts(self, nodes: np.ndarray) -> Tensor:
        """The decoder's part of the joint network's input (M, J)."""
        return self._rows["part"][torch.from_numpy(nodes).to(self._scorer.device)]

    @torch.no_grad()
    def lm(self, nodes: np.ndarray) -> Tensor:
        """Internal LM: the labels' softmax where the encoder's part of the joint is zero.

        [Internal LM estimation, arXiv 2011.01991; HAT, arXiv 2003.07705]
        """
        joint = self._scorer.joint
        logits = joint.lin_out(joint.joint_activation(self.parts(nodes)))[:, 1:]
        return logits.float().log_softmax(dim=-1).clamp(min=-1e4)

    def free(self, nodes: Sequence[int]) -> None:
        """See :class:`PrefixPool`: rows are overwritten, nothing to do."""


class RNNTCells:
    """Cells of an RNN-T, whose joint network scores blank and labels together."""

    def __init__(self, log_probs: Tensor):
        self._log_probs = log_probs
        self.blank = log_probs[:, 0]
        self.ceiling = log_probs[:, 1:].amax(dim=1)

    def labels(self, which: Tensor) -> Tensor:
        """See :class:`Cells`."""
        return self._log_probs[which, 1:]


class RNNTScorer:
    """Scores of an RNN-T with ESPnet's decoder and joint network.

    The labels are the token ids 1..V-1, ``<sos/eos>`` included (it is never seen in training).
    """

    alpha = 0.0
    blank_needs_predictor = True

    def __init__(self, model: TransducerModel):
        self.decoder = model.decoder
        self.joint = model.joint_network
        self.num_labels = model.vocab_size - 1
        self.device = self.joint.lin_out.weight.device

    @torch.no_grad()
    def frames(self, encoder_out: Tensor) -> RNNTFrames:
        """See :class:`TransducerScorer`."""
        residual = None
        if isinstance(self.joint, ResidualJoint):
            residual = self.joint.acoustic_output(encoder_out)
        return RNNTFrames(self.joint.lin_enc(encoder_out), residual)

    @torch.no_grad()
    def prefixes(self) -> RNNTPool:
        """See :class:`TransducerScorer`."""
        return RNNTPool(self)

    @torch.no_grad()
    def cells(self, frames, utterance, frame, pool, nodes, last, alpha) -> RNNTCells:
        """See :class:`TransducerScorer`; there is no LM inside the softmax for ``alpha``."""
        hidden = self.joint.joint_activation(frames.part[utterance, frame] + pool.parts(nodes))
        logits = self.joint.lin_out(hidden)
        if frames.residual is not None:
            logits = logits + frames.residual[utterance, frame]
        return RNNTCells(logits.float().log_softmax(dim=-1))


def build_scorer(model: torch.nn.Module, alpha: Optional[float] = None) -> TransducerScorer:
    """The scorer of a trained model of this package."""
    if isinstance(model, FactorizedTransducerModel):
        return FactorizedScorer(model, alpha)
    if isinstance(model, TransducerModel):
        return RNNTScorer(model)
    raise TypeError(f"not a transducer of this package: {type(model).__name__}")
