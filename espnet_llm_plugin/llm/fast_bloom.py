"""BLOOM without the modules around its weights, see :mod:`.fast_decoder`.

N: prefixes in one call, H: heads, D: head dimension, E: model width = H D, V: vocabulary.

BLOOM knows positions by what it adds to the attention scores, ALiBi [arXiv 2108.12409]: slope_h p
in head h for a key at position p. A product of queries and keys with two more dimensions is the
same, so that keys carry their position and attention can be anyone's:

    [q, slope_h, 256 slope_h] [k, p mod 256, p div 256] = q k + slope_h p

The two parts of a position are exact in bfloat16.
"""

import math
from typing import Any, Callable, NamedTuple, Optional

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

# Of a head beyond D: two for the position, the others are zero, as attention kernels want multiples
# of eight.
MORE = 8
_BASE = 256


class _Layer(NamedTuple):
    """Weights of a layer; norms and projections are (weight, bias)."""

    norm: tuple
    qkv: tuple
    out: tuple
    mlp_norm: tuple
    up: tuple
    down: tuple


class FastBloom(FastDecoder):
    """BLOOM.

    Args:
        model: For which :func:`why_not_fast` has no reason.
    """

    alone = True

    def __init__(self, model: Any):
        config = model.config
        self.heads = self.kv_heads = config.n_head
        self.windows = [None] * config.n_layer
        self.eps = config.layer_norm_epsilon
        self._size = config.hidden_size // config.n_head
        self._normed_residual = config.apply_residual_connection_post_layernorm
        super().__init__(model)

    def _load(self, size: int) -> None:
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        decoder = self._model.transformer
        self._layers = [
            _Layer(
                norm=weights_of(layer.input_layernorm),
                qkv=weights_of(layer.self_attention.query_key_value),
                out=weights_of(layer.self_attention.dense),
                mlp_norm=weights_of(layer.post_attention_layernorm),
                up=weights_of(layer.mlp.dense_h_to_4h),
                down=weights_of(layer.mlp.dense_4h_to_h),
            )
            for layer in decoder.h
        ]
        self._embedding = decoder.word_embeddings.weight
        self._first_norm = weights_of(decoder.word_embeddings_layernorm)
        self._norm = weights_of(decoder.ln_f)
        self._head = weights_of(self._model.lm_head)
        # Attention divides by the root of the dimension that it sees.
        width = self._size + MORE
        self._scale = math.sqrt(width / self._size)
        two = torch.ones(1, 2, device=self._embedding.device)
        slopes = build_alibi_tensor(two, self.heads, torch.float32)[:, 0, 1]
        more = torch.zeros(self.heads, MORE, device=slopes.device)
        more[:, 0], more[:, 1] = math.sqrt(width) * slopes, math.sqrt(width) * _BASE * slopes
        self._slopes = more.to(self._embedding.dtype)

    def forward(self, tokens: Tensor, positions: Tensor, length: int, attend: Attend) -> Tensor:
        """See the base class; D is MORE larger."""
        x = self._normed(functional.embedding(tokens, self._embedding), self._first_norm)
        places = self._places(positions)
        for n, layer in enumerate(self._layers):
            y = self._normed(x, layer.norm)
            x = self._rest(layer, x, y, attend(n, self._heads(layer, y, places)))
        return functional.linear(self._normed(x, self._norm), *self._head)

    def fill(
        self,
        embeddings: Tensor,
        positions: Tensor,
        length: int,
        write: Callable[[int, Tensor], None],
        attend: Attend,
    ) -> None:
        """See the base class; D is MORE larger."""
        x, last = self._normed(embeddings, self._first_norm), len(self._layers) - 1
        places = self._places(positions)
        for n, layer in enumerate(self._layers):
            y = self._normed(x, layer.norm)
            qkv = self._heads(layer, y, places)
            write(n, qkv[:, self.heads :])
            if n < last:
                x = self._rest(layer, x, y, attend(n, qkv[:, : self.heads]))

    def _normed(self, x: Tensor, part: tuple) -> Tensor:
        return functional.layer_norm(x, (x.size(-1),), *part, self.eps)

    def _places(self, positions: Tensor) -> Tensor:
        """What keys have of their positions (N): (N, H, MORE)."""
        places = self._slopes.new_zeros(len(positions), 1, MORE)
        places[:, 0, 0] = (positions % _BASE).to(places)
        places[:, 0, 1] = (positions // _BASE).to(places)
        return places.expand(-1, self.heads, -1)

    def _heads(self, layer: _Layer, y: Tensor, places: Tensor) -> Tensor:
        """Queries, keys and values (N, 3 H, D + MORE) of normed inputs (N, E)."""
        qkv = functional.linear(y, *layer.qkv).view(len(y), self.heads, 3, self._size)
        query, key, value = qkv.unbind(2)
        query = torch.cat([query * self._scale, self._slopes.expand(len(y), -1, -1)], dim=2)
        key = torch.cat([key, places], dim=2)
        return torch.cat([query, key, functional.pad(value, (0, MORE))], dim=1)

    def _rest(self, layer: _Layer, x: Tensor, y: Tensor, found: Tensor) -> Tensor:
        """The residual stream (N, E) after a layer whose attention has found (N, ...); ``y`` is its
        normed input."""
        found = found.reshape(len(x), self.heads, -1)[..., : self._size].flatten(1)
        x = add_projected(y if self._normed_residual else x, found, layer.out)
        y = self._normed(x, layer.mlp_norm)
        up = functional.gelu(functional.linear(y, *layer.up), approximate="tanh")
        return add_projected(y if self._normed_residual else x, up, layer.down)


def why_not_fast(model: Any) -> Optional[str]:
    """Why :class:`FastBloom` cannot replace the model's own forward; None: it can."""
    if getattr(getattr(model, "config", None), "model_type", None) != "bloom":
        return f"model type {getattr(getattr(model, 'config', None), 'model_type', None)}"
    linear = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head")
    return why_not_as_stored(model, linear.__contains__)
