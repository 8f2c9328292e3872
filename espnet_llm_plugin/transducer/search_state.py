"""What a search knows between two chunks, and its n-best lists.

B utterances, G scale settings of each, R = B G rows (row = utterance * G + setting).
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.transducer.beam import Beam, Emissions, LivePairs
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.delayed import Fusion


@dataclass
class SearchState:
    """A search between two chunks. A step makes a new state and leaves the old one usable.

    Attributes:
        tree: Prefixes of the batch.
        scales: The G settings.
        beam: Live hypotheses of R rows.
        frame: Frames searched so far of each utterance (B,).
        emissions: Of the hypotheses.
        extra: What a search keeps besides.
        fusion: How an external LM and a prior are combined with the search, if not at labels alone.
        fused: Words of each row's shortest hypothesis when delayed scores were last added (R,).
    """

    tree: PrefixTree
    scales: tuple[Scales, ...]
    beam: Beam
    frame: np.ndarray
    emissions: Emissions = field(default_factory=Emissions)
    extra: Any = None
    fusion: Optional["Fusion"] = None
    fused: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _pairs_of: Optional[np.ndarray] = None
    _pairs: Optional[LivePairs] = None

    @classmethod
    def start(
        cls,
        tree: PrefixTree,
        scales: Sequence[Scales],
        utterances: int,
        fusion: Optional["Fusion"] = None,
    ) -> "SearchState":
        """Before the first frame."""
        rows = utterances * len(scales)
        frame, fused = np.zeros(utterances, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        beam = Beam.start(rows)
        return cls(tree, tuple(scales), beam, frame, fusion=fusion, fused=fused)

    def copy(self) -> "SearchState":
        """A state that can go on without changing this one."""
        return replace(self, frame=self.frame.copy(), fused=self.fused.copy())

    def live_pairs(self) -> LivePairs:
        """Of the beam; kept while its prefixes stay the same, as in most frames."""
        if self._pairs_of is not self.beam.node:
            self._pairs_of, self._pairs = self.beam.node, LivePairs(self.beam.node, self.tree)
        return self._pairs

    def nbest(self, nbest: int = 1, normalize_length: bool = False) -> list[list[Hypothesis]]:
        """The best live hypotheses of every row, best first.

        Args:
            nbest: At most this many of each row.
            normalize_length: Rank by the score per symbol.
        """
        lists = []
        score = self._final()
        for row in range(len(self.beam.node)):
            scales = self.scales[row % len(self.scales)]
            order = self._ranked(row, score[row], normalize_length)
            lists.append([self._hypothesis(row, n, score, scales) for n in order[:nbest]])
        return lists

    @torch.inference_mode()
    def _final(self) -> np.ndarray:
        """Scores (R, N) if no frame comes any more."""
        if self.fusion is None:
            return self.beam.score
        return self.beam.score + self.fusion.final(self.tree, self.beam, self.scales)

    def best(
        self, row: int = 0, normalize_length: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Labels and emission frames of a row's best hypothesis, without the cost of its scores."""
        n = self._ranked(row, self.beam.score[row], normalize_length)[0]
        labels = self.tree.labels_of(int(self.beam.node[row, n]))
        return tuple(labels), self.emissions.frames(int(self.beam.path[row, n]))

    def num_stable(self, row: int = 0) -> int:
        """How many labels all hypotheses of a row have in common: no later frame changes these."""
        nodes = self.beam.node[row]
        live = set(nodes[nodes >= 0].tolist())
        while len(live) > 1:
            deepest = max(live, key=lambda node: self.tree.depth(node))
            live.remove(deepest)
            live.add(int(self.tree.parent[deepest]))
        return int(self.tree.depth(live.pop()))

    def _ranked(self, row: int, rank: np.ndarray, normalize_length: bool) -> list[int]:
        """Places of the live hypotheses of a row, best first, by scores (N,)."""
        nodes = self.beam.node[row]
        if normalize_length:
            rank = rank / (self.tree.depth(nodes) + 1)
        return [int(n) for n in np.argsort(-rank, kind="stable") if nodes[n] >= 0]

    @torch.inference_mode()
    def _hypothesis(self, row: int, n: int, score: np.ndarray, scales: Scales) -> Hypothesis:
        node = int(self.beam.node[row, n])
        labels = tuple(self.tree.labels_of(node))
        total, blank = float(score[row, n]), float(self.beam.blank[row, n])
        lm = scales.beta * self.tree.lm_sum(node) if scales.beta else 0.0
        external = prior = 0.0
        if self.fusion is not None:
            external, prior = self.fusion.parts(self.tree, node, scales)
        elif scales.lm_weight:
            external = scales.lm_weight * self.tree.external_sum(node)
        bonus = scales.label_bonus * len(labels)
        return Hypothesis(
            labels=labels,
            total=total,
            acoustic=total - lm - external - bonus - prior,
            lm=lm,
            external_lm=external,
            bonus=bonus,
            frames=self.emissions.frames(int(self.beam.path[row, n])),
            blank=None if np.isnan(blank) else blank,
            prior=prior,
        )


class RowScales:
    """The scales of every row, and the label totals they give.

    Args:
        scales: The G settings, without what delayed fusion adds later.
        utterances: B.
        alpha: Of settings that give none.
        forbidden_labels: Labels that are never emitted.
    """

    def __init__(
        self,
        scales: Sequence[Scales],
        utterances: int,
        alpha: float = 0.0,
        forbidden_labels: Sequence[int] = (),
    ):
        def column(name: str) -> np.ndarray:
            return np.tile([float(getattr(s, name)) for s in scales], utterances)

        scales = [s if s.alpha is not None else replace(s, alpha=alpha) for s in scales]
        self.alpha, self.beta, self.lm_weight = map(column, ("alpha", "beta", "lm_weight"))
        self.prior_weight = column("prior_weight")
        self.bonus, self.blank_scale = column("label_bonus"), column("blank_scale")
        self.utterance = np.repeat(np.arange(utterances), len(scales))
        # Rows with one key have the same cells: LM scales outside the softmax do not matter.
        distinct, index = np.unique(self.alpha, return_inverse=True)
        self.cell_key = self.utterance * len(distinct) + index
        self.uses_beta = bool(self.beta.any())
        self.uses_external = bool(self.lm_weight.any())
        self._uses_bonus = bool(self.bonus.any())
        self._forbidden = torch.tensor(list(forbidden_labels), dtype=torch.long)
        # What LMs and bonus can add to a label at most: log-probs are not positive.
        self.most_added = np.where((self.beta < 0) | (self.lm_weight < 0), np.inf, self.bonus)

    def totals(
        self, labels: torch.Tensor, rows: np.ndarray, nodes: np.ndarray, tree: PrefixTree
    ) -> torch.Tensor:
        """Totals of the labels after E hypotheses.

        Args:
            labels: log P(label) (E, L); changed in place and returned.
            rows: In [0, R) (E).
            nodes: Prefixes (E), with predictor and external LM computed.
            tree: Of the prefixes.
        """
        if len(self._forbidden):
            labels.index_fill_(1, self._forbidden.to(labels.device), -torch.inf)
        if self.uses_beta:
            _add(labels, self.beta[rows], tree.pool.lm(nodes))
        if self.uses_external:
            _add(labels, self.lm_weight[rows], tree.external_rows(nodes))
        if self._uses_bonus:
            _add(labels, self.bonus[rows])
        return labels


def _add(labels: torch.Tensor, weights: np.ndarray, scores: Optional[torch.Tensor] = None) -> None:
    """``labels`` (E, L) += ``weights`` (E) times ``scores`` (E, L), or times 1."""
    if (weights == weights[0]).all():  # as in all searches with one setting
        weight = float(weights[0])
        labels.add_(weight) if scores is None else labels.add_(scores, alpha=weight)
        return
    column = torch.from_numpy(weights).to(labels)[:, None]
    labels.add_(column) if scores is None else labels.addcmul_(scores, column)
