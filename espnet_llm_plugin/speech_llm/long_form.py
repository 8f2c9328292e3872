"""Audio longer than a model was trained on: cut into segments, decoded, stitched.

A segment is at most ``max_seconds`` long and is cut where nobody speaks: where the signal is
weakest, or in the middle of a run of CTC blanks. The encoder sees ``overlap`` seconds more on both
sides of every cut, of which the frames are dropped: neighbouring segments share audio but no frame,
so that their texts simply follow each other. Time and memory grow linearly with the audio.

S samples, T frames of an encoder output, D its size, V CTC labels.
"""

import itertools
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.hypothesis import LabelHypothesis

METHODS = ("off", "silence", "ctc")
# Energy is measured over this long: shorter gaps are within words (closures of plosives).
SILENCE_SECONDS = 0.3
STEP_SECONDS = 0.01

# Samples (S,) to encoder outputs (T, D).
Encode = Callable[[np.ndarray], torch.Tensor]
# Encoder outputs (T, D) to CTC log-posteriors (T, V), blank 0.
CTCHead = Callable[[torch.Tensor], torch.Tensor]


class Segment(NamedTuple):
    """A part of an utterance.

    Attributes:
        encoder_out: Its frames (T, D), without those of the overlap.
        seconds: Its duration.
    """

    encoder_out: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class LongForm:
    """How long audio is cut.

    Attributes:
        method: ``off``: never; ``silence``: where the signal is weakest; ``ctc``: in the middle of
            the longest run of frames whose best CTC label is the blank.
        max_seconds: Longest segment; audio up to this length is left whole.
        overlap: Seconds beyond each cut that the encoder sees.
    """

    method: str = "off"
    max_seconds: float = 30.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"long_form {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.max_seconds <= 0 or not 0 <= self.overlap <= self.max_seconds / 2:
            raise UserError(
                f"segments of {self.max_seconds} s with an overlap of {self.overlap} s: expected "
                "more than 0 s, and an overlap of at most half of that"
            )

    def segments(
        self, samples: np.ndarray, rate: int, encode: Encode, ctc: Optional[CTCHead] = None
    ) -> Iterator[Segment]:
        """Encode an utterance in segments.

        Args:
            samples: (S,).
            rate: Samples a second.
            encode: The model's encoder.
            ctc: Its CTC head, for the method ``ctc``.
        """
        size, longest = len(samples), int(self.max_seconds * rate)
        if self.method == "off" or size <= longest:
            yield Segment(encode(samples), size / rate)
            return
        margin, start = int(self.overlap * rate), 0
        while start < size:
            # 1. The samples among which to cut; the last segment is not left too short.
            is_last = size - start <= longest
            window = start + longest // 2, min(start + longest, size - longest // 4)
            if is_last:
                end = size
            elif self.method == "silence":
                end = quietest(samples, rate, *window)
            else:
                end = window[1]
            # 2. Encoded with the overlap.
            first, last = max(0, start - margin), min(size, end + margin)
            encoder_out = encode(samples[first:last])
            per_sample = len(encoder_out) / (last - first)

            def frame(sample: int, first: int = first, per_sample: float = per_sample) -> int:
                return round((sample - first) * per_sample)

            # 3. The CTC tells where to cut once it has been encoded.
            if self.method == "ctc" and not is_last:
                low, high = frame(window[0]), frame(window[1])
                cut = low + blank_cut(ctc(encoder_out)[low:high])
                end = min(max(first + round(cut / per_sample), window[0]), window[1])
                last_frame = cut
            else:
                last_frame = frame(end)
            yield Segment(encoder_out[frame(start) : last_frame], (end - start) / rate)
            start = end


def quietest(samples: np.ndarray, rate: int, first: int, last: int) -> int:
    """The sample in [first, last] around which the signal is weakest for a while."""
    step = max(1, int(STEP_SECONDS * rate))
    width = max(1, round(SILENCE_SECONDS / STEP_SECONDS))
    # Half the width beyond both ends, where there is audio.
    begin = max(0, first - width // 2 * step)
    part = samples[begin : last + width // 2 * step].astype(np.float64)
    energy = np.add.reduceat(part * part, np.arange(0, len(part), step))
    level = np.convolve(energy, np.ones(width), mode="same")
    low = (first - begin) // step
    level = level[low : low + max(1, (last - first) // step)]
    return min(first + int(level.argmin()) * step + step // 2, last)


def blank_cut(log_probs: torch.Tensor) -> int:
    """The frame in the middle of the longest run of blanks (T, V); else the surest blank."""
    blank = (log_probs.argmax(dim=1) == 0).cpu().numpy()
    if not blank.any():
        return int(log_probs[:, 0].argmax())
    edges = np.flatnonzero(np.diff(np.concatenate([[0], blank.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    longest = int((ends - starts).argmax())
    return int(starts[longest] + ends[longest]) // 2


def stitch(lists: Sequence[Sequence[LabelHypothesis]], nbest: int) -> list[list[LabelHypothesis]]:
    """The n-best choices of one hypothesis from each segment's list, best sum first.

    Exact, as segments do not depend on each other: the n best of some segments and one more
    segment are among the n best of these and its own.
    """
    chosen: list[list[LabelHypothesis]] = [[]]
    for hyps in lists:
        pairs = [[*before, hyp] for before, hyp in itertools.product(chosen, hyps)]
        pairs.sort(key=lambda pair: -sum(hyp.ranking for hyp in pair))
        chosen = pairs[:nbest]
    return chosen


def joined(hyps: Sequence[LabelHypothesis]) -> LabelHypothesis:
    """One hypothesis of the whole utterance; its scores are sums over the segments."""
    if len(hyps) == 1:
        return hyps[0]
    names = hyps[0].scores if hyps else ()
    return LabelHypothesis(
        tuple(token for hyp in hyps for token in hyp.tokens),
        sum(hyp.total for hyp in hyps),
        sum(hyp.ranking for hyp in hyps),
        {name: sum(hyp.scores[name] for hyp in hyps) for name in names},
        sum(hyp.bonus for hyp in hyps),
        all(hyp.ended for hyp in hyps),
    )
