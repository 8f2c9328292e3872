"""Scores of a factorized transducer for a search.

B utterances, T frames, M cells (a cell is a frame of an utterance and a prefix), P of them,
L labels (label = token id - 1), D encoder width, J joiner width.
"""

from typing import NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from espnet_llm_plugin.transducer.joint import posterior
from espnet_llm_plugin.transducer.model import FactorizedTransducerModel
from espnet_llm_plugin.transducer.prefix_tree import ROOT, RowStore, state_bytes

# The blank predictor looks at one label: up to this vocabulary size it is a table (40 MB at J 512).
MAX_TABLE = 20000


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

    @property
    def bytes_per_prefix(self) -> int:
        """See :class:`PrefixPool`."""
        return self._rows.row_bytes + state_bytes(next(reversed(self._states.values())))

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
