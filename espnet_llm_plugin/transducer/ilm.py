"""An RNN-T's scores with another internal LM than its own estimate, for a search that subtracts it.

M cells or prefixes, P of them, L labels (label = token id - 1).
"""

from typing import Any, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor

from espnet_llm_plugin.transducer.prefix_tree import ROOT
from espnet_llm_plugin.transducer.scorer import Cells, PrefixPool, TransducerScorer


class Bigram(Protocol):
    """Log-probs after single tokens, such as ``fusion.label_ngram.LabelNgram`` of order 2."""

    @property
    def vocab_size(self) -> int: ...

    def rows(self, before: Tensor) -> Tensor:
        """(M, V) after tokens (M, 1); sos is V - 1."""


class BigramPool:
    """A predictor's pool whose :meth:`lm` is a bigram's.

    Attributes:
        predictor: The pool without the bigram.
    """

    def __init__(self, pool: PrefixPool, bigram: Bigram, num_labels: int, device: torch.device):
        self.predictor, self._bigram, self._num_labels = pool, bigram, num_labels
        self._device = device
        self._last = np.full(64, bigram.vocab_size - 1)  # token ids; of the empty prefix: sos

    def compute(self, nodes: np.ndarray, parents: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`PrefixPool`."""
        self.predictor.compute(nodes, parents, labels)
        highest = int(nodes.max(initial=ROOT))
        if highest >= len(self._last):
            more = np.zeros(highest + 1, dtype=self._last.dtype)
            self._last = np.concatenate([self._last, more])
        self._last[nodes] = labels + 1

    @property
    def bytes_per_prefix(self) -> int:
        """See :class:`PrefixPool`."""
        return self.predictor.bytes_per_prefix

    def lm(self, nodes: np.ndarray) -> Tensor:
        """The bigram's log-probs of the labels after nodes: (M, L)."""
        rows = self._bigram.rows(torch.from_numpy(self._last[nodes, None]))
        return rows[:, 1 : 1 + self._num_labels].to(self._device)

    def free(self, nodes: Sequence[int]) -> None:
        """See :class:`PrefixPool`."""
        self.predictor.free(nodes)


class WithBigramILM:
    """A ``TransducerScorer`` whose internal LM is a bigram; all else is the model's.

    [Low-order density ratio, arXiv 2203.16776]

    Args:
        scorer: Of an RNN-T.
        bigram: Over the model's token list.
    """

    def __init__(self, scorer: TransducerScorer, bigram: Bigram):
        self._scorer, self._bigram = scorer, bigram
        self.num_labels, self.alpha = scorer.num_labels, scorer.alpha
        self.blank_needs_predictor = scorer.blank_needs_predictor
        self.device = scorer.device

    def frames(self, encoder_out: Tensor) -> Any:
        """See :class:`TransducerScorer`."""
        return self._scorer.frames(encoder_out)

    def prefixes(self) -> BigramPool:
        """See :class:`TransducerScorer`."""
        pool = self._scorer.prefixes()
        return BigramPool(pool, self._bigram, self.num_labels, self.device)

    def cells(self, frames, utterance, frame, pool, nodes, last, alpha) -> Cells:
        """See :class:`TransducerScorer`."""
        return self._scorer.cells(frames, utterance, frame, pool.predictor, nodes, last, alpha)
