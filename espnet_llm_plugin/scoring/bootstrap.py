"""Bootstrap over utterances: how sure is an error rate, or the difference of two?

Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation"
(ICASSP 2004). Utterances are drawn with replacement; they count as independent, so with few
speakers the intervals are somewhat narrow.

Dimensions: N = utterances, R = resamples.
"""

from dataclasses import dataclass
from typing import Iterator

import numpy as np

RESAMPLES = 10000
CONFIDENCE = 0.95

_CHUNK = 2_000_000  # random numbers held at a time


@dataclass(frozen=True)
class Difference:
    """``first - second`` in per cent absolute: positive where the second system is better."""

    first: float
    second: float
    low: float
    high: float
    probability: float  # share of resamples in which the second makes fewer errors

    @property
    def difference(self) -> float:
        return self.first - self.second

    @property
    def relative(self) -> float:
        """Relative reduction of the error rate by the second system in per cent."""
        return 100 * self.difference / self.first if self.first else 0.0

    @property
    def significant(self) -> bool:
        """The interval does not contain 0."""
        return self.low > 0 or self.high < 0


def positive_int(text: str) -> int:
    """Number of resamples as an option of a command line."""
    number = int(text)
    if number < 1:
        raise ValueError(f"{number} is not positive")
    return number


def error_rate_interval(
    errors: np.ndarray, words: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``100 * sum(errors) / sum(words)``.

    Args:
        errors: (N,) errors of each utterance.
        words: (N,) reference words of each utterance.

    Returns:
        Lower and upper bound in per cent.
    """
    rates = [_rate(errors[draw], words[draw]) for draw in _draws(len(words), resamples, seed)]
    return _percentiles(np.concatenate(rates))


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    words: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two systems on the same utterances with a 95 % percentile interval.

    Args:
        first, second: (N,) errors of each system, utterance by utterance.
        words: (N,) reference words of each utterance.
    """
    differences, fewer = [], 0
    for draw in _draws(len(words), resamples, seed):
        gained = _rate((first - second)[draw], words[draw])
        differences.append(gained)
        fewer += int((gained > 0).sum())
    low, high = _percentiles(np.concatenate(differences))
    whole = max(int(words.sum()), 1)
    return Difference(
        first=100 * int(first.sum()) / whole,
        second=100 * int(second.sum()) / whole,
        low=low,
        high=high,
        probability=fewer / resamples,
    )


def _draws(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (<= R, N) utterance numbers, R rows in all; the same rows for the same arguments."""
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // size)
    for start in range(0, resamples, rows):
        yield random.integers(0, size, size=(min(rows, resamples - start), size), dtype=np.int32)


def _rate(errors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(R, N) errors and words -> (R,) rates in per cent."""
    # A resample of nothing but empty references has no word.
    return 100 * errors.sum(1) / np.maximum(words.sum(1), 1)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
