"""The next frames of a batch as a search sees them: scores of cells, totals of labels.

B utterances, R rows (a row is a scale setting of an utterance), M cells (a cell is a row, a frame
and a prefix), P of them, L labels, T frames, D encoder size.
"""

from typing import TYPE_CHECKING, Any, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.transducer.search_state import RowScales, SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.scorer import TransducerScorer


class Chunk:
    """Frames of a batch, with what scores them.

    Args:
        scorer: Of the model.
        state: Of the search.
        encoder_out: (B, T, D).
        count: Frames of each utterance (B,).
        max_symbols_per_frame: Labels a frame at most.
        forbidden_labels: Labels never emitted.

    Attributes:
        scales: Of the rows.
        late_weights: Of delayed fusion.
    """

    def __init__(
        self,
        scorer: "TransducerScorer",
        state: SearchState,
        encoder_out: torch.Tensor,
        count: np.ndarray,
        *,
        max_symbols_per_frame: int,
        forbidden_labels: Sequence[int] = (),
    ):
        self.scorer = scorer
        self.max_symbols_per_frame = max_symbols_per_frame
        self.state = state
        self.count = count
        at_once = state.scales
        if state.fusion is not None:
            at_once = [state.fusion.at_once(scales) for scales in state.scales]
        self.scales = RowScales(at_once, len(count), scorer.alpha, forbidden_labels)
        if state.fusion is not None and state.fusion.delayed:
            self.late_weights = state.fusion.weights(state.scales, len(self.scales.utterance))
        self._frames = self.scorer.frames(encoder_out)
        self._device = encoder_out.device
        self._settings = len(state.scales)

    def cells(self, rows: np.ndarray, frame: np.ndarray, nodes: np.ndarray) -> "ScoredCells":
        """Scores of M cells: rows in [0, R), frames of the chunk, prefixes."""
        tree, scales = self.state.tree, self.scales
        blank_scale, inverse = scales.blank_scale[rows], None
        if self._settings > 1:
            # Settings share most prefixes: score each once.
            key = scales.cell_key[rows] * (1 + frame.max()) + frame
            key = key * (1 + nodes.max()) + nodes
            _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
            rows, frame, nodes = rows[first], frame[first], nodes[first]
        if self.scorer.blank_needs_predictor:
            tree.need_predictor(nodes)
        cells = self.scorer.cells(
            self._frames,
            self._tensor(scales.utterance[rows]),
            self._tensor(frame),
            tree.pool,
            nodes,
            tree.label[nodes],
            self._tensor(scales.alpha[rows].astype(np.float32)),
        )
        return ScoredCells(cells, inverse, blank_scale)

    def totals(
        self,
        cells: "ScoredCells",
        index: np.ndarray,
        rows: np.ndarray,
        nodes: np.ndarray,
        together: np.ndarray,
    ) -> torch.Tensor:
        """Totals (P, L) of the labels of the cells ``index`` (P), of rows and prefixes (P).

        Args:
            together: If a network must run, let it run for these prefixes in the same batch.
        """
        tree = self.state.tree
        tree.need_predictor(nodes, together)
        if self.scales.uses_external:
            tree.need_external(nodes, together)
        return self.scales.totals(cells.labels(index), rows, nodes, tree)

    def emitted_at(self, rows: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Frame numbers from the start of the rows' utterances, from those in the chunk."""
        return self.state.frame[self.scales.utterance[rows]] + frame

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class ScoredCells:
    """Blanks and ceilings of M cells as float64 arrays (M), and their labels' log-probs.

    Args:
        cells: Distinct ones.
        inverse: Which of them each of the M is; None: they are the same.
        blank_scale: Of each of the M.
    """

    def __init__(self, cells: Any, inverse: Optional[np.ndarray], blank_scale: np.ndarray):
        self._cells, self._inverse = cells, inverse
        both = numpy(torch.stack([cells.blank, cells.ceiling]))
        self.blank, self.ceiling = both if inverse is None else both[:, inverse]
        self.blank = self.blank * blank_scale

    def labels(self, index: np.ndarray) -> torch.Tensor:
        """log P(label) of some of the cells (P): (P, L)."""
        if self._inverse is None:
            return self._cells.labels(torch.from_numpy(index))
        distinct, inverse = np.unique(self._inverse[index], return_inverse=True)
        return self._cells.labels(torch.from_numpy(distinct))[torch.from_numpy(inverse)]


def numpy(scores: torch.Tensor) -> np.ndarray:
    """Scores as float64 on the host."""
    return scores.double().cpu().numpy()
