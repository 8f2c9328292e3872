"""Cross-entropy of the text.

B utterances, U tokens (EOS included), S tokens that can be text.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TextLoss(NamedTuple):
    """Sums over the tokens of each utterance (B,).

    Attributes:
        smoothed: Label-smoothed cross-entropy, nats.
        nll: -log P(text and EOS | audio), nats.
        correct: Tokens that are the most likely one.
        tokens: Their number.
    """

    smoothed: Tensor
    nll: Tensor
    correct: Tensor
    tokens: Tensor

    def normalizer(self, by_length: bool) -> int:
        """Number of tokens or of utterances."""
        return int(self.tokens.sum()) if by_length else self.tokens.numel()

    def reduced(self, by_length: bool) -> Tensor:
        """Smoothed cross-entropy per token or per utterance."""
        return self.smoothed.sum() / self.normalizer(by_length)

    def per_token(self) -> Tensor:
        """Cross-entropy without smoothing, nats per token."""
        return self.nll.sum() / self.tokens.sum()

    def accuracy(self) -> Tensor:
        """Share of the tokens that are the most likely one."""
        return self.correct.sum() / self.tokens.sum()


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def text_loss(logits: Tensor, targets: Tensor, lengths: Tensor, smoothing: float = 0.0) -> TextLoss:
    """Losses of a batch, in float32 also under autocast (the sum of all logits overflows float16).

    Builds one float32 copy of the logits, and none if they are float32, and no (B, U, S) targets.

    With smoothing e a target's token has weight 1 - e and each other token e / (S - 1), as in
    ESPnet's ``LabelSmoothingLoss`` (which has the entropy of these weights, a constant,
    subtracted).

    Args:
        logits: (B, U, S).
        targets: (B, U) in [0, S); anything beyond the lengths.
        lengths: (B,).
        smoothing: e in [0, 1).
    """
    logits = logits.float()
    inside = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
    targets = targets.masked_fill(~inside, 0)
    total = logits.logsumexp(dim=-1)
    nll = total - logits.gather(-1, targets[..., None])[..., 0]
    smoothed = nll
    if smoothing:
        size = logits.shape[-1]
        share = smoothing / (size - 1)
        # cross-entropy against the sum of all tokens' weights
        everything = size * total - logits.sum(dim=-1)
        smoothed = (1 - smoothing - share) * nll + share * everything
    correct = logits.argmax(dim=-1) == targets
    return TextLoss(
        smoothed.masked_fill(~inside, 0.0).sum(dim=1),
        nll.masked_fill(~inside, 0.0).sum(dim=1),
        (correct & inside).sum(dim=1),
        lengths,
    )
