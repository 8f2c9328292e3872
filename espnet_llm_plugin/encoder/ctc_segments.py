"""Which frames CTC compression merges (arXiv 2603.15045), in the adapter and in joint decoding.

B utterances, T frames, V labels with the blank.
"""

import torch
from torch import Tensor


def ctc_segments(log_probs: Tensor, lengths: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Runs of neighbouring frames whose best label is the same and sure.

    Frame t joins the segment of frame t-1 where both have the same best label and the probability
    of that label is at least ``threshold`` in both. Blank is a label like the others: runs of it
    are merged too.

    Args:
        log_probs: (B, T, V) log-posteriors, T > 0.
        lengths: (B,) frames of the utterances.
        threshold: probability tau; above 1 no frames are merged.

    Returns:
        Segment of each frame (B, T), int64, 0, 1, ... within an utterance, in the padding that of
        the last frame; and the number of segments (B,).
    """
    best, label = log_probs.max(-1)
    sure = best.float().exp() >= threshold
    merged = (label[:, 1:] == label[:, :-1]) & sure[:, 1:] & sure[:, :-1]
    merged |= torch.arange(1, log_probs.size(1), device=lengths.device) >= lengths[:, None]
    segments = torch.nn.functional.pad((~merged).cumsum(1), (1, 0))
    return segments, torch.where(lengths > 0, segments.amax(1) + 1, 0)
