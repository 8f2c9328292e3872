"""Re-ranking of n-best lists by weighed sums of stored scores, and the choice of the weights.

    score + lm_weight * lm - prior_weight * prior - ilm_weight * ilm + length_bonus * length

``score`` is that of the first pass, the others are log-probabilities of the hypothesis under a
language model, under a label prior (summed over the labels, so in step with the language model)
and under the recogniser's internal LM; ``length`` counts words or labels. The language model runs
once for a hypothesis; every point of a grid of weights costs a sum.

K hypotheses of a list, P points of a grid, 4 weights.
"""

from dataclasses import dataclass
from typing import ClassVar, Mapping, Sequence

import numpy as np

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.reranking import word_errors
from espnet_llm_plugin.fusion.tuning import Point

UNITS = ("word", "label")


@dataclass(frozen=True)
class RescoringScales:
    """Weights of the sum above; all but ``length_bonus`` are expected not to be negative."""

    AXES: ClassVar[tuple[str, ...]] = ("lm_weight", "prior_weight", "ilm_weight", "length_bonus")

    lm_weight: float = 0.0
    prior_weight: float = 0.0
    ilm_weight: float = 0.0
    length_bonus: float = 0.0

    def vector(self) -> list[float]:
        """Factors of a candidate's :meth:`Candidate.parts`."""
        return [self.lm_weight, -self.prior_weight, -self.ilm_weight, self.length_bonus]


@dataclass(frozen=True)
class Candidate:
    """A hypothesis of a list with what the sum is made of (not weighed, natural logarithms)."""

    text: str
    score: float
    lm: float = 0.0
    prior: float = 0.0
    ilm: float = 0.0
    length: int = 0

    def parts(self) -> list[float]:
        """What :meth:`RescoringScales.vector` weighs."""
        return [self.lm, self.prior, self.ilm, self.length]

    def total(self, scales: RescoringScales) -> float:
        """The sum."""
        return self.score + float(np.dot(scales.vector(), self.parts()))


def ranked(candidates: Sequence[Candidate], scales: RescoringScales) -> list[int]:
    """Places of a list's hypotheses, best first; of equal ones the first pass's order stays."""
    totals = _totals(candidates, [scales])[0]
    return [int(i) for i in np.argsort(-totals, kind="stable")]


def _totals(candidates: Sequence[Candidate], grid: Sequence[RescoringScales]) -> np.ndarray:
    """Scores (P, K)."""
    parts = np.array([candidate.parts() for candidate in candidates])
    weights = np.array([scales.vector() for scales in grid])
    return np.array([candidate.score for candidate in candidates]) + weights @ parts.T


def grid_points(
    lists: Mapping[str, Sequence[Candidate]],
    references: Mapping[str, str],
    grid: Sequence[RescoringScales],
) -> list[Point]:
    """Word errors at P points.

    Args:
        lists: By utterance, best of the first pass first; at least one hypothesis each.
        references: Transcripts of the same utterances.
        grid: Points.

    Raises:
        UserError: An utterance without a list, references without words, or lists in which all
            hypotheses have equally many errors: nothing can be learned from these.
    """
    without = [utt for utt in references if not lists.get(utt)]
    if without:
        raise UserError(
            f"{len(without)} of {len(references)} utterances with a transcript have no n-best "
            f"list, e.g. {without[0]}: give the transcripts of the set that was decoded"
        )
    words = sum(len(reference.split()) for reference in references.values())
    if words == 0:
        raise UserError("the reference text has no words: scales cannot be tuned on it")
    sums = np.zeros((len(grid), 3), dtype=np.int64)
    varied = 0
    for utt, reference in references.items():
        candidates = lists[utt]
        of_text = {text: word_errors(reference, text) for text in {c.text for c in candidates}}
        errors = np.array([of_text[candidate.text] for candidate in candidates])
        varied += len(set(errors.sum(axis=1).tolist())) > 1
        sums += errors[_totals(candidates, grid).argmax(axis=1)]
    if not varied:
        raise UserError(
            f"in each of the {len(references)} n-best lists all hypotheses have equally many word "
            "errors: weights cannot be tuned on this set. Decode it with a larger --beam_size and "
            "--nbest, or take another set"
        )
    return [
        Point(scales, 100 * sum(errors) / words, *errors, words)
        for scales, errors in zip(grid, sums.tolist())
    ]
