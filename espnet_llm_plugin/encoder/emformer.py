"""Emformer (arXiv 2010.10759) as an ESPnet encoder.

The parameters, their names and their initialisation are those of ``torchaudio.models.Emformer``.
They are applied block by block (:mod:`espnet_llm_plugin.encoder.blocks`), because torchaudio's own
``forward`` needs memory quadratic in the utterance's length and a fixed segment, and its ``infer``
attends to padding when a stream ends within a segment. No memory bank: segments as short as those
of a transducer do without (arXiv 2010.10759, section 3.2).

B utterances or streams, N blocks, S frames of a block, P = L + S frames it attends to, D width,
H heads.
"""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torchaudio.models import Emformer

from espnet_llm_plugin.encoder.blocks import Layout
from espnet_llm_plugin.encoder.streaming import AbsStreamingEncoder, LayerState
from espnet_llm_plugin.encoder.subsampling import FrameStacking
from espnet_llm_plugin.errors import UserError

_ACTIVATIONS = ("gelu", "relu", "silu")


class EmformerEncoder(AbsStreamingEncoder):
    """Linear layer and frame stacking, then Emformer layers; the defaults are the paper's scale.

    20 layers of 512, segments of 160 ms with 40 ms of right context (Transducer-Llama, arXiv
    2412.16464, LibriSpeech; the same shape as torchaudio's ``emformer_rnnt_base``).

    Args:
        input_size: F, features of a frame.
        output_size: D.
        attention_heads: H.
        linear_units: width of the feed-forward layers.
        num_blocks: layers.
        dropout_rate: of attention weights, attention and feed-forward layers.
        activation_type: ``gelu``, ``relu`` or ``silu``.
        subsampling: frames stacked to one.
        chunk_size: input frames of a segment.
        left_context: input frames of left context.
        right_context: input frames of right context.
        dynamic_chunk_sizes: see :class:`AbsStreamingEncoder`.
        full_context_probability: see :class:`AbsStreamingEncoder`.
        gradient_checkpointing: see :class:`AbsStreamingEncoder`.

    Raises:
        UserError: see :class:`AbsStreamingEncoder`; a width that is no multiple of the heads.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int = 512,
        attention_heads: int = 8,
        linear_units: int = 2048,
        num_blocks: int = 20,
        dropout_rate: float = 0.1,
        activation_type: str = "gelu",
        subsampling: int = 4,
        chunk_size: Optional[int] = 16,
        left_context: int = 120,
        right_context: int = 4,
        dynamic_chunk_sizes: Optional[Sequence[int]] = None,
        full_context_probability: float = 0.0,
        gradient_checkpointing: bool = False,
        **unknown: Any,
    ):
        super().__init__(
            "emformer",
            FrameStacking(input_size, output_size, subsampling),
            output_size,
            chunk_size,
            left_context,
            right_context,
            dynamic_chunk_sizes,
            full_context_probability,
            gradient_checkpointing,
            unknown,
        )
        check_heads(output_size, attention_heads)
        if activation_type not in _ACTIVATIONS:
            raise UserError(
                f"encoder_conf of 'emformer': unknown activation_type {activation_type!r}; choose "
                f"one of: {', '.join(_ACTIVATIONS)}"
            )
        self.emformer = Emformer(
            input_dim=output_size,
            num_heads=attention_heads,
            ffn_dim=linear_units,
            num_layers=num_blocks,
            segment_length=1,  # of torchaudio's forward and infer, which are not used
            dropout=dropout_rate,
            activation=activation_type,
        )

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        return self.emformer.emformer_layers

    def embed(self, frames: Tensor) -> Tensor:
        return frames

    def normalise_output(self, frames: Tensor) -> Tensor:
        return frames  # each layer ends with a normalisation

    def initial_layer_states(self, like: Tensor, left: int) -> tuple[LayerState, ...]:
        keys_and_values = like.new_zeros(like.size(0), left, 2 * self.output_size())
        return tuple((keys_and_values,) for _ in self.layers)

    def encode_block_layer(
        self, layer: torch.nn.Module, blocks: Tensor, layout: Layout, state: LayerState, common: Any
    ) -> tuple[Tensor, LayerState]:
        attention = layer.attention
        normalised = layer.layer_norm_input(blocks)
        query = attention.emb_to_query(normalised)
        own = attention.emb_to_key_value(normalised)
        seen, past = layout.with_past(own, state[0])
        heads = [
            x.flatten(0, 1).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for x in (query, *seen.chunk(2, dim=-1))
        ]  # each (B * N, H, S or P, D / H)
        attended = scaled_dot_product_attention(
            *heads,
            attn_mask=layout.valid_keys.flatten(0, 1)[:, None, None],
            dropout_p=attention.dropout if self.training else 0.0,
        )
        attended = attention.out_proj(attended.transpose(1, 2).flatten(2)).view_as(blocks)
        x = layer.dropout(attended) + blocks
        return layer.layer_norm_output(layer.pos_ff(x) + x), (past,)


def check_heads(output_size: int, attention_heads: int) -> None:
    """Raise :class:`UserError` unless the width can be divided among the heads."""
    if attention_heads < 1 or output_size % attention_heads:
        raise UserError(
            f"encoder_conf: output_size ({output_size}) must be a multiple of attention_heads "
            f"({attention_heads})"
        )
