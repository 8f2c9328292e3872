"""Keys and values of single tokens, shared by all prefixes of a search that contain them.

N: prefixes in one call, P: tokens before the new ones (longest of the call), T: new tokens of each,
H: key/value heads, D: head dimension (of keys and values), S: slots of the pool,
W: size of a token's keys and values, the keys of all heads first (2 H D).
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

_FIRST_CAPACITY = 64
_TAIL = 17  # slots that are looked up at once


class KVPool:
    """Keys and values of single tokens, for all layers. Slot 0 stands for padding."""

    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []  # (S, W)
        self.capacity = _FIRST_CAPACITY
        self._free = list(range(self.capacity - 1, 0, -1))
        # Slots of the last tokens up to this one. 0, the padding, comes before the first token and
        # before itself.
        self._tail = np.zeros((self.capacity, _TAIL), dtype=np.int64)

    @property
    def used(self) -> int:
        return self.capacity - 1 - len(self._free)

    @property
    def slot_bytes(self) -> int:
        """Memory of a token's keys and values in all layers."""
        return sum(layer[0].nbytes for layer in self.layers)

    def take(self, before: np.ndarray) -> np.ndarray:
        """New slots for tokens that follow those of other slots (N)."""
        while len(self._free) < len(before):
            self._grow()
        slots = np.array([self._free.pop() for _ in before], dtype=np.int64)
        self._tail[slots, :-1] = self._tail[before, 1:]
        self._tail[slots, -1] = slots
        return slots

    def paths(self, slots: np.ndarray, length: int) -> np.ndarray:
        """Slots of the prefixes that end in ``slots`` (N), padded on the left: (N, length)."""
        parts = [self._tail[slots]]
        for _ in range(_TAIL - 1, length - 1, _TAIL - 1):
            # the first of a tail is the last of the one before
            parts[-1], first = parts[-1][:, 1:], parts[-1][:, 0]
            parts.append(self._tail[first])
        table = parts[0] if len(parts) == 1 else np.concatenate(parts[::-1], axis=1)
        return table[:, table.shape[1] - length :]

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def _grow(self) -> None:
        old, self.capacity = self.capacity, 2 * self.capacity
        self._free = list(range(self.capacity - 1, old - 1, -1)) + self._free
        self._tail = np.concatenate([self._tail, np.zeros_like(self._tail)])
        for layer, tensor in enumerate(self.layers):
            self.layers[layer] = self._zeros(tensor)
            self.layers[layer][:old] = tensor

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        # A tensor born in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            shape = (self.capacity, *like.shape[1:])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def put(self, layer: int, slots: torch.Tensor, new: torch.Tensor) -> None:
        """Store keys and values (N, W) of one layer in ``slots`` (N); first layers first."""
        if layer == len(self.layers):
            self.layers.append(self._zeros(new))
        self.layers[layer].index_copy_(0, slots, new)

    def get(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Keys and values of slots (N, P): (N, P, W)."""
        return self.layers[layer].index_select(0, slots.flatten()).view(*slots.shape, -1)

    def forget(self) -> None:
        """Let go of the memory; no slot may be in use."""
        self.layers.clear()


@lru_cache(maxsize=1)
def _layer_class() -> type:
    from transformers.cache_utils import CacheLayerMixin

    class PooledLayer(CacheLayerMixin):
        """One layer's view of the pool, through the abstract interface of a cache layer.

        Gathering happens in ``update``, so that no more than one layer of padded keys and values
        exists at a time.
        """

        is_sliding = False

        def __init__(self, pool: KVPool, layer: int, slots: torch.Tensor, new: int):
            super().__init__()
            self.pool, self.layer, self.slots, self.new = pool, layer, slots, new
            self.before = self.seen = slots.shape[1] - new

        def lazy_initialization(self, key_states, value_states) -> None:
            self.is_initialized = True

        def update(self, key_states, value_states, *args, **kwargs):
            self.is_initialized = True
            if key_states.shape[-2] != self.new or self.seen != self.before:
                raise RuntimeError(f"expected one update with {self.new} token(s) per layer")
            self.seen += self.new
            # 1. The new ones (N, H, T, D) as rows of the pool (N T, W).
            both = [part.transpose(1, 2).flatten(0, 1) for part in (key_states, value_states)]
            written = self.slots[:, self.before :].flatten()
            self.pool.put(self.layer, written, torch.cat([new.flatten(1) for new in both], dim=1))
            # 2. All (N, H, P+T, D).
            shapes = [new.shape[1:] for new in both]
            found = self.pool.get(self.layer, self.slots)
            parts = found.split([shape.numel() for shape in shapes], dim=-1)
            keys, values = (
                part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, shapes)
            )
            return keys, values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.before + query_length, 0

        def get_seq_length(self) -> int:
            return self.seen

        def get_max_length(self) -> int:
            return -1

    return PooledLayer


def pooled_cache(pool: KVPool, slots: torch.Tensor, num_layers: int, new: int = 1) -> Any:
    """A transformers ``Cache`` that reads slots (N, P+T) and first writes the last T = ``new``."""
    from transformers.cache_utils import Cache

    return Cache(layers=[_layer_class()(pool, layer, slots, new) for layer in range(num_layers)])
