"""New tokens of prefixes through a LLaMA-like decoder, without the modules around its weights.

N: prefixes in one call, P: tokens of the longest with the new one, D: head dimension,
H: key/value heads, G: query heads of each of them, E: model width, F: feed-forward width,
V: vocabulary.

A step of a search has few tokens, so that a small model spends most of it between the operations:
module calls, mask making, cache objects. Here a layer is about fifteen operations on the same
weights: four small layers take a third of the time of ``transformers``' forward.
"""

from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from espnet_llm_plugin.llm.kv_pool import KVPool

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
    window: Optional[int]  # tokens seen, itself included


class FastLlama:
    """The forward of a Hugging Face model for one new token of each prefix.

    Args:
        model: For which :func:`why_not_fast` has no reason. Its weights are used where they are
            (except for small models, see ``MAX_FUSED_BYTES``).
    """

    def __init__(self, model: Any):
        self._model = model
        config = self._config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self._moving = model.model.rotary_emb.rope_type in _MOVING_FREQUENCIES
        self._read = None
        self.refresh()

    def refresh(self) -> None:
        """Look at the weights again if they have changed. Not while prefixes are in the pool."""
        parameters = list(self._model.parameters())
        # what optimizers, checkpoints and moves to another device leave traces in
        now = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        if now == self._read:
            return
        self._read = now
        decoder = self._model.model
        size = sum(p.numel() * p.element_size() for p in parameters)
        with torch.no_grad(), torch.inference_mode(False):
            self._layers = [
                self._layer(layer, window, fuse=size <= MAX_FUSED_BYTES)
                for layer, window in zip(decoder.layers, windows(self._config))
            ]
        self._tables = None
        self._embedding, self._norm = decoder.embed_tokens.weight, decoder.norm.weight
        self._head = _weights(self._model.lm_head)

    def _layer(self, layer: Any, window: Optional[int], fuse: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight, self.heads), (attention.k_norm.weight, self.kv_heads)
            head_norm = torch.cat([weight.expand(number, -1) for weight, number in norms])
        return _Layer(
            norm=layer.input_layernorm.weight,
            qkv=_side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], fuse),
            head_norm=head_norm,
            out=_weights(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=_side_by_side([mlp.gate_proj, mlp.up_proj], fuse),
            down=_weights(mlp.down_proj),
            window=window,
        )

    def __call__(
        self,
        tokens: Tensor,
        pool: KVPool,
        slots: Tensor,
        mask: Optional[Tensor],
        positions: Tensor,
    ) -> Tensor:
        """Logits (N, V) after the new tokens, whose keys and values are put into the pool.

        Args:
            tokens: The new ones (N).
            pool: Of the prefixes.
            slots: Of all tokens, padded on the left; the last column is the new ones' (N, P).
            mask: What is no padding (N, P); None: nothing is.
            positions: Of the new tokens (N).
        """
        new = slots[:, -1]
        if mask is not None:  # once what attention would do with it in each layer
            zeros = self._embedding.new_zeros(mask.shape)
            mask = zeros.masked_fill_(~mask, -torch.inf)[:, None, None, :]

        def attend(n: int, qkv: Tensor) -> Tensor:
            # The G query heads that share keys and values are their G queries.
            pool.put(n, new, qkv[:, self.heads :].flatten(1))
            table, seen, window = slots, mask, self._layers[n].window
            if window is not None and slots.size(1) > window:
                table = slots[:, -window:]
                seen = None if mask is None else mask[..., -window:]
            found = pool.get(n, table).view(*table.shape, 2, self.kv_heads, -1).transpose(1, 3)
            keys, values = found.unbind(2)
            queries = qkv[:, : self.heads].unflatten(1, (self.kv_heads, -1))
            return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)

        return self.forward(tokens, positions, slots.size(1), attend)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        length: int,
        attend: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Logits (N, V) after new tokens whose attention is the caller's.

        Args:
            tokens: The new ones (N).
            positions: Of the new tokens (N).
            length: All positions are below it.
            attend: From the number of a layer and rotated queries, keys and values (N, heads, D),
                side by side, to what attention finds (N, ...), H G D numbers.
        """
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
        attend: Callable[[int, Tensor], Tensor],
    ) -> None:
        """Keys and values of embeddings in all layers, and nothing else.

        What the last layer would make of its keys and values is not computed.

        Args:
            embeddings: Of N tokens or frames of any prefixes (N, E).
            positions: Theirs (N).
            length: All positions are below it.
            write: Takes the number of a layer and rotated keys and values (N, 2 H, D).
            attend: From the number of a layer, whose keys and values are written, and rotated
                queries (N, H G, D) to what attention finds (N, ...), H G D numbers.
        """
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
        x = _add_projected(x, found.reshape(x.size(0), -1), layer.out)
        y = torch.rms_norm(x, layer.mlp_norm.shape, layer.mlp_norm, self.eps)
        gate, up = _project(y, layer.gate_up).chunk(2, -1)
        return _add_projected(x, functional.silu(gate).mul_(up), layer.down)

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
    if not type(model).__name__.endswith("ForCausalLM"):
        return f"class {type(model).__name__}"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    if getattr(model.get_input_embeddings().weight, "device", None) != model.device:
        return "weights on several devices"
    for name, module in model.named_modules():
        # LoRA, quantisation and the like put modules of their own in place of linear layers.
        leaf = name.rsplit(".", 1)[-1]
        if (leaf.endswith("_proj") or leaf == "lm_head") and type(module) is not torch.nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"hooks on {name or 'the model'}"
    return None


def _weights(linear: torch.nn.Linear) -> tuple[Tensor, Optional[Tensor]]:
    return linear.weight, linear.bias


def _side_by_side(linears: Sequence[torch.nn.Linear], fuse: bool) -> list:
    """(weight, bias) of each of several projections of one input, or of all of them as one."""
    parts = [_weights(linear) for linear in linears]
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


def _add_projected(x: Tensor, y: Tensor, part: tuple) -> Tensor:
    """x + y W^T (+ b)."""
    weight, bias = part
    x = torch.addmm(x, y, weight.t())
    return x if bias is None else x.add_(bias)
