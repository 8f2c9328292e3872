"""Smaller CTC posteriors for a label-synchronous search: fewer frames, fewer labels.

The two reductions of arXiv 2603.15045 for joint decoding of CTC and a decoder with a large
vocabulary. Both keep a distribution per frame; compression comes first where both are used.

Dimensions: T frames of an utterance, I segments of frames, V labels with the blank, K kept labels.
"""

from typing import Optional

import torch
from torch import Tensor

from espnet_llm_plugin.encoder.ctc_segments import ctc_segments


def compress_frames(log_probs: Tensor, threshold: float) -> Tensor:
    """One frame for each run of frames of one sure label: the maximum of each label, renormalised.

    ``s(y|i) = max_{t in segment i} p(y|t)``, ``p'(y|i) = s(y|i) / sum_y s(y|i)``.

    Args:
        log_probs: (T, V) log-posteriors of an utterance.
        threshold: Probability from which on a frame's best label is sure, see
            :func:`~espnet_llm_plugin.encoder.ctc_segments.ctc_segments`.

    Returns:
        (I, V) log-posteriors of the segments.
    """
    segments, sizes = _segments(log_probs, threshold)
    compressed = _maxima(log_probs, segments, len(sizes))
    merged = sizes > 1  # a segment of one frame sums to one as it is
    compressed[merged] = _normalize(compressed[merged])
    return compressed


def keep_labels(
    log_probs: Tensor,
    top_k: int,
    always: tuple[int, ...],
    threshold: Optional[float] = None,
) -> tuple[Tensor, Tensor]:
    """The labels that some frame gives the most to, renormalised.

    Args:
        log_probs: (T, V) log-posteriors of an utterance.
        top_k: Labels kept besides those of ``always``; no more than there are.
        always: Labels kept in any case (blank, eos).
        threshold: Compress the frames first, see :func:`compress_frames`. None: do not.

    Returns:
        Log-posteriors (T, K) or (I, K), K = top_k + len(always), and the labels of the columns
        (K,), ascending.
    """
    if threshold is None:
        peaks = log_probs.amax(0) if len(log_probs) else log_probs.new_zeros(log_probs.size(1))
    else:
        # Segment by segment: (I, V) numbers would be the largest thing in memory.
        segments, sizes = _segments(log_probs, threshold)
        peaks = log_probs.new_full((log_probs.size(1),), -torch.inf)
        for frames in log_probs.split(sizes.tolist()):
            best = frames.amax(0)
            torch.maximum(peaks, _normalize(best) if len(frames) > 1 else best, out=peaks)
    peaks[list(always)] = torch.inf
    labels = peaks.topk(top_k + len(always)).indices.sort().values
    kept = log_probs[:, labels]
    if threshold is not None:
        kept = _maxima(kept, segments, len(sizes))
    return _normalize(kept), labels


def _segments(log_probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Segment of each frame (T,), and the frames of each segment (I,)."""
    if not len(log_probs):
        none = torch.zeros(0, dtype=torch.long, device=log_probs.device)
        return none, none
    length = torch.tensor([len(log_probs)], device=log_probs.device)
    (segments,), _ = ctc_segments(log_probs[None], length, threshold)
    return segments, torch.bincount(segments)


def _maxima(log_probs: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """(I, V) maximum of each label over the frames of each segment."""
    maxima = log_probs.new_full((num_segments, log_probs.size(1)), -torch.inf)
    return maxima.scatter_reduce_(0, segments[:, None].expand_as(log_probs), log_probs, "amax")


def _normalize(log_probs: Tensor) -> Tensor:
    """Make rows sum to one, in place; rows of nothing but -inf stay as they are."""
    total = log_probs.logsumexp(-1, keepdim=True)
    return log_probs.sub_(total.masked_fill_(total == -torch.inf, 0.0))
