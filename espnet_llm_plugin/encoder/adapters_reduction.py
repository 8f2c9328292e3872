"""Fewer frames for the LLM: n frames side by side, or runs of one CTC label averaged.

B utterances, T frames, E encoder width, n frames stacked, P positions after the reduction.

What lies beyond an utterance's length, NaN included, has no influence, so that an utterance of a
ragged batch gives what it gives alone. Zero frames give zero positions.
"""

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
    a second would be a word. T frames give ceil(T / n) positions (arXiv 2307.11795).

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


def mean_of_segments(frames: Tensor, lengths: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
    """Average the frames of every segment: CTC compression of arXiv 2603.15045.

    Sums in float32 at least: a long silence is one segment of hundreds of frames.

    Args:
        frames: (B, T, E).
        lengths: (B,) frames of the utterances.
        segments: (B, T) segment of each frame, see :func:`ctc_segments`.
        counts: (B,) segments of the utterances.

    Returns:
        (B, P, E), P the largest of ``counts``; zeros where an utterance has no segment.
    """
    num_segments = int(counts.max())
    padding = beyond(lengths, frames.size(1))
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    wide = wide.masked_fill(padding[..., None], 0.0)
    sums = wide.new_zeros(len(frames), num_segments, frames.size(2))
    sums = sums.scatter_add(1, segments[..., None].expand_as(wide), wide)
    sizes = wide.new_zeros(len(frames), num_segments)
    sizes = sizes.scatter_add(1, segments, (~padding).to(wide.dtype))
    return (sums / sizes.clamp(min=1)[..., None]).to(frames.dtype)


def check_stack(n: int) -> None:
    """Raise :class:`UserError` unless ``n`` frames can be stacked."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"stack must be a whole number of frames from 1 on, got {n!r}")
