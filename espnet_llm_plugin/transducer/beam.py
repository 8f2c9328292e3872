"""What the searches share: scales, hypotheses, beams of several scale settings, n-best lists.

G scale settings searched side by side (1 when decoding, many when tuning), N hypotheses of a
setting, K extensions of a setting, M distinct prefixes among the settings, L labels.
"""

from dataclasses import dataclass, field
from typing import Any, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree


class SearchError(RuntimeError):
    """The scores of an utterance are not numbers."""


@dataclass(frozen=True)
class Scales:
    """Weights of the parts of a label's score.

    Attributes:
        alpha: Scale of the predictor's LM inside the label softmax; ``None`` leaves the scorer's.
        beta: Scale of the predictor's LM outside of it.
        lm_weight: Scale of the external LM.
        label_bonus: Added to every label.
    """

    alpha: Optional[float] = None
    beta: float = 0.0
    lm_weight: float = 0.0
    label_bonus: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence. ``total = acoustic + lm + external_lm + bonus``; the parts are weighted.

    Attributes:
        labels: Labels in [0, L); token id = label + 1.
        total: Score of the search (natural log).
        acoustic: Log of the sum over the alignments, without the additive LM scores and the bonus.
        lm: ``beta`` times the predictor's LM log-prob of the sequence.
        external_lm: ``lm_weight`` times the external LM's.
        bonus: ``label_bonus`` times the number of labels.
        frames: Encoder frame at which the best alignment emits each label.
    """

    labels: tuple[int, ...]
    total: float
    acoustic: float
    lm: float
    external_lm: float
    bonus: float
    frames: tuple[int, ...]

    @property
    def normalized(self) -> float:
        """Total per symbol; the end counts as one, as in ESPnet's transducer search."""
        return self.total / (len(self.labels) + 1)


@dataclass
class Beam:
    """Hypotheses of G settings; empty places have node -1 and score -inf.

    Attributes:
        node: Prefix (G, N).
        score: Log of the sum over alignments (G, N), float64.
        viterbi: Score of the best single alignment (G, N).
        path: Its emissions, as an index of ``SearchState.emissions`` (G, N).
    """

    node: np.ndarray
    score: np.ndarray
    viterbi: np.ndarray
    path: np.ndarray

    @classmethod
    def start(cls, settings: int) -> "Beam":
        """The empty prefix, probability 1."""
        score, index = np.zeros((settings, 1)), np.zeros((settings, 1), dtype=np.int64)
        return cls(index + ROOT, score, score.copy(), index)

    @classmethod
    def empty(cls, settings: int, width: int) -> "Beam":
        """Only empty places."""
        score = np.full((settings, width), -np.inf)
        index = np.full((settings, width), -1, dtype=np.int64)
        return cls(index, score, score.copy(), np.zeros_like(index))

    def plus(self, added: np.ndarray) -> "Beam":
        """The same prefixes with (G, N) added to their scores; shares no array with this beam."""
        return Beam(self.node.copy(), self.score + added, self.viterbi + added, self.path.copy())

    def drop(self, places: np.ndarray) -> None:
        """Empty the places (G, N) that are True."""
        self.node = np.where(places, -1, self.node)
        self.score[places] = -np.inf

    def merge(self, other: "Beam") -> "Beam":
        """Both together, prefixes found in both as one hypothesis; neither may repeat a prefix.

        ``self`` and ``other`` are used up.
        """
        same = (self.node[:, :, None] == other.node[:, None, :]) & (other.node[:, None, :] >= 0)
        if same.any():
            g, mine, theirs = np.nonzero(same)
            self.score[g, mine] = np.logaddexp(self.score[g, mine], other.score[g, theirs])
            better = other.viterbi[g, theirs] > self.viterbi[g, mine]
            g, mine, theirs = g[better], mine[better], theirs[better]
            self.viterbi[g, mine] = other.viterbi[g, theirs]
            self.path[g, mine] = other.path[g, theirs]
            other.drop(same.any(axis=1))
        return Beam(
            *(
                np.concatenate([getattr(self, name), getattr(other, name)], axis=1)
                for name in ("node", "score", "viterbi", "path")
            )
        )

    def take(self, order: np.ndarray) -> "Beam":
        """The places (G, K) of each setting."""
        settings = np.arange(len(order))[:, None]
        return Beam(
            *(getattr(self, name)[settings, order] for name in ("node", "score", "viterbi", "path"))
        )

    def best(self, size: int) -> "Beam":
        """The ``size`` best of each setting, best first, no wider than needed."""
        size = min(size, int((self.node >= 0).sum(axis=1).max()))
        return self.take(np.argsort(-self.score, axis=1, kind="stable")[:, :size])


class LivePairs:
    """Live hypotheses that are another live one plus a label: P pairs, all arrays (P).

    Attributes:
        setting: In [0, G).
        child: Place of the longer hypothesis, in [0, N).
        parent: Place of the shorter one.
        label: The label between them.
    """

    def __init__(self, node: np.ndarray, tree: PrefixTree):
        # The empty prefix and empty places have no parent in a beam.
        above = np.where(node > ROOT, tree.parent[node], -2)
        self.setting, self.child, self.parent = np.nonzero(above[:, :, None] == node[:, None, :])
        self.label = tree.label[node[self.setting, self.child]]

    def __len__(self) -> int:
        return len(self.label)


@dataclass
class SearchState:
    """What a search knows between two chunks of one utterance.

    Attributes:
        tree: Prefixes of the utterance.
        scales: The G settings.
        beam: Live hypotheses.
        frame: Frames searched so far.
        emissions: (index of the emission before, frame); entry 0 stands for none.
        extra: What a search keeps besides.
    """

    tree: PrefixTree
    scales: tuple[Scales, ...]
    beam: Beam
    frame: int = 0
    emissions: list[tuple[int, int]] = field(default_factory=lambda: [(0, -1)])
    extra: Any = None
    _pairs_of: Optional[np.ndarray] = None
    _pairs: Optional[LivePairs] = None

    def live_pairs(self) -> LivePairs:
        """Of the beam; kept while its prefixes stay the same, as in most frames."""
        if self._pairs_of is not self.beam.node:
            self._pairs_of, self._pairs = self.beam.node, LivePairs(self.beam.node, self.tree)
        return self._pairs

    def emit(self, path: np.ndarray, frame: int) -> np.ndarray:
        """Indices of new emissions at ``frame``, one after each of ``path`` (N)."""
        first = len(self.emissions)
        self.emissions.extend((before, frame) for before in path.tolist())
        return np.arange(first, len(self.emissions))

    def frames(self, path: int) -> tuple[int, ...]:
        """Frames of an emission and of those before it."""
        frames = []
        while path:
            path, frame = self.emissions[path]
            frames.append(frame)
        return tuple(reversed(frames))

    def nbest(self, nbest: int = 1, normalize_length: bool = False) -> list[list[Hypothesis]]:
        """The best live hypotheses of every setting, best first.

        Args:
            nbest: At most this many of each setting.
            normalize_length: Rank by the score per symbol.
        """
        lists = []
        for g, scales in enumerate(self.scales):
            alive = np.nonzero(self.beam.node[g] >= 0)[0]
            found = [self._hypothesis(g, int(n), scales) for n in alive]
            found.sort(key=lambda h: -(h.normalized if normalize_length else h.total))
            lists.append(found[:nbest])
        return lists

    def _hypothesis(self, g: int, n: int, scales: Scales) -> Hypothesis:
        node = int(self.beam.node[g, n])
        labels = tuple(self.tree.labels_of(node))
        total = float(self.beam.score[g, n])
        lm = scales.beta * float(self.tree.lm_sum[node]) if scales.beta else 0.0
        external = (
            scales.lm_weight * float(self.tree.external_sum[node]) if scales.lm_weight else 0.0
        )
        bonus = scales.label_bonus * len(labels)
        return Hypothesis(
            labels=labels,
            total=total,
            acoustic=total - lm - external - bonus,
            lm=lm,
            external_lm=external,
            bonus=bonus,
            frames=self.frames(int(self.beam.path[g, n])),
        )


class ScaledScores:
    """Adds the LM scores and the bonus of G settings to label log-probs."""

    def __init__(self, scales: Sequence[Scales], forbidden_labels: Sequence[int] = ()):
        self.num_settings = len(scales)
        self.beta = torch.tensor([s.beta for s in scales], dtype=torch.float32)
        self.lm_weight = torch.tensor([s.lm_weight for s in scales], dtype=torch.float32)
        self.bonus = torch.tensor([s.label_bonus for s in scales], dtype=torch.float32)
        self.uses_beta = bool(self.beta.any())
        self.uses_external = bool(self.lm_weight.any())
        self.uses_bonus = bool(self.bonus.any())
        self.forbidden = torch.tensor(list(forbidden_labels), dtype=torch.long)

    def total(
        self,
        labels: torch.Tensor,
        lm: Optional[torch.Tensor],
        external: Optional[torch.Tensor],
        settings: np.ndarray,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """Total label scores (R, N, L) of R settings.

        Args:
            labels: Label log-probs (M, L).
            lm: Predictor's LM log-probs (M, L), finite; used if a setting has a ``beta``.
            external: External LM's log-probs (M, L); used if a setting has an ``lm_weight``.
            settings: The settings, as numbers (R).
            index: Prefix of each hypothesis, in [0, M) (R, N).
        """
        if len(self.forbidden):
            labels = labels.index_fill(1, self.forbidden.to(labels.device), -torch.inf)
        if self.num_settings == 1:
            # One setting: its prefixes are distinct and already in order.
            if self.uses_beta:
                labels = torch.add(labels, lm, alpha=float(self.beta[0]))
            if self.uses_external:
                labels = torch.add(labels, external, alpha=float(self.lm_weight[0]))
            return (labels + float(self.bonus[0]) if self.uses_bonus else labels)[None]
        rows = torch.from_numpy(settings)
        total = labels[index]
        if self.uses_beta:
            total.addcmul_(lm[index], self.beta[rows].to(total)[:, None, None])
        if self.uses_external:
            total.addcmul_(external[index], self.lm_weight[rows].to(total)[:, None, None])
        if self.uses_bonus:
            total += self.bonus[rows].to(total)[:, None, None]
        return total


@dataclass
class PrefixRows:
    """A row of label scores for each hypothesis, kept once for hypotheses that share it.

    Attributes:
        rows: (M, L).
        index: Row of each hypothesis (G, N).
    """

    rows: torch.Tensor
    index: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["PrefixRows"], order: np.ndarray) -> "PrefixRows":
        """Parts of different settings, together in another order of the settings (G)."""
        first = np.cumsum([0, *(len(part.rows) for part in parts)])
        index = np.concatenate([part.index + offset for part, offset in zip(parts, first)])
        return cls(torch.cat([part.rows for part in parts]), index[order])

    def at(self, settings: np.ndarray, place: np.ndarray, label: np.ndarray) -> list[float]:
        """Scores of labels after hypotheses (all arguments (P))."""
        row = torch.from_numpy(self.index[settings, place])
        return self.rows[row, torch.from_numpy(label)].tolist()


@dataclass
class Extensions:
    """The K best (hypothesis, label) of every setting, all (G, K).

    Attributes:
        score: Total after the label.
        added: What the label added to the hypothesis.
        place: Hypothesis, in [0, N).
        label: Label.
    """

    score: np.ndarray
    added: np.ndarray
    place: np.ndarray
    label: np.ndarray


def best_extensions(score: np.ndarray, labels: torch.Tensor, size: int) -> Extensions:
    """The ``size`` best sums of a hypothesis' score (G, N) and a label's (G, N, L), best first."""
    num_labels = labels.size(2)
    # Totals of long utterances are large: compare in float32 relative to the best.
    best = score.max(axis=1, keepdims=True)
    best[best == -np.inf] = 0.0
    relative = torch.from_numpy(score - best).to(labels)
    both = (labels + relative[:, :, None]).flatten(1)
    index = both.topk(min(size, both.size(1)), dim=1).indices
    added = labels.flatten(1).gather(1, index).double().cpu().numpy()
    place, label = np.divmod(index.cpu().numpy(), num_labels)
    settings = np.arange(len(score))[:, None]
    return Extensions(score[settings, place] + added, added, place, label)


def extend_beam(
    beam: Beam,
    found: Extensions,
    survive: np.ndarray,
    lm: Optional[PrefixRows],
    state: SearchState,
    frame: int,
) -> Beam:
    """The hypotheses (G, at most K) that the surviving extensions make.

    Args:
        beam: Hypotheses before the label (G, N).
        found: Extensions of them (G, K).
        survive: Which ones (G, K); only for these prefixes predictor and LM run.
        lm: Predictor's LM log-probs, or None.
        state: Gets the new prefixes and emissions.
        frame: Where they are emitted.
    """
    g, _ = np.nonzero(survive)
    place, label, added = found.place[survive], found.label[survive], found.added[survive]
    lm_scores = [0.0] * len(label) if lm is None else lm.at(g, place, label)
    nodes = state.tree.children(beam.node[g, place].tolist(), label.tolist(), lm_scores)
    column = (survive.cumsum(axis=1) - 1)[survive]
    new = Beam.empty(len(survive), int(column.max()) + 1)
    new.node[g, column] = nodes
    new.score[g, column] = found.score[survive]
    new.viterbi[g, column] = beam.viterbi[g, place] + added
    new.path[g, column] = state.emit(beam.path[g, place], frame)
    return new


def check_scores(scores: np.ndarray, frame: int) -> np.ndarray:
    """``scores`` unless one is NaN or +inf, which raises :class:`SearchError`."""
    if not (scores < np.inf).all():
        raise SearchError(f"scores at encoder frame {frame} are not finite numbers")
    return scores
