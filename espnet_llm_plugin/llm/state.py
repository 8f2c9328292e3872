"""Stepwise scoring of token prefixes with a causal LM whose keys and values are shared by prefixes.

N: prefixes in one call, P: tokens before the new one (longest of the call), V: vocabulary,
H: key/value heads, D: head dimension, S: slots of the pool.

Every prefix owns exactly one *slot* of a pool, the keys and values of its last token in all
layers, and points to the prefix it extends. Prefixes form a trie, so that what hypotheses have in
common is computed and stored once; nothing is copied when a search branches. A slot is free again
as soon as no prefix that a caller still holds reaches it.
"""

import logging
from functools import lru_cache
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.errors import UserError, UtteranceError

# Attention whose past is fully described by keys and values of single tokens. Sliding windows are
# among them: the pool keeps all tokens and the mask hides those out of the window.
_POOLED_LAYERS = {"full_attention", "sliding_attention"}
_FIRST_CAPACITY = 64


class _Pool:
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


class PrefixState:
    """One prefix (at least one token): immutable, opaque, shared freely between hypotheses."""

    __slots__ = ("_pool", "_parent", "_slot", "token", "length", "__weakref__")

    def __init__(
        self, pool: _Pool, parent: Optional["PrefixState"], slot: Optional[int], token: int
    ):
        self._pool = pool
        self._parent = parent  # keeps the slots of all shorter prefixes alive
        self._slot = slot
        self.token = token
        self.length: int = 1 if parent is None else parent.length + 1

    def _path(self) -> Iterator["PrefixState"]:
        node: Optional[PrefixState] = self
        while node is not None:
            yield node
            node = node._parent

    def tokens(self) -> list[int]:
        """The tokens of the prefix, first to last."""
        return [node.token for node in self._path()][::-1]

    @property
    def slot(self) -> int:
        """Slot of its last token."""
        return self._slot

    def __copy__(self) -> "PrefixState":
        return self

    def __deepcopy__(self, memo: dict) -> "PrefixState":
        return self

    def __reduce__(self):
        raise TypeError("a PrefixState belongs to its PrefixLM and cannot be pickled")

    def __del__(self) -> None:
        # absent if __init__ failed
        slot = getattr(self, "_slot", None)
        if slot is not None:
            self._pool.release(slot)


@lru_cache(maxsize=1)
def _layer_class() -> type:
    from transformers.cache_utils import CacheLayerMixin

    class PooledLayer(CacheLayerMixin):
        """One layer's view of the pool, through the abstract interface of a cache layer.

        Gathering happens in ``update``, so that no more than one layer of padded keys and values
        exists at a time.
        """

        is_sliding = False

        def __init__(self, pool: _Pool, layer: int, slots: torch.Tensor):
            super().__init__()
            self.pool, self.layer, self.slots = pool, layer, slots
            self.seen = slots.shape[1] - 1

        def lazy_initialization(self, key_states, value_states) -> None:
            self.is_initialized = True

        def update(self, key_states, value_states, *args, **kwargs):
            self.is_initialized = True
            if key_states.shape[-2] != 1 or self.seen != self.slots.shape[1] - 1:
                raise RuntimeError("expected one update with one token per layer and step")
            self.seen += 1
            self.pool.put(self.layer, self.slots[:, -1], key_states[:, :, 0], value_states[:, :, 0])
            keys, values = self.pool.keys[self.layer], self.pool.values[self.layer]
            return keys[self.slots].transpose(1, 2), values[self.slots].transpose(1, 2)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.slots.shape[1] - 1 + query_length, 0

        def get_seq_length(self) -> int:
            return self.seen

        def get_max_length(self) -> int:
            return -1

    return PooledLayer


def _pooled_cache(pool: _Pool, slots: torch.Tensor, num_layers: int) -> Any:
    """A transformers ``Cache`` that reads ``slots`` (N, P+1) and first writes the last column."""
    from transformers.cache_utils import Cache

    return Cache(layers=[_layer_class()(pool, layer, slots) for layer in range(num_layers)])


class PrefixLM:
    """Next-token logits of many prefixes at once, each computed once.

    Args:
        model: A Hugging Face causal LM. Its weights must not change while states are in use.
        use_cache: ``None`` decides by the model: families whose past is not a list of keys and
            values per token (state-space layers, chunked attention, layers that share keys) are
            recomputed from the tokens of the prefix, which is slow but right. A small numeric
            check at construction catches families that do not say so. ``False`` always recomputes.

    Attributes:
        num_token_forwards: Tokens sent through the model so far, padding not counted.
        num_forwards: Calls of the model so far.
    """

    def __init__(self, model: Any, use_cache: Optional[bool] = None):
        self.model = model
        self.config = model.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self._pool = _Pool()
        self._max_positions = _learned_positions(model)
        self.num_token_forwards = 0
        self.num_forwards = 0
        self.uses_cache = True if use_cache is None else use_cache
        if use_cache is None:
            reason = _why_not_pooled(self.config) or self._check_cache()
            if reason:
                logging.warning(
                    "%s keeps no shareable keys and values (%s): every prefix is recomputed from "
                    "its first token.",
                    type(model).__name__,
                    reason,
                )
                self.uses_cache = False
        self.num_token_forwards = self.num_forwards = 0

    @property
    def num_slots(self) -> int:
        """Slots in use: distinct prefixes that some held state reaches."""
        return self._pool.used

    @torch.no_grad()
    def step(
        self, tokens: Sequence[int], states: Sequence[Optional[PrefixState]]
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        """Extend each prefix by one token, all in one batched forward.

        Args:
            tokens: N token ids (list or tensor).
            states: N prefixes, of mixed lengths; ``None`` is the empty one.

        Returns:
            Logits (N, V) float32 of the token after each new prefix, and the N new states.
            Nothing given is modified.
        """
        tokens = tokens.tolist() if isinstance(tokens, torch.Tensor) else [int(t) for t in tokens]
        if len(tokens) != len(states):
            raise ValueError(f"{len(tokens)} tokens for {len(states)} states")
        if not tokens:
            empty = torch.zeros(0, self.vocab_size, device=self.model.device)
            return empty, []
        bad = [t for t in tokens if not 0 <= t < self.vocab_size]
        if bad:
            raise UserError(
                f"token id {bad[0]} is outside the LLM's vocabulary of {self.vocab_size} rows."
            )
        longest = 1 + max(0 if state is None else state.length for state in states)
        if self._max_positions is not None and longest > self._max_positions:
            raise UtteranceError(
                f"a prefix of {longest} tokens exceeds the {self._max_positions} positions that "
                f"{type(self.model).__name__} learned; split the recording or use another LLM."
            )
        if not self.uses_cache:
            return self._recompute(tokens, states)
        return self._step(tokens, states)

    def _step(
        self, tokens: list[int], states: Sequence[Optional[PrefixState]]
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        device = self.model.device
        # 1. Slots of the past and of the new token, padded at the LEFT: the new token is the last
        #    column of every row, so that the causal and the sliding-window mask are those of
        #    unpadded rows.
        lengths = torch.tensor([0 if s is None else s.length for s in states], device=device)
        longest = int(lengths.max())
        mask = torch.arange(longest + 1, device=device)[None, :] >= (longest - lengths)[:, None]
        before = np.array([0 if state is None else state.slot for state in states])

        # 2. One forward over the new tokens; the cache writes their slots and reads all.
        slots = self._pool.take(before)
        try:
            table = torch.from_numpy(self._pool.paths(slots, longest + 1)).to(device)  # (N, P+1)
            output = self.model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                attention_mask=mask.long(),
                position_ids=lengths[:, None],
                past_key_values=_pooled_cache(self._pool, table, self.config.num_hidden_layers),
                use_cache=True,
            )
        except BaseException:
            for slot in slots.tolist():
                self._pool.release(slot)
            raise
        self.num_forwards += 1
        self.num_token_forwards += len(tokens)
        # 3. A new state owns its slot from here on.
        new_states = [
            PrefixState(self._pool, parent, slot, token)
            for parent, slot, token in zip(states, slots.tolist(), tokens)
        ]
        return output.logits[:, -1].float(), new_states

    def _recompute(
        self, tokens: list[int], states: Sequence[Optional[PrefixState]]
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        device = self.model.device
        new_states = [
            PrefixState(self._pool, parent, None, token) for parent, token in zip(states, tokens)
        ]
        rows = [state.tokens() for state in new_states]
        longest = max(map(len, rows))
        # Padded at the RIGHT: causality alone keeps padding out, whatever the layers are.
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(longest, device=device)[None, :] < lengths[:, None]
        logits = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        self.num_forwards += 1
        self.num_token_forwards += int(lengths.sum())
        last = torch.arange(len(rows), device=device)
        return logits[last, lengths - 1].float(), new_states

    @torch.no_grad()
    def _check_cache(self) -> Optional[str]:
        """Compare a small ragged tree of prefixes with full forwards; the reason if it differs."""
        ids = [index % self.vocab_size for index in (3, 5, 2, 7)]
        training = self.model.training
        self.model.eval()  # dropout would make any two forwards differ
        try:
            _, (first,) = self.step(ids[:1], [None])
            _, (second,) = self.step(ids[1:2], [first])
            logits, _ = self.step(ids[2:], [second, first])
            expected = [
                self.model(input_ids=torch.tensor([row], device=self.model.device)).logits[0, -1]
                for row in ([*ids[:3]], [ids[0], ids[3]])
            ]
        except Exception as error:  # any failure means: not this way
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self.model.train(training)
        expected = torch.stack(expected).float()
        half = self.model.dtype in (torch.float16, torch.bfloat16)
        scale = expected.std().clamp(min=1e-6)
        difference = float(((logits - expected).abs().max() / scale).nan_to_num(float("inf")))
        if difference > (0.3 if half else 1e-3):
            return f"stepwise and full logits differ by {difference:.2g} standard deviations"
        return None


def _why_not_pooled(config: Any) -> Optional[str]:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= _POOLED_LAYERS:
        return f"layers {', '.join(sorted(layers - _POOLED_LAYERS))}"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers that share keys and values"
    return None


def _learned_positions(model: Any) -> Optional[int]:
    """Number of positions of a learned table (GPT-2, OPT); ``None`` for relative positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Embedding) and last in (
            "wpe",
            "embed_positions",
            "position_embedding",
            "position_embeddings",
        ):
            return limit
    return None
