"""New tokens of prefixes through a decoder, without the modules around its weights.

N: prefixes in one call, P: tokens of the longest with the new one, D: head dimension,
H: key/value heads, G: query heads of each of them, E: model width, V: vocabulary.

A step of a search has few tokens, so that a small model spends most of it between the operations:
module calls, mask making, cache objects. Here a layer is about fifteen operations on the same
weights: four small layers take a third of the time of ``transformers``' forward. And attention is
the caller's, so that prefixes can share keys and values whatever the model's own forward thinks of
positions.
"""

from abc import ABC, abstractmethod
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from espnet_llm_plugin.llm.kv_pool import KVPool

# From the number of a layer and queries, keys and values to what attention finds.
Attend = Callable[[int, Tensor], Tensor]


class FastDecoder(ABC):
    """The forward of a Hugging Face model for one new token of each prefix.

    Args:
        model: One of the subclass's families. Its weights are used where they are.

    Attributes:
        heads: Of queries, H G.
        kv_heads: H.
        windows: Tokens that each layer's attention sees, the new one included; None: all.
        alone: Whether prefixes cannot share what the model's own forward makes.
    """

    alone = False

    heads: int
    kv_heads: int
    windows: Sequence[Optional[int]]

    def __init__(self, model: Any):
        self._model = model
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
        with torch.no_grad(), torch.inference_mode(False):
            self._load(sum(p.numel() * p.element_size() for p in parameters))

    @abstractmethod
    def _load(self, size: int) -> None:
        """Take the weights of the model, which has ``size`` bytes of them."""

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
            zeros = torch.zeros(mask.shape, dtype=self._model.dtype, device=mask.device)
            mask = zeros.masked_fill_(~mask, -torch.inf)[:, None, None, :]

        def attend(n: int, qkv: Tensor) -> Tensor:
            # The G query heads that share keys and values are their G queries.
            pool.put(n, new, qkv[:, self.heads :].flatten(1))
            table, seen, window = slots, mask, self.windows[n]
            if window is not None and slots.size(1) > window:
                table = slots[:, -window:]
                seen = None if mask is None else mask[..., -window:]
            found = pool.get(n, table).view(*table.shape, 2, self.kv_heads, -1).transpose(1, 3)
            keys, values = found.unbind(2)
            queries = qkv[:, : self.heads].unflatten(1, (self.kv_heads, -1))
            return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)

        return self.forward(tokens, positions, slots.size(1), attend)

    @abstractmethod
    def forward(self, tokens: Tensor, positions: Tensor, length: int, attend: Attend) -> Tensor:
        """Logits (N, V) after new tokens whose attention is the caller's.

        Args:
            tokens: The new ones (N).
            positions: Of the new tokens (N).
            length: All positions are below it.
            attend: From the number of a layer and queries, keys and values (N, heads, D), side by
                side and with their positions in them, to what attention finds (N, ...), H G D
                numbers. Its scores are products of queries and keys over the root of D.
        """

    @abstractmethod
    def fill(
        self,
        embeddings: Tensor,
        positions: Tensor,
        length: int,
        write: Callable[[int, Tensor], None],
        attend: Attend,
    ) -> None:
        """Keys and values of embeddings in all layers, and nothing else.

        What the last layer would make of its keys and values is not computed.

        Args:
            embeddings: Of N tokens or frames of any prefixes (N, E).
            positions: Theirs (N).
            length: All positions are below it.
            write: Takes the number of a layer and its keys and values (N, 2 H, D).
            attend: From the number of a layer, whose keys and values are written, and queries
                (N, H G, D) to what attention finds (N, ...), H G D numbers.
        """


def why_not_as_stored(model: Any, is_linear: Callable[[str], bool]) -> Optional[str]:
    """Why the weights of a model do not say what its modules do; None: they do.

    Args:
        model: Of Hugging Face.
        is_linear: Whether a module of this name, without those around it, is a linear layer.
    """
    if not type(model).__name__.endswith("ForCausalLM"):
        return f"class {type(model).__name__}"
    if getattr(model.get_input_embeddings().weight, "device", None) != model.device:
        return "weights on several devices"
    for name, module in model.named_modules():
        # LoRA, quantisation and the like put modules of their own in place of linear layers.
        if is_linear(name.rsplit(".", 1)[-1]) and type(module) is not torch.nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"hooks on {name or 'the model'}"
    return None


def weights_of(linear: torch.nn.Linear) -> tuple[Tensor, Optional[Tensor]]:
    """Weight and bias."""
    return linear.weight, linear.bias


def add_projected(x: Tensor, y: Tensor, part: tuple) -> Tensor:
    """x + y W^T (+ b)."""
    weight, bias = part
    x = torch.addmm(x, y, weight.t())
    return x if bias is None else x.add_(bias)
