"""Live hypotheses of a search as arrays: merged, extended, pruned.

R rows (a row is a scale setting of an utterance), N hypotheses of a row, K extensions of a row.
"""

from dataclasses import dataclass

import numpy as np

from espnet_llm_plugin.transducer.hypothesis import SearchError
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree


@dataclass
class Beam:
    """Hypotheses; empty places have node -1 and score -inf. All arrays are (R, N).

    Attributes:
        node: Prefix.
        score: Log of the sum over alignments, float64.
        viterbi: Score of the best single alignment.
        blank: What blanks contribute to it (NaN where this is not followed).
        path: Its emissions, an index into :class:`Emissions`.
        late: What delayed fusion has added to the scores so far. It belongs to the prefix: an
            alignment that flows into a hypothesis takes the hypothesis' instead of its own.
    """

    node: np.ndarray
    score: np.ndarray
    viterbi: np.ndarray
    blank: np.ndarray
    path: np.ndarray
    late: np.ndarray

    @classmethod
    def start(cls, rows: int) -> "Beam":
        """The empty prefix, probability 1."""
        zero, index = np.zeros((rows, 1)), np.zeros((rows, 1), dtype=np.int64)
        return cls(index + ROOT, zero, zero.copy(), zero.copy(), index, zero.copy())

    @classmethod
    def empty(cls, rows: int, width: int) -> "Beam":
        """Only empty places."""
        score = np.full((rows, width), -np.inf)
        index = np.full((rows, width), -1, dtype=np.int64)
        zero = np.zeros_like(score)
        return cls(index, score, score.copy(), zero, np.zeros_like(index), zero.copy())

    @classmethod
    def join(cls, parts: list[tuple[np.ndarray, "Beam"]]) -> "Beam":
        """Beams of disjoint sets of rows (their numbers and the beams) as one."""
        rows = sum(len(numbers) for numbers, _ in parts)
        whole = cls.empty(rows, max((beam.node.shape[1] for _, beam in parts), default=1))
        for numbers, beam in parts:
            for name, array in vars(beam).items():
                getattr(whole, name)[numbers, : array.shape[1]] = array
        return whole

    def plus_blank(self, added: np.ndarray) -> "Beam":
        """After a blank of log-prob (R, N); shares no array with this beam."""
        return Beam(
            self.node.copy(),
            self.score + added,
            self.viterbi + added,
            self.blank + added,
            self.path.copy(),
            self.late.copy(),
        )

    def rows(self, numbers: np.ndarray) -> "Beam":
        """Some of the rows."""
        return Beam(*(array[numbers] for array in vars(self).values()))

    def drop(self, places: np.ndarray) -> None:
        """Empty the places (R, N) that are True."""
        self.node = np.where(places, -1, self.node)
        self.score[places] = -np.inf

    def merge(self, other: "Beam") -> "Beam":
        """Both together, prefixes found in both as one hypothesis; neither may repeat a prefix.

        ``self`` and ``other`` are used up.
        """
        same = (self.node[:, :, None] == other.node[:, None, :]) & (other.node[:, None, :] >= 0)
        if same.any():
            r, mine, theirs = np.nonzero(same)
            # One prefix, one delayed score: that of the hypothesis that is there already.
            late = self.late[r, mine] - other.late[r, theirs]
            score, viterbi = other.score[r, theirs] + late, other.viterbi[r, theirs] + late
            self.score[r, mine] = np.logaddexp(self.score[r, mine], score)
            better = viterbi > self.viterbi[r, mine]
            self.viterbi[r[better], mine[better]] = viterbi[better]
            r, mine, theirs = r[better], mine[better], theirs[better]
            for name in ("blank", "path"):
                getattr(self, name)[r, mine] = getattr(other, name)[r, theirs]
            other.drop(same.any(axis=1))
        both = zip(vars(self).values(), vars(other).values())
        return Beam(*(np.concatenate(arrays, axis=1) for arrays in both))

    def add_late(self, added: np.ndarray) -> None:
        """Delayed scores (R, N) of the hypotheses."""
        self.score = self.score + added
        self.viterbi = self.viterbi + added
        self.late = self.late + added

    def take(self, order: np.ndarray) -> "Beam":
        """The places (R, K) of each row."""
        rows = np.arange(len(order))[:, None]
        return Beam(*(array[rows, order] for array in vars(self).values()))

    def best(self, size: int) -> "Beam":
        """The ``size`` best of each row, best first, no wider than needed."""
        size = min(size, int((self.node >= 0).sum(axis=1).max(initial=1)))
        return self.take(np.argsort(-self.score, axis=1, kind="stable")[:, :size])


class LivePairs:
    """Live hypotheses that are another live one plus a label: P pairs, all arrays (P).

    Attributes:
        row: In [0, R).
        child: Place of the longer hypothesis, in [0, N).
        parent: Place of the shorter one.
        label: The label between them.
    """

    def __init__(self, node: np.ndarray, tree: PrefixTree):
        # The empty prefix and empty places have no parent in a beam.
        above = np.where(node > ROOT, tree.parent[node], -2)
        self.row, self.child, self.parent = np.nonzero(above[:, :, None] == node[:, None, :])
        self.label = tree.label[node[self.row, self.child]]

    def __len__(self) -> int:
        return len(self.label)

    def only(self, which: np.ndarray) -> "LivePairs":
        """Some of the pairs."""
        some = object.__new__(LivePairs)
        vars(some).update({name: array[which] for name, array in vars(self).items()})
        return some


class Emissions:
    """Frames of the labels of alignments, as linked lists in two growing arrays.

    Index 0 stands for no emission. Entries are never changed, so that states of a search may share
    the object.
    """

    def __init__(self) -> None:
        self._before = np.zeros(256, dtype=np.int64)
        self._frame = np.zeros(256, dtype=np.int64)
        self._size = 1

    def add(self, before: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """New emissions (M): their indices."""
        first, self._size = self._size, self._size + len(before)
        while self._size > len(self._frame):
            self._before = np.concatenate([self._before, np.zeros_like(self._before)])
            self._frame = np.concatenate([self._frame, np.zeros_like(self._frame)])
        self._before[first : self._size] = before
        self._frame[first : self._size] = frame
        return np.arange(first, self._size)

    def frames(self, path: int) -> tuple[int, ...]:
        """Frames of an emission and of those before it."""
        frames = []
        while path:
            frames.append(int(self._frame[path]))
            path = int(self._before[path])
        return tuple(reversed(frames))


@dataclass
class Extensions:
    """Hypotheses plus a label, best first; empty places have score -inf. All arrays are (R, K).

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

    @classmethod
    def best(
        cls,
        rows: int,
        size: int,
        row: np.ndarray,
        place: np.ndarray,
        label: np.ndarray,
        score: np.ndarray,
        added: np.ndarray,
    ) -> "Extensions":
        """The ``size`` best of each of ``rows`` rows, from candidates in any order (C)."""
        order = np.lexsort((-score, row))
        row = row[order]
        first = np.searchsorted(row, np.arange(rows))
        column = np.arange(len(row)) - first[row]
        keep = column < size
        row, column, order = row[keep], column[keep], order[keep]
        width = int(column.max(initial=-1)) + 1
        found = cls(
            np.full((rows, width), -np.inf),
            np.zeros((rows, width)),
            np.zeros((rows, width), dtype=np.int64),
            np.zeros((rows, width), dtype=np.int64),
        )
        candidates = dict(score=score, added=added, place=place, label=label)
        for name, values in candidates.items():
            getattr(found, name)[row, column] = values[order]
        return found


def kth_best(scores: np.ndarray, k: int) -> np.ndarray:
    """The ``k``-th highest of each row (R, N), -inf where there are fewer: (R,)."""
    if scores.shape[1] < k:
        return np.full(len(scores), -np.inf)
    if scores.shape[1] == k:
        return scores.min(axis=1)
    return np.partition(scores, -k, axis=1)[:, -k]


def check_scores(scores: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """``scores`` (E, ...) of frames (E) unless one is NaN or +inf.

    Raises:
        SearchError: One is.
    """
    good = scores < np.inf
    if not good.all():
        at = frame[np.nonzero(~good)[0][0]]
        raise SearchError(f"scores at encoder frame {at} are not finite numbers")
    return scores
