"""Utterances of similar length in batches."""

from typing import Iterable, Iterator, NamedTuple, Optional

import numpy as np

# Batches read ahead, among which lengths are sorted: less padding, bounded memory.
WINDOW = 16


class Utterance(NamedTuple):
    """An utterance id, its samples (N,) or features (N, F), and its language if that is given."""

    utt: str
    speech: np.ndarray
    lang: Optional[str] = None


def by_length(utterances: Iterable[Utterance], batch_size: int) -> Iterator[list[Utterance]]:
    """Batches of at most ``batch_size``; each window of ``WINDOW`` batches is sorted by length.

    With a batch size of 1 the order is kept.
    """
    waiting: list[Utterance] = []

    def batches() -> Iterator[list[Utterance]]:
        if batch_size > 1:
            waiting.sort(key=lambda utterance: len(utterance.speech))
        for first in range(0, len(waiting), batch_size):
            yield waiting[first : first + batch_size]
        waiting.clear()

    for utterance in utterances:
        waiting.append(utterance)
        if len(waiting) == (batch_size * WINDOW if batch_size > 1 else 1):
            yield from batches()
    yield from batches()
