"""The hypotheses of a CTC prefix search as arrays.

R rows (a row is a scale setting of an utterance), N hypotheses of a row, P pairs.

A prefix has two probabilities: its alignments so far end in a blank, or in its last label. In the
second case the same label again is a repetition, not a new label [Graves 2006; Hannun 2014].
"""

from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np

from espnet_llm_plugin.transducer.beam import Beam, LivePairs
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree

# How the probabilities of alignments of one prefix are combined.
RECOMBINATIONS: dict[str, Callable] = {"sum": np.logaddexp, "max": np.maximum}


@dataclass
class Endings:
    """One of the two kinds of alignments of the hypotheses of a beam, all (R, N).

    Attributes:
        score: Of all of them, combined.
        viterbi: Of the best of them.
        path: Its emissions.
    """

    score: np.ndarray
    viterbi: np.ndarray
    path: np.ndarray

    def take(self, *index: np.ndarray) -> "Endings":
        """What an index picks of each array."""
        return Endings(self.score[index], self.viterbi[index], self.path[index])

    def join(self, other: "Endings", combine: Callable) -> "Endings":
        """Alignments of either kind."""
        return Endings(
            combine(self.score, other.score),
            np.maximum(self.viterbi, other.viterbi),
            np.where(other.viterbi > self.viterbi, other.path, self.path),
        )

    def plus(self, added: np.ndarray) -> "Endings":
        """Scores plus (R, N) or (R, 1)."""
        return Endings(self.score + added, self.viterbi + added, self.path)


class Pairs:
    """Live hypotheses that are another live one plus a label; all arrays are (P,).

    Attributes:
        row, child, parent, label: See :class:`LivePairs`.
        itself: Whether the label is the parent's last one.
        keys: What tells (row, parent, label) from all others, sorted.
    """

    def __init__(self, node: np.ndarray, last: np.ndarray, tree: PrefixTree):
        pairs = LivePairs(node, tree)
        self.row, self.child, self.parent = pairs.row, pairs.child, pairs.parent
        self.label = pairs.label
        self.itself = self.label == last[self.row, self.parent]
        self._steps: Optional[np.ndarray] = None
        self.keys = np.sort(keys(self.row, self.parent, self.label, node.shape[1], tree.num_labels))

    def __len__(self) -> int:
        return len(self.label)

    def steps(self, tree: PrefixTree, node: np.ndarray) -> np.ndarray:
        """External LM's score of the label between them (P,); looked up once."""
        if self._steps is None:
            parents = node[self.row, self.parent]
            tree.need_external(parents)
            self._steps = tree.external_steps(parents, self.label)
        return self._steps


def keys(
    row: np.ndarray, place: np.ndarray, label: np.ndarray, width: int, num_labels: int
) -> np.ndarray:
    """One number for each (row, place, label)."""
    return (row * width + place) * num_labels + label


class CTCBeam:
    """Live hypotheses of R rows.

    Args:
        node: Prefixes (R, N); -1 where there is none.
        in_blank: Alignments that end in a blank.
        in_label: Those that end in the last label.
        late: What delayed fusion has added (R, N).
        tree: Of the prefixes.

    Attributes:
        last: Last labels, -1 of the empty prefix and of empty places.
    """

    def __init__(
        self,
        node: np.ndarray,
        in_blank: Endings,
        in_label: Endings,
        late: np.ndarray,
        tree: PrefixTree,
    ):
        self.node, self.in_blank, self.in_label, self.late = node, in_blank, in_label, late
        self.tree = tree
        self.last = np.where(node > ROOT, tree.label[node], -1)
        self.pairs = Pairs(node, self.last, tree)

    def rows(self, which: np.ndarray) -> "CTCBeam":
        """Some of the rows."""
        return CTCBeam(
            self.node[which],
            self.in_blank.take(which),
            self.in_label.take(which),
            self.late[which],
            self.tree,
        )

    def as_beam(self, combine: Callable) -> Beam:
        """With the scores of all alignments."""
        both = self.in_blank.join(self.in_label, combine)
        no_blank = np.full_like(both.score, np.nan)  # not followed
        return Beam(self.node, both.score, both.viterbi, no_blank, both.path, self.late)

    @classmethod
    def joined(cls, parts: list[tuple[np.ndarray, "CTCBeam"]]) -> "CTCBeam":
        """Beams of disjoint sets of rows (their numbers and the beams) as one."""
        if len(parts) == 1 and (np.diff(parts[0][0]) == 1).all():
            return parts[0][1]
        rows = sum(len(numbers) for numbers, _ in parts)
        width = max(beam.node.shape[1] for _, beam in parts)
        tree = parts[0][1].tree

        def whole(get: Callable[["CTCBeam"], np.ndarray], empty: float) -> np.ndarray:
            array = np.full((rows, width), empty, dtype=get(parts[0][1]).dtype)
            for numbers, beam in parts:
                array[numbers, : beam.node.shape[1]] = get(beam)
            return array

        def endings(name: str) -> Endings:
            return Endings(
                whole(lambda beam: getattr(beam, name).score, -np.inf),
                whole(lambda beam: getattr(beam, name).viterbi, -np.inf),
                whole(lambda beam: getattr(beam, name).path, 0),
            )

        node = whole(lambda beam: beam.node, -1)
        late = whole(lambda beam: beam.late, 0.0)
        return cls(node, endings("in_blank"), endings("in_label"), late, tree)
