"""Label prefixes of one utterance: what the predictor and the language model know, once each.

N prefixes, L labels. Node 0 is the empty prefix; a node's number is its row everywhere.
"""

from typing import TYPE_CHECKING, Any, Iterable, Optional, Sequence

import numpy as np
import torch

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.external_lm import ExternalLM
    from espnet_llm_plugin.transducer.scorer import TransducerScorer

ROOT = 0


class PrefixTree:
    """Trie of label prefixes with the predictor's data and the external LM's row of each.

    Both networks run in :meth:`children` only: one batch for the prefixes that are new, never
    again for a prefix that is known. Nothing here depends on a frame or on a scale, so a tree can
    be kept for further searches over the same utterance with other scales.

    Args:
        scorer: Supplies the opaque prefix data (``root``, ``extend``). ``None``: no predictor
            (CTC).
        num_labels: L; needed where there is no scorer.
        external_lm: Language model whose rows (L,) are kept beside the predictor's data.
        max_prefixes: :meth:`release` frees what no live hypothesis reaches once there are more
            prefixes than this. ``None`` keeps everything. A freed prefix that comes back is
            computed again.
    """

    def __init__(
        self,
        scorer: Optional["TransducerScorer"],
        num_labels: Optional[int] = None,
        external_lm: Optional["ExternalLM"] = None,
        max_prefixes: Optional[int] = None,
    ):
        self.scorer = scorer
        self.num_labels = scorer.num_labels if scorer is not None else num_labels
        self.external_lm = external_lm
        self.max_prefixes = max_prefixes
        self._child: dict[int, int] = {}
        self._free: list[int] = []
        self._data: list[Any] = [scorer.root() if scorer is not None else None]
        self._states: list[Any] = [None]
        self.parent = np.full(64, -1, dtype=np.int64)
        self.label = np.full(64, -1, dtype=np.int64)
        # Sums of log-probs along the prefix, without scales: predictor's LM and external LM.
        self.lm_sum = np.zeros(64)
        self.external_sum = np.zeros(64)
        self._rows: Optional[torch.Tensor] = None
        if external_lm is not None:
            row, state = external_lm.start()
            self._rows = row.new_zeros(64, row.numel())
            self._rows[ROOT] = row
            self._states[ROOT] = state

    def __len__(self) -> int:
        return len(self._data) - len(self._free)

    def children(
        self, parents: Sequence[int], labels: Sequence[int], lm_scores: Sequence[float]
    ) -> list[int]:
        """Node of each (parent, label); the new ones are computed together.

        Args:
            parents: Node numbers (N).
            labels: Labels in [0, L) (N).
            lm_scores: Predictor's LM log-prob of each label after its parent (N); kept for new
                nodes.
        """
        nodes, new_parents, new_labels, new_nodes = [], [], [], []
        for parent, label, lm_score in zip(parents, labels, lm_scores):
            key = parent * self.num_labels + label
            node = self._child.get(key)
            if node is None:
                node = self._free.pop() if self._free else len(self._data)
                if node == len(self._data):
                    self._data.append(None)
                    self._states.append(None)
                    self._grow(node)
                self._child[key] = node
                self.parent[node], self.label[node] = parent, label
                self.lm_sum[node] = self.lm_sum[parent] + lm_score
                new_parents.append(parent)
                new_labels.append(label)
                new_nodes.append(node)
            nodes.append(node)
        if new_nodes:
            self._compute(new_nodes, new_parents, new_labels)
        return nodes

    def _compute(self, nodes: list[int], parents: list[int], labels: list[int]) -> None:
        if self.scorer is not None:
            extended = self.scorer.extend([self._data[p] for p in parents], labels)
            for node, data in zip(nodes, extended):
                self._data[node] = data
        if self.external_lm is not None:
            scores = self._rows[torch.tensor(parents), torch.tensor(labels)].double()
            self.external_sum[nodes] = self.external_sum[parents] + scores.cpu().numpy()
            rows, states = self.external_lm.extend(labels, [self._states[p] for p in parents])
            self._rows[torch.tensor(nodes)] = rows
            for node, state in zip(nodes, states):
                self._states[node] = state

    def _grow(self, node: int) -> None:
        size = len(self.parent)
        if node < size:
            return
        for name in ("parent", "label", "lm_sum", "external_sum"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        if self._rows is not None:
            self._rows = torch.cat([self._rows, torch.zeros_like(self._rows)])

    def data(self, nodes: Iterable[int]) -> list[Any]:
        """The scorer's opaque data of some nodes."""
        return [self._data[node] for node in nodes]

    def external_rows(self, nodes: np.ndarray) -> torch.Tensor:
        """External LM log-probs of every label after some nodes: (N, L)."""
        return self._rows[torch.from_numpy(nodes)]

    def labels_of(self, node: int) -> list[int]:
        """The labels of a prefix, first to last."""
        labels = []
        while node != ROOT:
            labels.append(int(self.label[node]))
            node = int(self.parent[node])
        return labels[::-1]

    def release(self, live: np.ndarray) -> None:
        """Free the prefixes that are neither live nor the beginning of a live one.

        Does nothing while there are at most ``max_prefixes``.

        Args:
            live: Nodes, any shape; -1 stands for none.
        """
        if self.max_prefixes is None or len(self) <= self.max_prefixes:
            return
        keep = {ROOT}
        for node in live[live >= 0].tolist():
            while node not in keep:
                keep.add(node)
                node = int(self.parent[node])
        for key, node in list(self._child.items()):
            if node not in keep:
                del self._child[key]
                self._data[node] = self._states[node] = None
                self._free.append(node)
