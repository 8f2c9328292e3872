"""Chunked attention as a batch of blocks: the same computation for utterances and for streams.

An utterance is cut into N chunks of C frames. A block is a chunk followed by its R frames of right
context, which are computed again in every block ("hard copy", Emformer, arXiv 2010.10759): what a
layer knows of them never reaches beyond the block, so the look-ahead does not grow with the number
of layers. A block attends to itself and to the L frames before it, as the layer left them at the
end of their own chunks. Memory is linear in the utterance's length.

B utterances or streams, N blocks, C frames of a chunk, R of right context, S = C + R, L frames of
left context, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How frames lie in blocks.

    Attributes:
        chunk: C.
        right: R.
        left: L.
        valid_keys: (B, N, L + S) whether a block may attend to a frame of its left context or of
            its own: those before the stream's start and beyond its end it may not.
    """

    chunk: int
    right: int
    left: int
    valid_keys: Tensor

    @classmethod
    def make(
        cls, num_blocks: int, chunk: int, right: int, left: int, start: int, lengths: Tensor
    ) -> "Layout":
        """Layout of ``num_blocks`` chunks, the first of which begins at frame ``start``.

        Args:
            lengths: (B,) frames of the streams, counted from their beginnings.
        """
        blocks = torch.arange(num_blocks, device=lengths.device)[:, None]
        keys = torch.arange(-left, chunk + right, device=lengths.device)
        position = start + blocks * chunk + keys
        valid = (position >= 0) & (position < lengths[:, None, None])
        # Blocks beyond the end of a shorter utterance: nothing of theirs is used, but a softmax
        # over nothing would be NaN.
        valid = valid | ~valid.any(-1, keepdim=True)
        return cls(chunk, right, left, valid)

    def cut(self, frames: Tensor) -> Tensor:
        """(B, N * C + R, D) -> (B, N, S, D)."""
        return frames.unfold(1, self.chunk + self.right, self.chunk).transpose(2, 3)

    def join(self, blocks: Tensor) -> Tensor:
        """(B, N, S, D) -> (B, N * C, D), without the right contexts."""
        return blocks[:, :, : self.chunk].flatten(1, 2)

    def with_past(self, blocks: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Put the P frames that precede it before each block.

        Args:
            blocks: (B, N, S, D).
            past: (B, P, D) what precedes the first block.

        Returns:
            (B, N, P + S, D), and the last P frames (B, P, D) for the blocks that follow.
        """
        num_past = past.size(1)
        if num_past == 0:
            return blocks, past
        frames = torch.cat([past.to(blocks.dtype), self.join(blocks)], 1)
        windows = frames.unfold(1, num_past, self.chunk)[:, : blocks.size(1)].transpose(2, 3)
        return torch.cat([windows, blocks], 2), frames[:, -num_past:]
