"""LLaMA-like decoders without the modules around their weights, see :mod:`.fast_decoder`.

N: prefixes in one call, D: head dimension, H: key/value heads, G: query heads of each of them,
E: model width, F: feed-forward width, V: vocabulary.
"""

from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from espnet_llm_plugin.llm.fast_decoder import (
    Attend,
    FastDecoder,
    add_projected,
    weights_of,
    why_not_as_stored,
)

# Families whose layers are exactly these, by `model_type`.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Frequencies that depend on the longest prefix of a call cannot be tabulated.
_MOVING_FREQUENCIES = ("dynamic", "longrope")
# Projections with one input become one matrix, which costs a copy, in models up to this size: there
# the number of operations counts, in larger ones their size.
MAX_FUSED_BYTES = 64 * 2**20


class _Layer(NamedTuple):
    """Weights of a layer; a projection is a list of (weight, bias), side by side."""

    norm: Tensor  # (E)
    qkv: list
    head_norm: Optional[Tensor]  # (H G + H, D): of queries and keys
    out: tuple
    mlp_norm: Tensor
    gate_up: list
    down: tuple


class FastLlama(FastDecoder):
    """LLaMA, Mistral, Qwen2 and Qwen3.

    Args:
        model: For which :func:`why_not_fast` has no reason. Weights of small models are copied, see
            ``MAX_FUSED_BYTES``.
    """

    def __init__(self, model: Any):
        config = self._config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.windows = windows(config)
        self.eps = config.rms_norm_eps
        self._moving = model.model.rotary_emb.rope_type in _MOVING_FREQUENCIES
        super().__init__(model)

    def _load(self, size: int) -> None:
        decoder = self._model.model
        self._layers = [
            self._layer(layer, fuse=size <= MAX_FUSED_BYTES) for layer in decoder.layers
        ]
        self._tables = None
        self._embedding, self._norm = decoder.embed_tokens.weight, decoder.norm.weight
        self._head = weights_of(self._model.lm_head)

    def _layer(self, layer: Any, fuse: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight, self.heads), (attention.k_norm.weight, self.kv_heads)
            head_norm = torch.cat([weight.expand(number, -1) for weight, number in norms])
        return _Layer(
            norm=layer.input_layernorm.weight,
            qkv=_side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], fuse),
            head_norm=head_norm,
            out=weights_of(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=_side_by_side([mlp.gate_proj, mlp.up_proj], fuse),
            down=weights_of(mlp.down_proj),
        )

    def forward(self, tokens: Tensor, positions: Tensor, length: int, attend: Attend) -> Tensor:
        """See the base class; queries and keys are rotated."""
        rotation = self._rotation(positions, length)
        x = functional.embedding(tokens, self._embedding)
        for n, layer in enumerate(self._layers):
            y = torch.rms_norm(x, layer.norm.shape, layer.norm, self.eps)
            x = self._rest(layer, x, attend(n, self._heads(layer, y, rotation, 0)))
        x = torch.rms_norm(x, self._norm.shape, self._norm, self.eps)
        return functional.linear(x, *self._head)

    def fill(
        self,
        embeddings: Tensor,
        positions: Tensor,
        length: int,
        write: Callable[[int, Tensor], None],
        attend: Attend,
    ) -> None:
        """See the base class; queries and keys are rotated."""
        rotation = self._rotation(positions, length)
        x, last = embeddings, len(self._layers) - 1
        for n, layer in enumerate(self._layers):
            y = torch.rms_norm(x, layer.norm.shape, layer.norm, self.eps)
            qkv = self._heads(layer, y, rotation, self.heads if n == last else 0)
            write(n, qkv[:, -2 * self.kv_heads :])
            if n < last:
                x = self._rest(layer, x, attend(n, qkv[:, : self.heads]))

    def _heads(
        self, layer: _Layer, y: Tensor, rotation: tuple[Tensor, Tensor], first: int
    ) -> Tensor:
        """Queries, keys and values (N, heads, D) of normed inputs (N, E) in one tensor, without the
        ``first`` of them (0, or all queries); queries and keys are rotated."""
        cos, sin = rotation
        parts = _without(layer.qkv, first * cos.size(-1))
        rotated = self.heads + self.kv_heads - first
        qkv = _project(y, parts).view(y.size(0), rotated + self.kv_heads, -1)
        qk = qkv[:, :rotated]
        if layer.head_norm is not None:
            normed = torch.rms_norm(qk, qk.shape[-1:], None, self.eps)
            torch.mul(normed, layer.head_norm[first:], out=qk)
        other = qk.roll(cos.size(-1) // 2, -1)
        qk.mul_(cos).addcmul_(other, sin)
        return qkv

    def _rest(self, layer: _Layer, x: Tensor, found: Tensor) -> Tensor:
        """The residual stream (N, E) after a layer whose attention has found (N, ...)."""
        x = add_projected(x, found.reshape(x.size(0), -1), layer.out)
        y = torch.rms_norm(x, layer.mlp_norm.shape, layer.mlp_norm, self.eps)
        gate, up = _project(y, layer.gate_up).chunk(2, -1)
        return add_projected(x, functional.silu(gate).mul_(up), layer.down)

    def _rotation(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, 1, D) at positions below ``length``, half of the sines negative."""
        if self._moving:
            cos, sin = self._angles(positions[None])
            return cos[0, :, None], sin[0, :, None]
        if self._tables is None or self._tables[0].size(0) < length:
            known = 32 if self._tables is None else self._tables[0].size(0)
            every = torch.arange(max(length, 2 * known), device=positions.device)
            with torch.inference_mode(False):
                cos, sin = self._angles(every[None])
            self._tables = cos[0, :, None], sin[0, :, None]
        cos, sin = self._tables
        return cos[positions], sin[positions]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._model.model.rotary_emb(self._embedding, positions)
        half = sin.size(-1) // 2
        # rotate_half(x) * sin = roll(x, D / 2) * (-sin, sin)
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def windows(config: Any) -> list[Optional[int]]:
    """Tokens that each layer's attention sees, the new one included; None: all."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "llama" or window is None:
        return [None] * layers
    if kinds is None or config.model_type == "mistral":
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def why_not_fast(model: Any) -> Optional[str]:
    """Why :class:`FastLlama` cannot replace the model's own forward; None: it can.

    What a structure does not tell (the meaning of its options) is left to a numeric comparison.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        return f"model type {getattr(config, 'model_type', None)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    return why_not_as_stored(model, lambda name: name.endswith("_proj") or name == "lm_head")


def _side_by_side(linears: Sequence[torch.nn.Linear], fuse: bool) -> list:
    """(weight, bias) of each of several projections of one input, or of all of them as one."""
    parts = [weights_of(linear) for linear in linears]
    if not fuse:
        return parts
    weights, biases = zip(*parts)
    return [(torch.cat(weights), None if biases[0] is None else torch.cat(biases))]


def _without(parts: list, rows: int) -> list:
    """Projections without the first ``rows`` outputs: all of the first one's, if they are apart."""
    if not rows:
        return parts
    if len(parts) > 1:
        return parts[1:]
    ((weight, bias),) = parts
    return [(weight[rows:], None if bias is None else bias[rows:])]


def _project(x: Tensor, parts: list) -> Tensor:
    if len(parts) == 1:
        return functional.linear(x, *parts[0])
    return torch.cat([functional.linear(x, *part) for part in parts], dim=-1)
