"""Which utterances of a validation are decoded, and how their error rate becomes ESPnet's mean.

A model sees a validation batch by batch, usually the shortest utterances first, and knows neither
how many there are nor which batch is the last.
"""

import hashlib
import math
from typing import Any, Optional, Sequence


class UtteranceSample:
    """Some utterances of a set that is seen batch by batch: names with the lowest hashes.

    They are the same in every pass, whatever the order and size of the batches, and of any length.
    In the first pass all are looked at that are among the lowest so far, which later ones can
    replace: at most about ``size * (1 + log(N / size))`` of N utterances. Then the highest hash of
    the sample is known, and nothing else is looked at.

    Args:
        size: Number of utterances.

    Attributes:
        results: What was found of each utterance that is in the sample now, by hash.
    """

    def __init__(self, size: int):
        self.size = size
        self.results: dict[int, Any] = {}
        self._highest: float = math.inf

    def restart(self) -> None:
        """The pass is over: the next one begins."""
        if len(self.results) == self.size:
            self._highest = max(self.results)
        self.results = {}

    def choose(self, names: Sequence[str]) -> dict[int, int]:
        """Of a batch, the rows to look at by hash: to be put into ``results``.

        Results of utterances that the batch drives out of the sample are forgotten.
        """
        rows = {name_hash(name): row for row, name in enumerate(names)}
        candidates = {key for key in rows if key <= self._highest} | self.results.keys()
        lowest = set(sorted(candidates)[: self.size])
        self.results = {key: result for key, result in self.results.items() if key in lowest}
        return {key: row for key, row in rows.items() if key in lowest - self.results.keys()}


class RunningValue:
    """Values of batches whose mean over all batches, as ESPnet takes it, is the latest estimate.

    ESPnet reports ``sum_b(weight_b * value_b) / sum_b(weight_b)`` over batches b of an epoch and of
    all processes, leaving out NaN. A value moves that mean to where the estimate is now; alone it
    means nothing.
    """

    def __init__(self) -> None:
        self._weight = self._sum = 0.0

    def __call__(self, estimate: float, weight: float) -> float:
        """The value of the next batch, of weight ``weight``; NaN if the estimate is."""
        if math.isnan(estimate):
            return estimate
        self._weight += weight
        before, self._sum = self._sum, estimate * self._weight
        return (self._sum - before) / weight


def name_hash(name: str) -> int:
    """The same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def names_or_numbers(names: Optional[Sequence[str]], rows: int, first: int) -> list[str]:
    """Names of a batch; where there are none, the utterances' numbers in the pass."""
    return [str(first + row) if names is None else names[row] for row in range(rows)]
