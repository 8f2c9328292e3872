"""Keys and values of single tokens, shared by all prefixes of a search that contain them.

N: prefixes in one call, P: tokens before the new ones (longest of the call), T: new tokens of each,
H: key/value heads, D: head dimension, S: slots of the pool.
"""

from functools import lru_cache
from typing import Any, Optional

import numpy as np
import torch

_FIRST_CAPACITY = 64


class KVPool:
    """Keys and values of single tokens, for all layers. Slot 0 stands for padding."""

    def __init__(self) -> None:
        self.keys: list[Optional[torch.Tensor]] = []  # per layer (S, H, D)
        self.values: list[Optional[torch.Tensor]] = []
        self.capacity = _FIRST_CAPACITY
        self._free = list(range(self.capacity - 1, 0, -1))
        # Slot of the token before; 0, the padding, comes before the first token and before itself.
        self._before = np.zeros(self.capacity, dtype=np.int64)

    @property
    def used(self) -> int:
        return self.capacity - 1 - len(self._free)

    def take(self, before: np.ndarray) -> np.ndarray:
        """New slots for tokens that follow those of other slots (N)."""
        while len(self._free) < len(before):
            self._grow()
        slots = np.array([self._free.pop() for _ in before], dtype=np.int64)
        self._before[slots] = before
        return slots

    def paths(self, slots: np.ndarray, length: int) -> np.ndarray:
        """Slots of the prefixes that end in ``slots`` (N), padded on the left: (N, length)."""
        table = np.empty((len(slots), length), dtype=np.int64)
        for column in range(length - 1, -1, -1):
            table[:, column] = slots
            slots = self._before[slots]
        return table

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def _grow(self) -> None:
        old, self.capacity = self.capacity, 2 * self.capacity
        self._free = list(range(self.capacity - 1, old - 1, -1)) + self._free
        self._before = np.concatenate([self._before, np.zeros_like(self._before)])
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    grown = self._zeros(tensor)
                    grown[:old] = tensor
                    store[layer] = grown

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        # A tensor born in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            shape = (self.capacity, *like.shape[1:])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def put(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor):
        """Store ``keys``, ``values`` (N, H, D) of one layer in ``slots`` (N,)."""
        for store, new in ((self.keys, keys), (self.values, values)):
            while len(store) <= layer:
                store.append(None)
            if store[layer] is None:
                store[layer] = self._zeros(new)
            store[layer][slots] = new


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
            written = self.slots[:, self.before :].flatten()
            self.pool.put(
                self.layer,
                written,
                key_states.transpose(1, 2).flatten(0, 1),
                value_states.transpose(1, 2).flatten(0, 1),
            )
            keys, values = self.pool.keys[self.layer], self.pool.values[self.layer]
            return keys[self.slots].transpose(1, 2), values[self.slots].transpose(1, 2)

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
