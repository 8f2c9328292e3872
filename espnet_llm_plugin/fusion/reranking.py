"""Word errors at many scales from n-best lists, without a search.

The score of a hypothesis is a sum of parts that the scales weigh (Scales): kept unweighted, they
give the best of the list at every point of a grid. That is exact for the lists' hypotheses; what a
search at the point would find besides is not among them, so that the best points are to be
searched.

A alphas, N hypotheses of an utterance, P points of a grid.
"""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Callable, Iterable, Mapping, Optional, Sequence

import jiwer
import numpy as np

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.tuning import AnyScales, Point, axis_values
from espnet_llm_plugin.transducer.hypothesis import Scales


@dataclass(frozen=True)
class Candidate:
    """A hypothesis with the unweighted parts of its score, natural logarithms.

    Attributes:
        labels: Label sequence.
        text: Its words.
        acoustic: log P(labels | speech), all alignments summed, for each of A alphas.
        lm: (Internal) LM's log-prob.
        external_lm: External LM's.
        prior: Log prior of the labels.
    """

    labels: tuple[int, ...]
    text: str
    acoustic: tuple[float, ...]
    lm: float = 0.0
    external_lm: float = 0.0
    prior: float = 0.0

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


class Reranker:
    """The lists of a held-out set, which grow.

    Args:
        references: Transcripts by utterance; an utterance without hypotheses counts as empty.
        alphas: A distinct ones; [None] for models without predictor LM.
        normalize_length: Rank by the score per symbol.

    Raises:
        UserError: The references have no words.
    """

    def __init__(
        self,
        references: Mapping[str, str],
        alphas: Sequence[Optional[float]],
        normalize_length: bool = False,
    ):
        self.references = references
        self.alphas = list(alphas)
        self.normalize_length = normalize_length
        self.words = sum(len(reference.split()) for reference in references.values())
        if self.words == 0:
            raise UserError("the reference text has no words: scales cannot be tuned on it")
        self._candidates: dict[str, dict[tuple[int, ...], Candidate]] = {}
        self._errors: dict[str, list[tuple[int, int, int]]] = {}
        for utt in references:
            self._candidates[utt], self._errors[utt] = {}, []

    def add(self, utt: str, candidates: Iterable[Candidate]) -> None:
        """Add hypotheses to an utterance's list; known label sequences are passed over."""
        for candidate in candidates:
            if candidate.labels not in self._candidates[utt]:
                self._candidates[utt][candidate.labels] = candidate
                self._errors[utt].append(word_errors(self.references[utt], candidate.text))

    def candidates(self, utt: str) -> list[Candidate]:
        """The list of an utterance, in the order of arrival."""
        return list(self._candidates[utt].values())

    def known(self, utt: str) -> set[tuple[int, ...]]:
        """Label sequences of an utterance's list."""
        return set(self._candidates[utt])

    def points(self, grid: Sequence[Scales]) -> list[Point]:
        """Word errors at P points; of hypotheses with equal scores the first to arrive wins."""
        sums = np.zeros((len(grid), 3), dtype=np.int64)
        for utt in self.references:
            candidates = self.candidates(utt)
            if candidates:
                best = self._totals(candidates, grid).argmax(axis=1)
                sums += np.array(self._errors[utt])[best]
            else:
                sums += word_errors(self.references[utt], "")
        return [
            Point(scales, 100 * sum(errors) / self.words, *errors, self.words)
            for scales, errors in zip(grid, sums.tolist())
        ]

    def _totals(self, candidates: Sequence[Candidate], grid: Sequence[Scales]) -> np.ndarray:
        """Scores (P, N)."""
        acoustic = np.array([one.acoustic for one in candidates])  # (N, A)
        parts = np.array(
            [[one.lm, one.external_lm, len(one.labels), -one.prior] for one in candidates]
        )
        weights = np.array([[s.beta, s.lm_weight, s.label_bonus, s.prior_weight] for s in grid])
        alpha = [self.alphas.index(scales.alpha) for scales in grid]
        totals = acoustic.T[alpha] + weights @ parts.T
        return totals / (parts[:, 2] + 1) if self.normalize_length else totals


def word_errors(reference: str, hypothesis: str) -> tuple[int, int, int]:
    """Insertions, deletions and substitutions (jiwer's)."""
    if not reference.split():  # jiwer refuses it
        return len(hypothesis.split()), 0, 0
    found = jiwer.process_words(reference, hypothesis)
    return found.insertions, found.deletions, found.substitutions


def first_points(grid: Sequence[Scales]) -> list[Scales]:
    """Three points of a grid whose searches find different, plausible hypotheses.

    A scaled LM takes from the score of every label, and the bonus gives it back: they grow
    together, from as little LM outside the softmax (and as much inside) as there is to the
    reverse.
    """
    points = [Point(scales, 0.0, 0, 0, 0, 0) for scales in grid]
    axes = ("beta", "lm_weight", "label_bonus", "prior_weight")
    values = {axis: axis_values(points, axis) for axis in axes}
    alphas = list(dict.fromkeys(scales.alpha for scales in grid))
    if None not in alphas:
        alphas.sort(reverse=True)

    def at(share: float) -> Scales:
        def pick(ordered: list):
            return ordered[round(share * (len(ordered) - 1))]

        return Scales(alpha=pick(alphas), **{axis: pick(values[axis]) for axis in axes})

    return list(dict.fromkeys(at(share) for share in (0.0, 0.5, 1.0)))


def alternate(
    search: Callable[[list[AnyScales]], list[Point]],
    rerank: Callable[[], list[Point]],
    searched: dict[AnyScales, Point],
    rounds: int,
    number: int,
) -> list[Point]:
    """Search the points that the lists promise most of, as long as that helps.

    Lists flatter a point that was not searched: they lack what it alone would find. So promises
    are not waited for to end.

    Args:
        search: Word errors of points by searching them, which lengthens the lists.
        rerank: Word errors of all points on the lists.
        searched: What is searched already, by scales; it is added to.
        rounds: At most so many.
        number: Points searched in a round, at most.

    Returns:
        Re-ranked word errors of all points at the end.
    """
    lowest = _lowest(searched)
    for n in range(1, rounds + 1):
        reranked = rerank()
        points = next_points(reranked, searched, number)
        if not points:
            break
        promise = min(point.wer for point in reranked if point.scales in points)
        searched.update((point.scales, point) for point in search(points))
        before, lowest = lowest, _lowest(searched)
        logging.info(
            f"round {n}: {len(points)} points searched, WER {promise:.2f} on the lists; "
            f"best searched {lowest:.2f}"
        )
        if lowest >= before:
            break
    return rerank()


def _lowest(searched: Mapping[AnyScales, Point]) -> float:
    return min((point.wer for point in searched.values()), default=math.inf)


def next_points(
    points: Sequence[Point], searched: Mapping[AnyScales, Point], number: int
) -> list[AnyScales]:
    """Which of the re-ranked points to search next: the best ones not searched yet.

    Only those that promise fewer errors than the best searched point has.

    Args:
        points: Re-ranked word errors of the whole grid.
        searched: Word errors of the points searched.
        number: At most so many.
    """
    lowest = _lowest(searched)
    promising = [p for p in points if p.scales not in searched and p.wer < lowest]
    return [point.scales for point in sorted(promising, key=lambda point: point.wer)[:number]]
