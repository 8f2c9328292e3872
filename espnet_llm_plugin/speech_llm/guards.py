"""Guards against hallucination: token loops and outputs longer than speech can be.

N rows (hypotheses), P longest period in tokens, A utterances, K hypotheses of each.

A speech LLM that loses the audio repeats an n-gram until the length limit [2603.15045 sec. 3.6:
"oscillations"; few utterances carry most of the insertions].
"""

import math
from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from espnet_llm_plugin.errors import UserError


@dataclass(frozen=True)
class RepetitionGuard:
    """Forbids an n-gram to follow itself too often.

    Attributes:
        max_repeats: How often an n-gram may occur in a row, at least 1; 0: no guard.
        max_ngram: P, the longest n-gram watched.
    """

    max_repeats: int = 0
    max_ngram: int = 8

    def __post_init__(self) -> None:
        if self.max_repeats < 0 or self.max_ngram < 1:
            raise UserError(
                f"max_repeats {self.max_repeats}, max_repeat_ngram {self.max_ngram}: expected 0 "
                "(off) or above, and at least 1"
            )

    def start(self, rows: int, device: torch.device) -> Optional["LoopState"]:
        """State of N empty hypotheses; None without guard."""
        if not self.max_repeats:
            return None
        shape = (rows, self.max_ngram)
        return LoopState(
            torch.full(shape, -1, device=device),
            torch.zeros(shape, dtype=torch.long, device=device),
            self.max_repeats,
        )


@dataclass(frozen=True)
class LoopState:
    """How far each hypothesis repeats itself.

    Attributes:
        tail: The last P tokens, the latest first; -1 before the first (N, P).
        run: Column p - 1: at the end of the hypothesis so many tokens equal those p tokens
            earlier (N, P).
        max_repeats: See :class:`RepetitionGuard`.
    """

    tail: torch.Tensor
    run: torch.Tensor
    max_repeats: int

    def forbidden(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (M,) and tokens (M,) that would complete a repetition too many."""
        period = torch.arange(1, self.tail.size(1) + 1, device=self.tail.device)
        # Tokens equal to those a period earlier make up all copies but the first.
        full = (self.run + 1 >= self.max_repeats * period) & (self.tail >= 0)
        row, column = full.nonzero(as_tuple=True)
        return row, self.tail[row, column]

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> "LoopState":
        """State of new hypotheses: the rows ``parents`` (M,) with one token (M,) more."""
        tail, run = self.tail[parents], self.run[parents]
        again = tail == tokens[:, None]
        return LoopState(
            torch.cat([tokens[:, None], tail[:, :-1]], dim=1),
            torch.where(again, run + 1, 0),
            self.max_repeats,
        )


def length_limits(
    frames: Sequence[int],
    seconds: Optional[Sequence[Optional[float]]] = None,
    *,
    maxlenratio: float = 0.0,
    minlenratio: float = 0.0,
    max_tokens_per_second: float = 0.0,
) -> tuple[list[int], list[int]]:
    """The most and the fewest tokens of each utterance, the end symbol not counted.

    Args:
        frames: Encoder frames (B).
        seconds: Duration of the audio where it is known (B).
        maxlenratio: ESPnet's: 0 is one token a frame, above 0 that many tokens a frame, below 0
            the negative number of tokens itself.
        minlenratio: Likewise; 0 is none.
        max_tokens_per_second: A second limit, for audio of known duration; 0: none.

    Returns:
        B numbers of at least 1, and B numbers not above them.
    """
    if max_tokens_per_second < 0:
        raise UserError(f"max_tokens_per_second {max_tokens_per_second}: expected 0 or above")

    def ratio(value: float, length: int, none: int) -> int:
        if value == 0:
            return none
        return -int(value) if value < 0 else max(1, int(value * length))

    longest, shortest = [], []
    for i, length in enumerate(frames):
        most = ratio(maxlenratio, length, length)
        duration = seconds[i] if seconds is not None else None
        if max_tokens_per_second and duration is not None:
            most = min(most, math.ceil(max_tokens_per_second * duration))
        longest.append(max(1, most))
        shortest.append(min(longest[-1], ratio(minlenratio, length, 0)))
    return longest, shortest
