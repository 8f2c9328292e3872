"""Streaming Conformer: chunked attention with limited left context, causal convolution, look-ahead.

The layers are ESPnet's macaron Conformer layers with two differences: the convolution looks only
back, and it is normalised by frame (layer norm) instead of over the batch, padding included.

B utterances or streams, T' frames, N blocks, S frames of a block, L of left context, D width,
K convolution kernel.
"""

import math
from typing import Any, Optional, Sequence

import torch
from espnet.nets.pytorch_backend.nets_utils import get_activation
from espnet.nets.pytorch_backend.transformer.layer_norm import LayerNorm
from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import (
    PositionwiseFeedForward,
)
from torch import Tensor
from torch.nn.functional import glu

from espnet_llm_plugin.encoder.blocks import Layout
from espnet_llm_plugin.encoder.emformer import check_heads
from espnet_llm_plugin.encoder.relative_attention import (
    BlockRelPositionAttention,
    embed_distances,
)
from espnet_llm_plugin.encoder.streaming import AbsStreamingEncoder, LayerState
from espnet_llm_plugin.encoder.subsampling import CausalConv2dSubsampling, FrameStacking
from espnet_llm_plugin.errors import UserError

_INPUT_LAYERS = {"conv2d": CausalConv2dSubsampling, "stacking": FrameStacking}
_ACTIVATIONS = ("swish", "relu", "hardtanh", "tanh", "selu")


class StreamingConformerEncoder(AbsStreamingEncoder):
    """Conformer in chunks (30 layers in Transducer-Llama, arXiv 2412.16464, MLS).

    Args:
        input_size: F, features of a frame.
        output_size: D.
        attention_heads: number of heads.
        linear_units: width of the feed-forward layers.
        num_blocks: layers.
        cnn_module_kernel: K, frames (after the time reduction) that the convolution spans.
        dropout_rate: of every module of a layer.
        positional_dropout_rate: of the first layer's input and of the distances.
        attention_dropout_rate: of attention weights.
        activation_type: ``swish``, ``relu``, ``hardtanh``, ``tanh`` or ``selu``.
        input_layer: ``conv2d`` (causal) or ``stacking``.
        subsampling: input frames per output frame.
        subsampling_channels: channels of ``conv2d``, None: D. The convolutions take much of the
            time of a small model: with D = 128 and four layers more than a third.
        chunk_size: input frames of a chunk.
        left_context: input frames of left context of the attention.
        right_context: input frames of look-ahead; 0: none.
        dynamic_chunk_sizes: see :class:`AbsStreamingEncoder`.
        full_context_probability: see :class:`AbsStreamingEncoder`.
        gradient_checkpointing: see :class:`AbsStreamingEncoder`.

    Raises:
        UserError: see :class:`AbsStreamingEncoder`; a width that is no multiple of the heads, an
            unknown input layer or activation.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int = 512,
        attention_heads: int = 8,
        linear_units: int = 2048,
        num_blocks: int = 30,
        cnn_module_kernel: int = 15,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        activation_type: str = "swish",
        input_layer: str = "conv2d",
        subsampling: int = 4,
        subsampling_channels: Optional[int] = None,
        chunk_size: Optional[int] = 16,
        left_context: int = 128,
        right_context: int = 0,
        dynamic_chunk_sizes: Optional[Sequence[int]] = None,
        full_context_probability: float = 0.0,
        gradient_checkpointing: bool = False,
        **unknown: Any,
    ):
        _check_choice("input_layer", input_layer, tuple(_INPUT_LAYERS))
        _check_choice("activation_type", activation_type, _ACTIVATIONS)
        check_heads(output_size, attention_heads)
        if cnn_module_kernel < 1:
            raise UserError(
                f"encoder_conf: cnn_module_kernel must be at least 1, got {cnn_module_kernel}"
            )
        reduction = {}
        if subsampling_channels is not None:
            if input_layer != "conv2d":
                raise UserError(
                    "encoder_conf: subsampling_channels are those of input_layer conv2d, got "
                    f"input_layer {input_layer!r}"
                )
            reduction["channels"] = subsampling_channels
        super().__init__(
            "streaming_conformer",
            _INPUT_LAYERS[input_layer](input_size, output_size, subsampling, **reduction),
            output_size,
            chunk_size,
            left_context,
            right_context,
            dynamic_chunk_sizes,
            full_context_probability,
            gradient_checkpointing,
            unknown,
        )
        self.kernel = cnn_module_kernel
        self.positional_dropout = torch.nn.Dropout(positional_dropout_rate)
        self.layers = torch.nn.ModuleList(
            StreamingConformerLayer(
                output_size,
                attention_heads,
                linear_units,
                cnn_module_kernel,
                dropout_rate,
                attention_dropout_rate,
                activation_type,
            )
            for _ in range(num_blocks)
        )
        self.after_norm = LayerNorm(output_size)

    def embed(self, frames: Tensor) -> Tensor:
        return self.positional_dropout(frames * math.sqrt(self.output_size()))

    def normalise_output(self, frames: Tensor) -> Tensor:
        return self.after_norm(frames)

    def initial_layer_states(self, like: Tensor, left: int) -> tuple[LayerState, ...]:
        width = self.output_size()
        keys_and_values = like.new_zeros(like.size(0), left, 2 * width)
        convolution = like.new_zeros(like.size(0), self.kernel - 1, width)
        return tuple((keys_and_values, convolution) for _ in self.layers)

    def prepare(self, blocks: Tensor, layout: Layout) -> Tensor:
        num_queries = blocks.size(2)
        distances = embed_distances(num_queries, layout.left + num_queries, like=blocks)
        return self.positional_dropout(distances)

    def encode_block_layer(
        self, layer: torch.nn.Module, blocks: Tensor, layout: Layout, state: LayerState, common: Any
    ) -> tuple[Tensor, LayerState]:
        return layer(blocks, layout, state, common)


class StreamingConformerLayer(torch.nn.Module):
    """Half feed-forward, attention, causal convolution, half feed-forward, each pre-normalised."""

    def __init__(
        self,
        size: int,
        heads: int,
        linear_units: int,
        kernel: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        activation: str,
    ):
        super().__init__()
        feed_forward = (size, linear_units, dropout_rate)
        self.feed_forward_macaron = PositionwiseFeedForward(
            *feed_forward, get_activation(activation)
        )
        self.self_attn = BlockRelPositionAttention(heads, size, attention_dropout_rate)
        self.conv_module = CausalConvolution(size, kernel, get_activation(activation))
        self.feed_forward = PositionwiseFeedForward(*feed_forward, get_activation(activation))
        self.norm_ff_macaron = LayerNorm(size)
        self.norm_mha = LayerNorm(size)
        self.norm_conv = LayerNorm(size)
        self.norm_ff = LayerNorm(size)
        self.norm_final = LayerNorm(size)
        self.dropout = torch.nn.Dropout(dropout_rate)

    def forward(
        self, x: Tensor, layout: Layout, state: LayerState, distances: Tensor
    ) -> tuple[Tensor, LayerState]:
        """Blocks (B, N, S, D) -> the same, and the state for the blocks that follow.

        Args:
            x: (B, N, S, D).
            layout: what lies where.
            state: keys and values (B, L, 2 D) and convolution input (B, K - 1, D) before them.
            distances: (L + 2 S - 1, D), embedded.
        """
        keys_and_values, convolved = state
        x = x + 0.5 * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        attended, keys_and_values = self.self_attn(
            self.norm_mha(x), layout, keys_and_values, distances
        )
        x = x + self.dropout(attended)
        local, convolved = self.conv_module(self.norm_conv(x), layout, convolved)
        x = x + self.dropout(local)
        x = x + 0.5 * self.dropout(self.feed_forward(self.norm_ff(x)))
        return self.norm_final(x), (keys_and_values, convolved)


class CausalConvolution(torch.nn.Module):
    """Conformer's convolution module (arXiv 2005.08100, figure 2) without a future."""

    def __init__(self, size: int, kernel: int, activation: torch.nn.Module):
        super().__init__()
        self.pointwise_conv1 = torch.nn.Linear(size, 2 * size)
        self.depthwise_conv = torch.nn.Conv1d(size, size, kernel, groups=size)
        self.norm = LayerNorm(size)
        self.activation = activation
        self.pointwise_conv2 = torch.nn.Linear(size, size)

    def forward(self, blocks: Tensor, layout: Layout, past: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks (B, N, S, D) and the input (B, K - 1, D) before them -> the same shapes."""
        gated = glu(self.pointwise_conv1(blocks))
        seen, past = layout.with_past(gated, past)
        convolved = self.depthwise_conv(seen.flatten(0, 1).transpose(1, 2)).transpose(1, 2)
        convolved = self.activation(self.norm(convolved)).view_as(blocks)
        return self.pointwise_conv2(convolved), past


def _check_choice(option: str, given: str, valid: Sequence[str]) -> None:
    if given not in valid:
        raise UserError(
            f"encoder_conf of 'streaming_conformer': unknown {option} {given!r}; choose one of: "
            f"{', '.join(valid)}"
        )
