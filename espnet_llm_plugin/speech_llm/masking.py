"""Text masking: a fraction of the input text is hidden, so that the audio must tell it.

[Prompting Large Language Models with Speech Recognition Abilities, arXiv 2307.11795, section 4.2.3]
"""

import torch
from torch import Tensor


def mask_text(text: Tensor, lengths: Tensor, fraction: float, mask_token: int) -> Tensor:
    """Replace each token with probability ``fraction``; the targets are not to be masked.

    Args:
        text: (B, U) input token ids, the first of each row the one that begins a text.
        lengths: (B,) numbers of tokens, the first included.
        fraction: F in [0, 1).
        mask_token: what replaces them.

    Returns:
        (B, U); the first tokens and the padding as they were.
    """
    if not fraction:
        return text
    position = torch.arange(text.shape[1], device=text.device)
    inside = (position > 0) & (position < lengths[:, None].to(text.device))
    chosen = torch.rand(text.shape, device=text.device) < fraction
    return text.masked_fill(chosen & inside, mask_token)
