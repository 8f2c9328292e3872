"""Scores that a search asks of a transducer: many utterances, frames and label prefixes at once.

B utterances, T frames, M cells (a cell is a frame of an utterance and a prefix), P of them,
L labels (label = token id - 1), D encoder width.
"""

from typing import Any, Optional, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor


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
    """The predictor's data of the prefixes of a search, by node number; node 0 is there.

    Attributes:
        bytes_per_prefix: Memory that a computed prefix takes.
    """

    bytes_per_prefix: int

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


def build_scorer(model: torch.nn.Module, alpha: Optional[float] = None) -> TransducerScorer:
    """The scorer of a trained model of this package."""
    # imported here: these modules look at the models, the protocols above at nothing
    from espnet_llm_plugin.transducer.factorized_scorer import FactorizedScorer
    from espnet_llm_plugin.transducer.model import FactorizedTransducerModel, TransducerModel
    from espnet_llm_plugin.transducer.rnnt_scorer import RNNTScorer

    if isinstance(model, FactorizedTransducerModel):
        return FactorizedScorer(model, alpha)
    if isinstance(model, TransducerModel):
        return RNNTScorer(model)
    raise TypeError(f"not a transducer of this package: {type(model).__name__}")
