"""Smaller CTC posteriors for a label-synchronous search: fewer frames, fewer labels.

The two reductions of arXiv 2603.15045 for joint decoding of CTC and a decoder with a large
vocabulary. Both keep a distribution per frame; compression comes first where both are used.

Dimensions: B utterances, T frames, I segments of frames, V labels with the blank, K kept labels.
"""

from typing import Optional

import torch
from torch import Tensor

from espnet_llm_plugin.encoder.ctc_segments import ctc_segments


def compress_frames(log_probs: Tensor, lengths: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """One frame for each segment of :func:`ctc_segments`: the maximum of each label, renormalised.

    ``s(y|i) = max_{t in segment i} p(y|t)``, ``p'(y|i) = s(y|i) / sum_y s(y|i)``.

    Args:
        log_probs: (B, T, V) log-posteriors, T > 0.
        lengths: (B,) frames of the utterances.
        threshold: see :func:`ctc_segments`.

    Returns:
        Log-posteriors (B, I, V), I the largest number of segments or 1, and the numbers of segments
        (B,). The padding is -inf.
    """
    segments, new_lengths = ctc_segments(log_probs, lengths, threshold)
    num_segments = max(1, int(new_lengths.max()))
    shape = len(log_probs), num_segments, log_probs.size(2)
    compressed = log_probs.new_full(shape, -torch.inf)
    for out, rows, index, length in zip(compressed, log_probs, segments, lengths.tolist()):
        index = index[:length]
        out.scatter_reduce_(0, index[:, None].expand(-1, out.size(1)), rows[:length], "amax")
        # A segment of one frame sums to one as it is.
        merged = torch.bincount(index, minlength=num_segments) > 1
        out[merged] = normalize(out[merged])
    return compressed, new_lengths


def keep_labels(
    log_probs: Tensor, lengths: Tensor, top_k: int, always: tuple[int, ...]
) -> tuple[Tensor, Optional[Tensor]]:
    """The ``top_k`` labels of each utterance that some frame gives the most to, renormalised.

    Args:
        log_probs: (B, T, V) log-posteriors, T > 0.
        lengths: (B,) frames of the utterances.
        top_k: labels kept besides those of ``always``.
        always: labels kept in any case (blank, eos).

    Returns:
        Log-posteriors (B, T, K), K = top_k + len(always), and the labels of the columns (B, K) in
        ascending order. Where that is no fewer than V: the input itself and None.
    """
    num_labels = log_probs.size(2)
    if top_k + len(always) >= num_labels:
        return log_probs, None
    peaks = log_probs.new_full((len(log_probs), num_labels), -torch.inf)
    for peak, rows, length in zip(peaks, log_probs, lengths.tolist()):
        if length:
            torch.amax(rows[:length], 0, out=peak)
    peaks[:, list(always)] = torch.inf
    labels = peaks.topk(top_k + len(always), dim=1).indices.sort(1).values
    index = labels[:, None].expand(-1, log_probs.size(1), -1)
    return normalize(log_probs.gather(2, index)), labels


def normalize(log_probs: Tensor) -> Tensor:
    """Make rows sum to one, in place; rows of nothing but -inf stay as they are."""
    total = log_probs.logsumexp(-1, keepdim=True)
    return log_probs.sub_(total.masked_fill_(total == -torch.inf, 0.0))
