"""Stepwise scoring of token prefixes with a causal LM whose keys and values are shared by prefixes.

N: prefixes in one call, P: tokens before the new one (longest of the call), V: vocabulary,
H: key/value heads, D: head dimension, S: slots of the pool.

Every prefix owns exactly one *slot* of a pool, the keys and values of its last token in all
layers, and points to the prefix it extends. Prefixes form a trie, so that what hypotheses have in
common is computed and stored once; nothing is copied when a search branches. A slot is free again
as soon as no prefix that a caller still holds reaches it.

A prefix that has filled the LLM's context is cut before it is extended, see
:mod:`~espnet_llm_plugin.llm.context`; the cut prefixes form a trie like the others, which costs
each token one forward more.
"""

import logging
from typing import Any, Optional, Sequence, Union

import numpy as np
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.cache_check import why_not_equal, why_not_pooled
from espnet_llm_plugin.llm.context import context_of, kept
from espnet_llm_plugin.llm.fast import fast_decoder, why_not_fast
from espnet_llm_plugin.llm.fast_decoder import FastDecoder
from espnet_llm_plugin.llm.kv_pool import KVPool, pooled_cache
from espnet_llm_plugin.llm.prefix_state import PrefixState

# Logits of one forward of `grow`, at most: four bytes each.
_GROWN_LOGITS = 32_000_000


class PrefixLM:
    """Next-token logits of many prefixes at once, each computed once.

    Args:
        model: A Hugging Face causal LM. Its weights must not change while states are in use.
            Some run by a :class:`~espnet_llm_plugin.llm.fast_decoder.FastDecoder`.
        use_cache: ``None`` decides by the model: families whose past is not a list of keys and
            values per token (state-space layers, chunked attention, layers that share keys) are
            recomputed from the tokens of the prefix, which is slow but right. A small numeric
            check at construction catches families that do not say so. ``False`` always recomputes.

    Attributes:
        num_token_forwards: Tokens sent through the model so far, padding not counted.
        num_forwards: Calls of the model so far.
        context: Tokens that the LLM can see, see :func:`context_of`.
    """

    def __init__(self, model: Any, use_cache: Optional[bool] = None):
        self.model = model
        self.config = model.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self._pool = KVPool()
        self.context = context_of(model)
        # transformers hands a four-dimensional mask to every layer as it is, windows or not.
        layers = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        everywhere = layers == {"full_attention"} and not getattr(
            self.config, "sliding_window", None
        )
        attention = getattr(self.config, "_attn_implementation", None)
        self._takes_masks_as_they_are = attention == "sdpa" and everywhere
        self._warned = False
        self.num_token_forwards = 0
        self.num_forwards = 0
        self.uses_cache = True if use_cache is None else use_cache
        self._fast: Optional[FastDecoder] = None
        if use_cache is None:
            self._fast = self._checked_fast()
            reason = why_not_pooled(self.config)
            if not reason and self._fast is None:
                reason = why_not_equal(self)
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

    @property
    def nbytes(self) -> int:
        """Memory of their keys and values."""
        return self._pool.used * self._pool.slot_bytes

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
        self._check_tokens(tokens)
        states = [self._within_context(state) for state in states]
        if not self.uses_cache:
            return self._recompute(tokens, states)
        return self._step(tokens, states)

    @torch.no_grad()
    def grow(
        self, tokens: Sequence[int], parents: Sequence[Union[PrefixState, int, None]]
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        """Extend prefixes by several tokens each, whole subtrees of them, in one forward.

        A token attends to the keys and values of those before it that the same forward writes: in
        every layer all are written before any is read.

        Args:
            tokens: N token ids, shorter prefixes first.
            parents: What each comes after: a state, the number of an earlier one of these tokens,
                or ``None``, the empty prefix.

        Returns:
            As :meth:`step`: logits (N, V) float32 after each new prefix, and the N new states.
        """
        self._check_tokens(tokens)
        most = max(1, _GROWN_LOGITS // self.vocab_size)
        depth = self._depths(parents)
        fits = self.context is None or max(depth, default=0) <= self.context
        if fits and self.uses_cache and len(tokens) <= most:
            return self._grow(list(tokens), parents, np.array(depth) - 1)
        # By parts: of one depth each where prefixes must be cut or recomputed.
        logits: list[torch.Tensor] = []
        states: list[PrefixState] = []
        while len(states) < len(tokens):
            first = last = len(states)
            while last < len(tokens) and last - first < most:
                parent = parents[last]
                inside = isinstance(parent, int) and parent >= first
                if inside and not (fits and self.uses_cache):
                    break
                last += 1
            known = [
                parent - first
                if isinstance(parent, int) and parent >= first
                else states[parent]
                if isinstance(parent, int)
                else parent
                for parent in parents[first:last]
            ]
            if fits and self.uses_cache:
                positions = np.array(depth[first:last]) - 1
                some, new = self._grow(list(tokens[first:last]), known, positions)
            else:
                some, new = self.step(tokens[first:last], known)
            logits.append(some)
            states += new
        if not logits:
            return self.step([], [])
        return torch.cat(logits), states

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        bad = [t for t in tokens if not 0 <= t < self.vocab_size]
        if bad:
            raise UserError(
                f"token id {bad[0]} is outside the LLM's vocabulary of {self.vocab_size} rows."
            )

    @staticmethod
    def _depths(parents: Sequence[Union[PrefixState, int, None]]) -> list[int]:
        """Tokens that the LLM sees at each new one, itself included."""
        depth: list[int] = []
        for parent in parents:
            if isinstance(parent, int):
                depth.append(depth[parent] + 1)
            else:
                depth.append(1 if parent is None else parent.seen + 1)
        return depth

    def _grow(
        self,
        tokens: list[int],
        parents: Sequence[Union[PrefixState, int, None]],
        lengths: np.ndarray,
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        if not tokens:
            return self.step([], [])
        if not self._pool.used:
            self._begin()
        # 1. A slot for each, after that of its parent.
        slots = np.zeros(len(tokens), dtype=np.int64)
        inside = np.array([parent if isinstance(parent, int) else -1 for parent in parents])
        before = np.array(
            [0 if parent is None or isinstance(parent, int) else parent.slot for parent in parents]
        )
        try:
            missing = np.arange(len(tokens))
            while len(missing):  # all whose parents have one
                ready = (inside[missing] < 0) | (slots[inside[missing]] > 0)
                now, missing = missing[ready], missing[~ready]
                after = np.where(inside[now] < 0, before[now], slots[inside[now]])
                slots[now] = self._pool.take(after)
            # 2. One forward, each a row of its own.
            longest = int(lengths.max())
            mask = None
            if int(lengths.min()) < longest:
                mask = np.arange(longest + 1) >= (longest - lengths)[:, None]
            new = torch.tensor(tokens, device=self._device)[:, None]
            table = self._pool.paths(slots, longest + 1)
            logits = self._forward(new, table, mask, lengths[:, None])
        except BaseException:
            for slot in slots[slots > 0].tolist():
                self._pool.release(slot)
            raise
        # 3. States own the slots.
        states: list[PrefixState] = []
        for parent, slot, token in zip(parents, slots.tolist(), tokens):
            above = states[parent] if isinstance(parent, int) else parent
            states.append(PrefixState(self._pool, above, slot, token))
        return logits, states

    def _step(
        self, tokens: list[int], states: Sequence[Optional[PrefixState]]
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        if not self._pool.used:
            self._begin()
        device = self._device
        # 1. Slots of the past and of the new token, padded at the LEFT: the new token is the last
        #    column of every row, so that the causal and the sliding-window mask are those of
        #    unpadded rows.
        lengths = np.array([0 if state is None else state.seen for state in states])
        before = np.array([0 if state is None else state.slot for state in states])
        longest = int(lengths.max())
        mask = None
        if int(lengths.min()) < longest:
            mask = np.arange(longest + 1) >= (longest - lengths)[:, None]

        # 2. One forward over the new tokens; the cache writes their slots and reads all.
        slots = self._pool.take(before)
        try:
            table = self._pool.paths(slots, longest + 1)
            new = torch.tensor(tokens, device=device)[:, None]
            logits = self._forward(new, table, mask, lengths[:, None])
        except BaseException:
            for slot in slots.tolist():
                self._pool.release(slot)
            raise
        # 3. A new state owns its slot from here on.
        new_states = [
            PrefixState(self._pool, parent, slot, token)
            for parent, slot, token in zip(states, slots.tolist(), tokens)
        ]
        return logits, new_states

    def _begin(self) -> None:
        """Before the first prefix: the model may be on another device, its weights other ones."""
        self._device = self.model.device  # transformers looks through the parameters for it
        layers = self._pool.layers
        if layers and (layers[0].device, layers[0].dtype) != (self._device, self.model.dtype):
            self._pool.forget()
        if self._fast is not None:
            self._fast.refresh()

    def _forward(
        self,
        tokens: torch.Tensor,
        table: np.ndarray,
        padding: Optional[np.ndarray],
        positions: np.ndarray,
    ) -> torch.Tensor:
        """Logits (N, V) float32 after new tokens (N, T) at ``positions`` (N, T).

        Args:
            tokens: The new tokens.
            table: Slots (N, P + T), of which the last T are theirs.
            padding: What is no padding (N, P + T); None: nothing is.
            positions: Of the new tokens.
        """
        device, layers, new = tokens.device, self.config.num_hidden_layers, tokens.size(1)
        slots, at = torch.from_numpy(table).to(device), torch.from_numpy(positions).to(device)
        mask = None if padding is None else torch.from_numpy(padding).to(device)
        self.num_forwards += 1
        self.num_token_forwards += tokens.numel()
        if self._fast is not None and new == 1 and not self.model.training:
            return self._fast(tokens[:, 0], self._pool, slots, mask, at[:, 0]).float()
        hidden: Optional[torch.Tensor] = None
        if new > 1:
            hidden = torch.ones_like(slots) if mask is None else mask.long()
        elif mask is not None:
            # A model's own making of the mask takes as long as two layers of a small model.
            takes_it = self._takes_masks_as_they_are
            hidden = mask[:, None, None, :] if takes_it else mask.long()
        output = self.model(
            input_ids=tokens,
            attention_mask=hidden,
            position_ids=at,
            past_key_values=pooled_cache(self._pool, slots, layers, new),
            use_cache=True,
        )
        return output.logits[:, -1].float()

    def _within_context(self, state: Optional[PrefixState]) -> Optional[PrefixState]:
        """The same prefix, cut if no token more fits into the context."""
        if state is None or self.context is None or state.seen < self.context:
            return state
        if not self._warned:
            logging.warning(
                "a text of %d tokens fills the context of %s: from here on it sees the last %d to "
                "%d tokens only. Split long recordings, or let endpoints end the segments of a "
                "stream",
                state.length,
                type(self.model).__name__,
                *(size - 1 for size in (kept(self.context), self.context)),
            )
            self._warned = True
        skipped = state.skipped + self.context - kept(self.context)
        # 1. What has no cut state yet, from the end: other prefixes share the rest.
        missing, node = [], state
        while node._cut is None and node.length > 1 + skipped:
            missing.append(node)
            node = node._parent
        if node._cut is not None:
            cut = node._cut
        else:  # all of it; nothing comes between the first token and the last ones
            cut = next(first for first in state._path() if first._parent is None)
        # 2. The tokens of these after what is there, in one forward.
        missing.reverse()
        tokens = [node.token for node in missing]
        slots: list[Optional[int]] = [None] * len(tokens)
        if self.uses_cache and tokens:
            slots = self._prefill(tokens, cut)
        for node, slot in zip(missing, slots):
            cut = node._cut = PrefixState(self._pool, cut, slot, node.token, skipped)
        return cut

    def _prefill(self, tokens: list[int], state: PrefixState) -> list[int]:
        """Slots of T tokens, filled, after those of a state."""
        slots: list[int] = []
        try:
            for _ in tokens:
                before = slots[-1] if slots else state.slot
                slots += self._pool.take(np.array([before])).tolist()
            end = state.seen + len(tokens)
            table = self._pool.paths(np.array(slots[-1:]), end)
            new = torch.tensor([tokens], device=self.model.device)
            self._forward(new, table, None, np.arange(state.seen, end)[None])
        except BaseException:
            for slot in slots:
                self._pool.release(slot)
            raise
        return slots

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

    def _checked_fast(self) -> Optional[FastDecoder]:
        """The lean forward of the model, if there is one and it computes the same."""
        if why_not_fast(self.model) or why_not_pooled(self.config):
            return None
        try:
            self._fast = fast_decoder(self.model)
            reason = why_not_equal(self)
        except Exception as error:  # whatever it is, the model's own forward remains
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return self._fast
        logging.warning("%s decodes by its own forward: %s", type(self.model).__name__, reason)
        return None
