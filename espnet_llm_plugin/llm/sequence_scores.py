"""Log-probabilities of whole token sequences under a causal LM, in batches of similar length.

B: sequences in a batch, L: tokens of the longest, V: vocabulary.
"""

from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Logits of a batch, 4 bytes each: 256 MB, and about as much again while they are normalised.
LOGITS = 64_000_000


def length_sorted_batches(
    lengths: Sequence[int], vocab_size: int, batch_size: int
) -> Iterator[list[int]]:
    """Numbers of sequences in batches, the longest first: what does not fit memory fails at once.

    Args:
        lengths: Of the sequences.
        vocab_size: V.
        batch_size: B at most; less where B L V would exceed ``LOGITS``.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        fits = LOGITS // (max(1, lengths[order[start]]) * vocab_size)
        size = max(1, min(batch_size, fits))
        yield order[start : start + size]
        start += size


@torch.no_grad()
def sequence_log_probs(
    forward: Callable[[Tensor], Tensor],
    sequences: Sequence[Sequence[int]],
    *,
    device: torch.device,
    temperature: float = 1.0,
) -> list[float]:
    """Sum of ``log P(sequence[i] | sequence[:i])`` over i >= 1, for B sequences in one forward.

    Args:
        forward: Token ids (B, L) to logits (B, L, V) of the next tokens; causal.
        sequences: Token ids, the first of which (BOS) is given, not scored.
        device: Where the LM lives.
        temperature: Divides the logits.
    """
    longest = max(map(len, sequences))
    if longest < 2:
        return [0.0] * len(sequences)
    # Padded at the right with any token: out of sight of every scored position by causality.
    rows = [[*ids, *[0] * (longest - len(ids))] for ids in sequences]
    ids = torch.tensor(rows, device=device)
    logits = forward(ids[:, :-1]).float()
    if temperature != 1.0:
        logits = logits / temperature
    picked = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(dim=-1)  # (B, L)
    lengths = torch.tensor([len(ids) - 1 for ids in sequences], device=device)
    real = torch.arange(longest - 1, device=device) < lengths[:, None]
    return picked.double().masked_fill(~real, 0.0).sum(dim=1).tolist()
