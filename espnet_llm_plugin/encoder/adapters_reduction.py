"""Fewer frames for the LLM: n frames side by side, or runs of one CTC label averaged.

B utterances, T frames, E encoder width, n frames stacked, P positions after the reduction, C rows
of the CTC output (row 0 blank).

What lies beyond an utterance's length, NaN included, has no influence, so that an utterance of a
ragged batch gives what it gives alone. Zero frames give zero positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError


def beyond(lengths: Tensor, num_frames: int) -> Tensor:
    """(B, T) whether a frame is padding."""
    return torch.arange(num_frames, device=lengths.device) >= lengths[:, None]


def stack_frames(frames: Tensor, lengths: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Concatenate ``n`` consecutive frames, as a convolution of kernel and stride n sees them.

    The last group of an utterance is completed with zero frames: they add nothing to the linear
    layer that follows, no frame counts twice, and no speech is dropped, which at strides of up to
    a second would be a word. T frames give ceil(T / n) positions, as in arXiv 2307.11795 ("stack
    every n consecutive frames").

    Args:
        frames: (B, T, E).
        lengths: (B,) frames of the utterances; the longest may be shorter than T.
        n: frames per position.

    Returns:
        (B, P, n * E) with P = ceil(longest / n), and (B,) positions.
    """
    longest = int(lengths.max())
    frames = frames[:, :longest]
    frames = frames.masked_fill(beyond(lengths, longest)[..., None], 0.0)
    frames = torch.nn.functional.pad(frames, (0, 0, 0, -longest % n))
    return frames.reshape(len(frames), -1, n * frames.size(2)), (lengths + n - 1) // n


class Segments(NamedTuple):
    """Which frames are merged.

    Attributes:
        index: (B, T) number of a frame's segment, from 0; padding has P, the segment that is none.
        counts: (B,) segments of the utterances; the most is P.
    """

    index: Tensor
    counts: Tensor


def segment_frames(ctc_log_probs: Tensor, lengths: Tensor, threshold: float) -> Segments:
    """CTC compression of arXiv 2603.15045: where a frame belongs to the one before it.

    ``y_t = argmax_y p(y | h_t)`` is merged with its predecessor if ``y_t = y_{t-1}`` and both
    probabilities are at least ``threshold``. Blank is a label like the others: runs of blank are
    merged too. Threshold 0 merges every run of one label, above 1 nothing.

    Args:
        ctc_log_probs: (B, T, C) log-probabilities.
        lengths: (B,) frames; the longest may be shorter than T.
        threshold: tau, a probability.
    """
    best, label = ctc_log_probs.max(-1)
    sure = best.float().exp() >= threshold
    merged = (label[:, 1:] == label[:, :-1]) & sure[:, 1:] & sure[:, :-1]
    padding = beyond(lengths, label.size(1))
    begins = torch.nn.functional.pad(~merged, (min(1, label.size(1)), 0), value=True) & ~padding
    counts = begins.sum(1)
    index = (begins.cumsum(1) - 1).masked_fill(padding, int(counts.max()))
    return Segments(index, counts)


def mean_of_segments(frames: Tensor, segments: Segments) -> Tensor:
    """Average the frames of every segment: (B, T, E) -> (B, P, E), zeros where there is none.

    Sums in float32 at least: a long silence is one segment of hundreds of frames.
    """
    num_segments = int(segments.counts.max())
    padding = segments.index == num_segments
    wide = torch.promote_types(frames.dtype, torch.float32)
    frames_wide = frames.to(wide).masked_fill(padding[..., None], 0.0)
    index = segments.index[..., None].expand_as(frames_wide)
    # One place more than there are segments takes the padding.
    sums = frames_wide.new_zeros(len(frames), num_segments + 1, frames.size(2))
    sums = sums.scatter_add(1, index, frames_wide)[:, :-1]
    sizes = frames_wide.new_zeros(len(frames), num_segments + 1)
    sizes = sizes.scatter_add(1, segments.index, torch.ones_like(frames_wide[..., 0]))[:, :-1]
    return (sums / sizes.clamp(min=1)[..., None]).to(frames.dtype)


def check_stack(n: int) -> None:
    """Raise :class:`UserError` unless ``n`` frames can be stacked."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"stack must be a whole number of frames from 1 on, got {n!r}")
