"""Time reduction that sees no frame beyond those it reduces, so that it can run on a stream.

Output frame j of both classes covers the input frames [factor * j, factor * (j + 1)) and nothing
later. An utterance whose length is no multiple of the factor is completed with zero frames: T
input frames give ceil(T / factor).

B utterances or streams, T input frames, F input width, D output width, C channels.
"""

from abc import ABC, abstractmethod
from typing import Optional

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError

State = tuple[Tensor, ...]


class AbsStreamingSubsampling(torch.nn.Module, ABC):
    """Whole utterances by :meth:`forward`, pieces of any length by :meth:`infer`.

    Attributes:
        factor: input frames per output frame.
    """

    def __init__(self, input_size: int, factor: int):
        super().__init__()
        if factor < 1:
            raise UserError(f"encoder_conf: subsampling must be at least 1, got {factor}")
        self.input_size = input_size
        self.factor = factor

    @abstractmethod
    def initial_caches(self, like: Tensor) -> State:
        """What precedes the first frame; device, dtype and batch size B are those of ``like``."""

    @abstractmethod
    def reduce(self, frames: Tensor, caches: State) -> tuple[Tensor, State]:
        """(B, factor * n, F) with n > 0, and what precedes them -> (B, n, D), new caches."""

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, F) with zeros as padding -> (B, ceil(T / factor), D)."""
        missing = -frames.size(1) % self.factor
        frames = torch.nn.functional.pad(frames, (0, 0, 0, missing))
        return self.reduce(frames, self.initial_caches(frames))[0]

    def initial_state(self, like: Tensor) -> State:
        """State before the first frame; device, dtype and batch size are those of ``like``."""
        return (like.new_zeros(like.size(0), 0, self.input_size), *self.initial_caches(like))

    def infer(self, frames: Tensor, state: State) -> tuple[Tensor | None, State]:
        """The next T >= 0 frames (B, T, F) -> the n >= 0 frames that they complete.

        Returns:
            (B, n, D), or None if no frame is complete, and the new state.
        """
        rest, *caches = state
        frames = torch.cat([rest, frames], 1)
        whole = frames.size(1) // self.factor * self.factor
        if not whole:
            return None, (frames, *caches)
        reduced, caches = self.reduce(frames[:, :whole], tuple(caches))
        return reduced, (frames[:, whole:], *caches)

    def finish(self, state: State) -> Tensor | None:
        """The last frame (B, 1, D), completed with zeros, or None if nothing is left over."""
        missing = -state[0].size(1) % self.factor
        zeros = state[0].new_zeros(state[0].size(0), missing, self.input_size)
        return self.infer(zeros, state)[0]


class FrameStacking(AbsStreamingSubsampling):
    """Linear layer to D / factor, then ``factor`` frames side by side.

    As in torchaudio's ``emformer_rnnt_base`` (80 -> 128, times 4 -> 512).

    Args:
        input_size: F.
        output_size: D.
        factor: frames to stack.
    """

    def __init__(self, input_size: int, output_size: int, factor: int):
        super().__init__(input_size, factor)
        if output_size % factor:
            raise UserError(
                f"encoder_conf: output_size ({output_size}) must be a multiple of subsampling "
                f"({factor}), because so many frames are stacked"
            )
        self.linear = torch.nn.Linear(input_size, output_size // factor, bias=False)

    def initial_caches(self, like: Tensor) -> State:
        return ()

    def reduce(self, frames: Tensor, caches: State) -> tuple[Tensor, State]:
        n = frames.size(1) // self.factor
        return self.linear(frames).reshape(frames.size(0), n, -1), ()


class CausalConv2dSubsampling(AbsStreamingSubsampling):
    """ESPnet's ``conv2d`` input layer, moved to the left in time.

    Layers of 3 x 3 kernels and stride 2 with ReLU, then a linear layer. Each layer is preceded by
    one frame of the past instead of followed by one of the future.

    Args:
        input_size: F.
        output_size: D.
        factor: 2, 4 or 8.
        channels: C; None: D, as in ESPnet.
    """

    def __init__(
        self, input_size: int, output_size: int, factor: int, channels: Optional[int] = None
    ):
        super().__init__(input_size, factor)
        out_channels = output_size if channels is None else channels
        if out_channels < 1:
            raise UserError(f"encoder_conf: subsampling_channels must be positive, got {channels}")
        if factor not in (2, 4, 8):
            raise UserError(
                f"encoder_conf: subsampling of the input layer 'conv2d' must be 2, 4 or 8, got "
                f"{factor}"
            )
        self.convs = torch.nn.ModuleList()
        self.widths = []  # of each layer's input
        width, in_channels = input_size, 1
        for _ in range(factor.bit_length() - 1):
            if width < 3:
                raise UserError(
                    f"{input_size} features are too few for a time reduction by {factor} with "
                    "the input layer 'conv2d'; use more mel bands (frontend_conf n_mels)"
                )
            self.convs.append(torch.nn.Conv2d(in_channels, out_channels, 3, stride=2))
            self.widths.append(width)
            width, in_channels = (width - 1) // 2, out_channels
        self.linear = torch.nn.Linear(out_channels * width, output_size)

    def initial_caches(self, like: Tensor) -> State:
        return tuple(
            like.new_zeros(like.size(0), conv.in_channels, 1, width)
            for conv, width in zip(self.convs, self.widths)
        )

    def reduce(self, frames: Tensor, caches: State) -> tuple[Tensor, State]:
        x = frames[:, None]  # (B, C, T, F)
        last = []
        for conv, cache in zip(self.convs, caches):
            last.append(x[:, :, -1:])
            x = conv(torch.cat([cache.to(x.dtype), x], 2)).relu()
        return self.linear(x.transpose(1, 2).flatten(2)), tuple(last)
