"""Alignment of a hypothesis with its reference by the rules of NIST's sclite.

sclite minimises ``4 * substitutions + 3 * deletions + 3 * insertions``; the Levenshtein distance
(jiwer) minimises their plain sum. Both mostly find the same number of errors, but split it
differently into the three kinds, and sclite's number can be larger, never smaller. Published
error rates are sclite's, so its rules are followed here; ``wer.py`` reports jiwer's beside them.

Dimensions: N = reference tokens, M = hypothesis tokens.
"""

from typing import NamedTuple, Sequence

import numpy as np

CORRECT, SUBSTITUTION, DELETION, INSERTION = "C", "S", "D", "I"

SUBSTITUTION_COST = 4
GAP_COST = 3  # a deletion or an insertion

_DIAGONAL, _UP, _LEFT = 0, 1, 2


class Counts(NamedTuple):
    """Numbers of tokens by kind, in sclite's order."""

    correct: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def words(self) -> int:
        """Tokens of the reference."""
        return self.correct + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> str:
    """Align two token sequences as sclite does.

    Args:
        reference: N tokens.
        hypothesis: M tokens; tokens are compared for equality (fold the case beforehand).

    Returns:
        One letter per step of the alignment: ``C`` and ``S`` use a token of both sequences,
        ``D`` one of the reference, ``I`` one of the hypothesis.

    Among alignments of equal cost sclite takes, from the last token backwards, a pair of tokens
    before a gap and an insertion before a deletion; the counts depend on it (three substitutions
    cost as much as two deletions and two insertions), so it is reproduced exactly.
    """
    # A common ending is always paired: the diagonal step costs nothing and wins every tie.
    common = 0
    for ref_token, hyp_token in zip(reversed(reference), reversed(hypothesis)):
        if ref_token != hyp_token:
            break
        common += 1
    rows, columns = len(reference) - common, len(hypothesis) - common
    if rows == 0 or columns == 0:
        return DELETION * rows + INSERTION * columns + CORRECT * common

    ids: dict[str, int] = {}
    ref = [ids.setdefault(token, len(ids)) for token in reference[:rows]]
    hyp = np.array([ids.setdefault(token, len(ids)) for token in hypothesis[:columns]])
    moves = _fill(ref, hyp)

    # Trace back.
    steps = []
    row, column = rows, columns
    while row > 0 or column > 0:
        move = moves[row, column]
        if move == _DIAGONAL:
            row, column = row - 1, column - 1
            steps.append(CORRECT if ref[row] == hyp[column] else SUBSTITUTION)
        elif move == _UP:
            row -= 1
            steps.append(DELETION)
        else:
            column -= 1
            steps.append(INSERTION)
    return "".join(reversed(steps)) + CORRECT * common


def _fill(ref: Sequence[int], hyp: np.ndarray) -> np.ndarray:
    """Fill the table of alignment costs row by row; return the best move into each cell.

    Args:
        ref: N token numbers.
        hyp: (M,) token numbers.

    Returns:
        (N + 1, M + 1) uint8 moves.
    """
    rows, columns = len(ref), len(hyp)
    moves = np.empty((rows + 1, columns + 1), dtype=np.uint8)
    moves[0, :] = _LEFT
    moves[:, 0] = _UP
    gaps = GAP_COST * np.arange(columns + 1)
    above = gaps
    for row in range(1, rows + 1):
        pair = above[:-1] + np.where(hyp == ref[row - 1], 0, SUBSTITUTION_COST)
        deletion = above[1:] + GAP_COST
        best = np.empty(columns + 1, dtype=above.dtype)
        best[0] = GAP_COST * row
        np.minimum(pair, deletion, out=best[1:])
        # Insertions, the recursion within the row: cost[m] = min_k<=m best[k] + 3 (m - k).
        cost = np.minimum.accumulate(best - gaps) + gaps
        insertion = cost[:-1] + GAP_COST
        moves[row, 1:] = np.where(
            pair <= np.minimum(deletion, insertion),
            _DIAGONAL,
            np.where(deletion < insertion, _UP, _LEFT),
        )
        above = cost
    return moves


def count(steps: str) -> Counts:
    """Count the steps of an alignment by kind."""
    return Counts(*(steps.count(kind) for kind in (CORRECT, SUBSTITUTION, DELETION, INSERTION)))


def pairs(
    steps: str, reference: Sequence[str], hypothesis: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Expand an alignment to ``(kind, reference token, hypothesis token)``; a gap is ``""``."""
    ref, hyp = iter(reference), iter(hypothesis)
    return [
        (kind, "" if kind == INSERTION else next(ref), "" if kind == DELETION else next(hyp))
        for kind in steps
    ]
