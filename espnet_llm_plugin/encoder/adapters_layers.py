"""New encoder layers between a trained encoder and the adapter (arXiv 2603.15045: two Conformers).

They see the whole utterance. The attention is that of the streaming Conformer with one block and
no past; the convolution looks both ways and sees zeros beyond the end, so that padding changes
nothing (ESPnet's own convolution reads it).

B utterances, T frames, E width, K convolution kernel.
"""

import torch
from espnet.nets.pytorch_backend.transformer.layer_norm import LayerNorm
from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import (
    PositionwiseFeedForward,
)
from torch import Tensor
from torch.nn.functional import glu

from espnet_llm_plugin.encoder.blocks import Layout
from espnet_llm_plugin.encoder.relative_attention import (
    BlockRelPositionAttention,
    embed_distances,
)
from espnet_llm_plugin.encoder.streaming import LayerState
from espnet_llm_plugin.encoder.streaming_conformer import CausalConvolution, StreamingConformerLayer
from espnet_llm_plugin.errors import UserError

LAYER_TYPES = ("conformer", "transformer")


class ExtraLayers(torch.nn.Module):
    """``num_blocks`` layers, then layer normalisation.

    Args:
        size: E.
        num_blocks: layers.
        layer_type: ``conformer`` or ``transformer`` (pre-norm, relative positions).
        attention_heads: of every layer.
        linear_units: width of the feed-forward layers.
        cnn_module_kernel: K, odd; of the Conformer only.
        dropout_rate: of every module of a layer.
        attention_dropout_rate: of attention weights.

    Raises:
        UserError: Unknown layer type, a width that is no multiple of the heads, an even kernel.
    """

    def __init__(
        self,
        size: int,
        num_blocks: int,
        layer_type: str = "conformer",
        attention_heads: int = 8,
        linear_units: int = 2048,
        cnn_module_kernel: int = 31,
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
    ):
        super().__init__()
        if layer_type not in LAYER_TYPES:
            raise UserError(
                f"extra_layers_conf: unknown layer_type {layer_type!r}; choose one of: "
                f"{', '.join(LAYER_TYPES)}"
            )
        if attention_heads < 1 or size % attention_heads:
            raise UserError(
                f"extra_layers_conf: the encoder's output size ({size}) must be a multiple of "
                f"attention_heads ({attention_heads})"
            )
        if cnn_module_kernel < 1 or cnn_module_kernel % 2 == 0:
            raise UserError(
                f"extra_layers_conf: cnn_module_kernel must be odd, got {cnn_module_kernel}"
            )
        common = (size, attention_heads, linear_units)
        rates = (dropout_rate, attention_dropout_rate)
        self.layers = torch.nn.ModuleList(
            TransformerLayer(*common, *rates)
            if layer_type == "transformer"
            else ConformerLayer(*common, cnn_module_kernel, *rates, "swish")
            for _ in range(num_blocks)
        )
        self.after_norm = LayerNorm(size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, E) with T > 0 and (B,) frames of the utterances -> (B, T, E)."""
        num_frames = frames.size(1)
        layout = Layout.make(1, num_frames, 0, 0, 0, lengths)
        distances = embed_distances(num_frames, num_frames, like=frames)
        blocks = frames[:, None]
        empty = blocks.new_zeros(len(frames), 0, 2 * frames.size(2))
        for layer in self.layers:
            blocks, _ = layer(blocks, layout, (empty, empty), distances)
        return self.after_norm(blocks[:, 0])


class SymmetricConvolution(CausalConvolution):
    """Conformer's convolution module (arXiv 2005.08100, figure 2), normalised by frame."""

    def forward(self, blocks: Tensor, layout: Layout, past: Tensor) -> tuple[Tensor, Tensor]:
        """One block (B, 1, T, E) -> the same shape; there is no past, ``past`` is returned."""
        gated = glu(self.pointwise_conv1(blocks)) * layout.valid_keys[..., None]
        convolved = torch.nn.functional.conv1d(
            gated[:, 0].transpose(1, 2),
            self.depthwise_conv.weight,
            self.depthwise_conv.bias,
            padding="same",
            groups=self.depthwise_conv.groups,
        ).transpose(1, 2)
        convolved = self.activation(self.norm(convolved))[:, None]
        return self.pointwise_conv2(convolved), past


class ConformerLayer(StreamingConformerLayer):
    """Macaron Conformer layer with a convolution that looks both ways."""

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
        super().__init__(
            size, heads, linear_units, kernel, dropout_rate, attention_dropout_rate, activation
        )
        self.conv_module = SymmetricConvolution(size, kernel, self.conv_module.activation)


class TransformerLayer(torch.nn.Module):
    """Attention and feed-forward layer, each pre-normalised."""

    def __init__(
        self,
        size: int,
        heads: int,
        linear_units: int,
        dropout_rate: float,
        attention_dropout_rate: float,
    ):
        super().__init__()
        self.self_attn = BlockRelPositionAttention(heads, size, attention_dropout_rate)
        self.feed_forward = PositionwiseFeedForward(size, linear_units, dropout_rate)
        self.norm_mha = LayerNorm(size)
        self.norm_ff = LayerNorm(size)
        self.dropout = torch.nn.Dropout(dropout_rate)

    def forward(
        self, x: Tensor, layout: Layout, state: LayerState, distances: Tensor
    ) -> tuple[Tensor, LayerState]:
        """Blocks (B, 1, T, E) -> the same; see :class:`StreamingConformerLayer`."""
        attended, _ = self.self_attn(self.norm_mha(x), layout, state[0], distances)
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.norm_ff(x))), state
