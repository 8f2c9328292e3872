"""What a streaming recogniser may rely on in an encoder, and what the encoders share.

B utterances or streams, T input frames (usually of 10 ms), F input width, T' frames after the time
reduction, D output width, N blocks, C frames of a chunk, R of right context, L of left context
(``chunk_size``, ``right_context`` and ``left_context`` are the same in input frames).
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from espnet_llm_plugin.encoder.blocks import Layout
from espnet_llm_plugin.encoder.subsampling import AbsStreamingSubsampling
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown

LayerState = tuple[Tensor, ...]


@dataclass(frozen=True)
class StreamState:
    """All that is kept of B streams that began together; never changed, so it can be kept.

    Attributes:
        chunk: C.
        received: input frames given so far, padding of ended streams included.
        lengths: (B,) input frames of each stream so far.
        start: frame (after the time reduction) at which the next chunk begins.
        subsampling: state of the time reduction.
        pending: (B, n, D) reduced frames, from ``start``, that wait for the rest of their chunk
            and its right context.
        layers: state of each layer.
    """

    chunk: int
    received: int
    lengths: Tensor
    start: int
    subsampling: tuple[Tensor, ...]
    pending: Tensor
    layers: tuple[LayerState, ...]


class Encoded(NamedTuple):
    """Encoder output: frames (B, n, D), zero beyond the lengths (B,) of the streams."""

    frames: Tensor
    lengths: Tensor


class AbsStreamingEncoder(AbsEncoder):
    """Encoder in chunks: trained in parallel, run on streams, with the same result.

    :meth:`forward` is ESPnet's interface; it encodes whole utterances as a stream would be, in
    chunks of ``chunk_size``. On a stream::

        state = encoder.initial_state(batch_size=1)
        for frames in stream:                                # (1, any number, F)
            encoded, state = encoder.infer(frames, state)    # what became ready, perhaps nothing
        encoded = encoder.finish(state)                      # the rest

    Output frame j stands for input frames [subsampling * j, subsampling * (j + 1)). The outputs of
    the chunk [s, s + chunk_size) depend on input frames before s + chunk_size + right_context and
    on no others.

    Args:
        name: registered name, for error messages.
        subsampling: the time reduction.
        output_size: D.
        chunk_size: input frames of a chunk; None: whole utterances, which cannot be streamed.
        left_context: input frames before a chunk that attention sees. Every layer sees so far,
            so the first of n layers depends on up to n times as many.
        right_context: input frames after a chunk that its outputs depend on.
        dynamic_chunk_sizes: in training draw the chunk size of each batch from these.
        full_context_probability: in training encode so many batches as whole utterances.
        gradient_checkpointing: compute the layers again in the backward pass instead of keeping
            what they computed: less memory, a third more time.
        unknown: options that no encoder has; refused.

    Attributes:
        layers: what :meth:`encode_block_layer` is called for, one after another.

    Raises:
        UserError: sizes that are no multiple of the time reduction, a right context longer than
            a chunk, misspelt options.
    """

    layers: Sequence[torch.nn.Module]

    def __init__(
        self,
        name: str,
        subsampling: AbsStreamingSubsampling,
        output_size: int,
        chunk_size: Optional[int],
        left_context: int,
        right_context: int,
        dynamic_chunk_sizes: Optional[Sequence[int]],
        full_context_probability: float,
        gradient_checkpointing: bool,
        unknown: Mapping[str, Any],
    ):
        refuse_unknown(
            f"encoder_conf of {name!r}", unknown, type(self).__init__, ("self", "input_size")
        )
        super().__init__()
        self.reduction = subsampling
        self._output_size = output_size
        self._check_frames("left_context", left_context, least=0)
        self._check_frames("right_context", right_context, least=0)
        self.left_context = left_context
        self.right_context = right_context
        self.set_chunk_size(chunk_size)
        self.dynamic_chunk_sizes = list(dynamic_chunk_sizes or ())
        for size in self.dynamic_chunk_sizes:
            self._check_chunk_size(size, "dynamic_chunk_sizes")
        if not 0 <= full_context_probability <= 1:
            raise UserError(
                "encoder_conf: full_context_probability must lie between 0 and 1, got "
                f"{full_context_probability}"
            )
        self.full_context_probability = full_context_probability
        self.gradient_checkpointing = gradient_checkpointing

    # what a layer does

    @abstractmethod
    def embed(self, frames: Tensor) -> Tensor:
        """Reduced frames (B, T', D) -> input of the first layer (B, T', D)."""

    @abstractmethod
    def initial_layer_states(self, like: Tensor, left: int) -> tuple[LayerState, ...]:
        """States before the first frame of streams, batch size, device and dtype as ``like``.

        Args:
            like: (B, T', D).
            left: L.
        """

    def prepare(self, blocks: Tensor, layout: Layout) -> Any:
        """What all layers need to know of the layout, computed once."""
        return None

    @abstractmethod
    def encode_block_layer(
        self, layer: torch.nn.Module, blocks: Tensor, layout: Layout, state: LayerState, common: Any
    ) -> tuple[Tensor, LayerState]:
        """Blocks (B, N, C + R, D) through one layer; the same shape, and the new state.

        ``common`` is what :meth:`prepare` returned.
        """

    @abstractmethod
    def normalise_output(self, frames: Tensor) -> Tensor:
        """Output of the last layer (B, T', D) -> encoder output (B, T', D)."""

    # geometry

    @property
    def subsampling(self) -> int:
        """Input frames per output frame."""
        return self.reduction.factor

    def output_size(self) -> int:
        return self._output_size

    def set_chunk_size(self, chunk_size: Optional[int]) -> None:
        """Choose the chunk size, in input frames, of :meth:`forward` and of streams begun later.

        Decoding may use another chunk size than the one in the configuration; a model trained with
        ``dynamic_chunk_sizes`` is made for that. None: whole utterances.
        """
        if chunk_size is not None:
            self._check_chunk_size(chunk_size, "chunk_size")
        self.chunk_size = chunk_size

    def _check_chunk_size(self, chunk_size: int, what: str) -> None:
        self._check_frames(what, chunk_size, least=1)
        if self.right_context > chunk_size:
            raise UserError(
                f"encoder_conf: right_context ({self.right_context}) is longer than the chunk "
                f"({what}: {chunk_size} input frames); look ahead less or use longer chunks"
            )

    def _check_frames(self, what: str, frames: int, least: int) -> None:
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < least:
            raise UserError(
                f"encoder_conf: {what} must be a number of input frames, at least {least}; got "
                f"{frames!r}"
            )
        if frames % self.subsampling:
            lower = frames - frames % self.subsampling
            raise UserError(
                f"encoder_conf: {what} ({frames} input frames) must be a multiple of subsampling "
                f"({self.subsampling}), for example {lower or self.subsampling}"
            )

    def algorithmic_latency_ms(self, frame_shift_ms: float) -> float:
        """Chunk and right context: the longest that an input frame waits for its output.

        The frontend's analysis window comes on top; see :mod:`espnet_llm_plugin.encoder.latency`.
        Infinite without chunks.
        """
        if self.chunk_size is None:
            return float("inf")
        return (self.chunk_size + self.right_context) * frame_shift_ms

    def extra_repr(self) -> str:
        chunk = "none (not streaming)" if self.chunk_size is None else self.chunk_size
        return (
            f"input frames: subsampling={self.subsampling}, chunk_size={chunk}, "
            f"left_context={self.left_context}, right_context={self.right_context}, algorithmic "
            f"latency={self.algorithmic_latency_ms(1):g}"
        )

    # whole utterances

    def forward(
        self, xs_pad: Tensor, ilens: Tensor, prev_states: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor, None]:
        """Encode whole utterances exactly as streams in chunks would be.

        Args:
            xs_pad: (B, T, F); padding does not matter.
            ilens: (B,).
            prev_states: part of ESPnet's interface, unused.

        Returns:
            (B, T', D), zero beyond the lengths; the lengths ceil(ilens / subsampling) (B,); None.
        """
        factor = self.subsampling
        xs_pad = _mask_padding(xs_pad[:, : int(ilens.max())], ilens)
        frames = self.embed(self.reduction(xs_pad))
        lengths = (ilens.to(frames.device) + factor - 1) // factor
        chunk_size, right = self._draw_chunk_size(), self.right_context // factor
        if chunk_size is None:
            chunk, right = frames.size(1), 0
        else:
            chunk = chunk_size // factor
        num_blocks = -(-frames.size(1) // chunk)
        left = min(self.left_context // factor, (num_blocks - 1) * chunk)
        layout = Layout.make(num_blocks, chunk, right, left, 0, lengths)
        states = self.initial_layer_states(frames, left)
        padded = pad(frames, (0, 0, 0, num_blocks * chunk + right - frames.size(1)))
        encoded, _ = self._encode(padded, layout, states)
        return _mask_padding(encoded[:, : frames.size(1)], lengths), lengths, None

    def _draw_chunk_size(self) -> Optional[int]:
        if not self.training:
            return self.chunk_size
        if self.full_context_probability and torch.rand(()) < self.full_context_probability:
            return None
        if self.dynamic_chunk_sizes:
            choice = int(torch.randint(len(self.dynamic_chunk_sizes), ()))
            return self.dynamic_chunk_sizes[choice]
        return self.chunk_size

    def _encode(
        self, frames: Tensor, layout: Layout, states: tuple[LayerState, ...]
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """(B, N * C + R, D) -> (B, N * C, D) and the new states of the layers."""
        blocks = layout.cut(frames)
        common = self.prepare(blocks, layout)
        new_states = []
        for layer, state in zip(self.layers, states):
            arguments = (layer, blocks, layout, state, common)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                blocks, state = checkpoint(self.encode_block_layer, *arguments, use_reentrant=False)
            else:
                blocks, state = self.encode_block_layer(*arguments)
            new_states.append(state)
        return self.normalise_output(layout.join(blocks)), tuple(new_states)

    # streams

    def initial_state(self, batch_size: int = 1) -> StreamState:
        """State of ``batch_size`` streams that begin together, with the chunk size set now.

        Raises:
            UserError: no chunk size is set.
        """
        if self.chunk_size is None:
            raise UserError(
                "an encoder without chunks (chunk_size: null) cannot stream; set a chunk size, "
                "as one of those it was trained with"
            )
        if self.training:
            raise UserError("streams need the encoder in evaluation mode; call eval() first")
        weight = next(self.parameters())
        like = weight.new_zeros(batch_size, 0, self._output_size)
        return StreamState(
            chunk=self.chunk_size // self.subsampling,
            received=0,
            lengths=torch.zeros(batch_size, dtype=torch.long, device=weight.device),
            start=0,
            subsampling=self.reduction.initial_state(like),
            pending=like,
            layers=self.initial_layer_states(like, self.left_context // self.subsampling),
        )

    @torch.no_grad()
    def infer(
        self, frames: Tensor, state: StreamState, lengths: Optional[Tensor] = None
    ) -> tuple[Encoded, StreamState]:
        """The next frames of streams; encodes the chunks that are complete with right context.

        Args:
            frames: (B, T, F), any T >= 0.
            state: from :meth:`initial_state` or the last call; it stays valid.
            lengths: (B,) frames of each stream, if a stream ends before T; it must get 0 in all
                later calls. Default: T for all.

        Returns:
            What became ready, B x a multiple of C frames, perhaps 0; and the new state.

        Raises:
            UserError: wrong shape, or frames for a stream that has ended.
        """
        self._check_input(frames, state, lengths)
        if lengths is None:
            lengths = torch.full_like(state.lengths, frames.size(1))
        else:
            lengths = lengths.to(state.lengths)
            frames = _mask_padding(frames, lengths)
        reduced, subsampling = self.reduction.infer(frames, state.subsampling)
        state = replace(
            state,
            received=state.received + frames.size(1),
            lengths=state.lengths + lengths,
            subsampling=subsampling,
            pending=self._append(state.pending, reduced),
        )
        ready = (state.pending.size(1) - self.right_context // self.subsampling) // state.chunk
        return self._advance(state, max(ready, 0))

    @torch.no_grad()
    def finish(self, state: StreamState) -> Encoded:
        """What is left when all streams have ended: B x the frames not yet returned."""
        pending = self._append(state.pending, self.reduction.finish(state.subsampling))
        num_blocks = -(-pending.size(1) // state.chunk)
        size = num_blocks * state.chunk + self.right_context // self.subsampling
        padded = pad(pending, (0, 0, 0, size - pending.size(1)))
        frames, lengths = self._advance(replace(state, pending=padded), num_blocks)[0]
        return Encoded(frames[:, : pending.size(1)], lengths)

    def _append(self, pending: Tensor, reduced: Optional[Tensor]) -> Tensor:
        if reduced is None:
            return pending
        return torch.cat([pending, self.embed(reduced)], 1)

    def _advance(self, state: StreamState, num_blocks: int) -> tuple[Encoded, StreamState]:
        """Encode the next ``num_blocks`` chunks of ``state.pending``."""
        if not num_blocks:
            return Encoded(state.pending[:, :0], torch.zeros_like(state.lengths)), state
        factor, size = self.subsampling, num_blocks * state.chunk
        right, left = self.right_context // factor, self.left_context // factor
        ends = (state.lengths + factor - 1) // factor
        layout = Layout.make(num_blocks, state.chunk, right, left, state.start, ends)
        frames, layers = self._encode(state.pending[:, : size + right], layout, state.layers)
        lengths = (ends - state.start).clamp(0, size)
        state = replace(
            state, start=state.start + size, pending=state.pending[:, size:], layers=layers
        )
        return Encoded(_mask_padding(frames, lengths), lengths), state

    def _check_input(self, frames: Tensor, state: StreamState, lengths: Optional[Tensor]) -> None:
        expected = (state.lengths.numel(), self.reduction.input_size)
        if frames.dim() != 3 or (frames.size(0), frames.size(2)) != expected:
            raise UserError(
                f"expected frames of shape ({expected[0]} streams, frames, {expected[1]} "
                f"features), got {tuple(frames.shape)}"
            )
        if lengths is None:
            lengths = torch.full_like(state.lengths, frames.size(1))
        lengths = lengths.to(state.lengths)
        resumed = (state.lengths < state.received) & (lengths > 0)
        if frames.size(1) and bool(resumed.any()):
            raise UserError(
                f"stream {int(resumed.nonzero()[0])} has ended, but was given more frames; begin "
                "a new one with initial_state"
            )


def _mask_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, D) with zeros beyond the lengths (B,)."""
    inside = torch.arange(x.size(1), device=x.device) < lengths.to(x.device)[:, None]
    # not a product: padding may be anything, NaN included
    return x.masked_fill(~inside[:, :, None], 0.0)
