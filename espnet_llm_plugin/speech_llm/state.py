"""Decoding states: keys and values of an utterance shared by its hypotheses.

N rows (hypotheses; in `Packed` positions), A utterances, W hypotheses of an utterance (the most of
any), J key/value heads, G query heads of each, D head dimension, C columns (tokens and audio) of an
utterance.

What the hypotheses of an utterance have read, together with its audio, is one set of keys and
values: a column belongs to a token, and a row knows which columns it sees (those of the audio and
prompt, and of its own tokens). A step has the hypotheses as queries of one product with the
columns of their utterance, under that mask, in one softmax. So nothing is copied when hypotheses
branch, and what they have in common is there once. Columns that no row sees any more are removed
when the room for columns is used up.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional

from espnet_llm_plugin.speech_llm.attention import Plain

ROOM = 64  # columns that are allocated for text at once, at least
_STEPS = 16  # and at least for so many steps
# Utterances without a row are removed when they are this share.
_GONE = 0.25


class SharedKeys:
    """Keys and values of the columns of A utterances, per layer (A, J, capacity, D).

    Args:
        size: A.
        capacity: Columns.

    Attributes:
        used: Columns that belong to a state; later ones may be written.
        cross: Per cross-attention layer keys and values (A, heads, P, D) of the audio.
        audio: Valid columns of these (A, P) bool.
    """

    def __init__(self, size: int, capacity: int):
        self.size, self.capacity, self.used = size, capacity, 0
        self.layers: list[Optional[tuple[Tensor, Tensor]]] = []
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.audio: Optional[Tensor] = None

    def write(self, layer: int, column: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (A, J, n, D) at a column; returns those of all columns so far."""
        while len(self.layers) <= layer:
            self.layers.append(None)
        if self.layers[layer] is None:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        end = column + key.size(2)
        keys, values = self.layers[layer]
        keys[:, :, column:end] = key
        values[:, :, column:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def select(self, utterances: Tensor, columns: Tensor, room: int) -> "SharedKeys":
        """A copy with some utterances (A',), of each some columns (A', C'), and room for more."""
        new = SharedKeys(len(columns), columns.size(1) + room)
        new.used = columns.size(1)
        for layer, (key, value) in enumerate(self.layers):
            rows = utterances[:, None]
            key, value = (tensor[rows, :, columns].transpose(1, 2) for tensor in (key, value))
            new.write(layer, 0, key, value)
        new.cross = [(key[utterances], value[utterances]) for key, value in self.cross]
        new.audio = None if self.audio is None else self.audio[utterances]
        return new


@dataclass(frozen=True)
class SpeechState:
    """What N hypotheses have read. Never modified; may be extended several times.

    Attributes:
        utterance: Number of each row's utterance in the batch of ``start`` (N,).
        positions: Of the next token (N,).
        length: Positions taken by the longest row.
    """

    utterance: Tensor
    positions: Tensor
    length: int
    _keys: SharedKeys
    _index: Tensor  # (N,) of the utterance in the keys
    _seen: Tensor  # (N, C) bool

    @staticmethod
    def begin(keys: SharedKeys, seen: Tensor, positions: Tensor) -> "SpeechState":
        """Of A utterances that see columns ``seen`` (A, C) and come to ``positions`` (A,)."""
        rows = torch.arange(len(seen), device=seen.device)
        keys.used = seen.size(1)
        return SpeechState(rows, positions, int(positions.max()), keys, rows, seen)


class Step:
    """One more token for each of N rows: what the attention layers read and write.

    Args:
        state: Of the rows before.
        parents: Rows of ``state`` (N,) that the new rows extend.
    """

    def __init__(self, state: SpeechState, parents: Tensor):
        self.calls = 0
        self.utterance, self.positions = state.utterance[parents], state.positions[parents]
        self.length = state.length + 1
        index, seen, keys = state._index[parents], state._seen[parents], state._keys
        # 1. Which utterances there are, and how many rows of each.
        utterances, inverse, counts = index.unique(return_inverse=True, return_counts=True)
        self.width = int(counts.max())
        if (
            keys.used != seen.size(1)  # someone else has extended this state
            or keys.capacity < keys.used + self.width
            or len(utterances) <= (1 - _GONE) * keys.size
        ):
            keys, seen = _repack(keys, seen, utterances, inverse, self.width)
            index = inverse
        self.keys, self.index, self.seen = keys, index, seen
        self.utterances = keys.size
        self.begin, self.end = seen.size(1), seen.size(1) + self.width
        keys.used = self.end
        # 2. The place of a row among those of its utterance.
        rows = torch.arange(len(index), device=index.device)
        order = index.argsort(stable=True)
        first = (counts.cumsum(0) - counts)[inverse[order]]
        place = torch.empty_like(rows)
        place[order] = rows - first
        self.place = index * self.width + place
        # None: the rows are in this order, and all places are taken
        if len(rows) == self.utterances * self.width and torch.equal(self.place, rows):
            self.place = None
        # 3. Who sees what: a place that no row has sees itself.
        self.own = functional.one_hot(place, self.width).bool()
        own = torch.eye(self.width, dtype=torch.bool, device=index.device)
        past = self.grouped(seen)
        own = own.expand(self.utterances, -1, -1)
        self._visible = torch.cat([past, own], dim=2)
        self._mask: Optional[Tensor] = None

    def grouped(self, rows: Tensor) -> Tensor:
        """Rows (N, ...) by utterance and place: (A, W, ...)."""
        if self.place is not None:
            places = rows.new_zeros(self.utterances * self.width, *rows.shape[1:])
            places[self.place] = rows
            rows = places
        return rows.view(self.utterances, self.width, *rows.shape[1:])

    def ungrouped(self, places: Tensor) -> Tensor:
        """Inverse of :meth:`grouped`."""
        places = places.flatten(0, 1)
        return places if self.place is None else places[self.place]

    def mask(self, groups: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores (A, 1, W G, C): the same in all layers."""
        if self._mask is None:
            mask = torch.zeros(self._visible.shape, dtype=dtype, device=self._visible.device)
            mask.masked_fill_(~self._visible, -torch.inf)
            self._mask = mask.repeat_interleave(groups, dim=1)[:, None]
        return self._mask

    def attend(self, module, query, key, value, mask, scaling, dropout):
        query, key, value = (x.squeeze(2) for x in (query, key, value))
        return self.attend_rows(module.layer_idx, query, key, value, scaling)[:, None]

    def attend_rows(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: Optional[float] = None
    ) -> Tensor:
        """Attention of a layer: queries (N, J G, D), keys and values (N, J, D) of the new tokens ->
        (N, J G, D)."""
        heads, groups = key.size(1), query.size(1) // key.size(1)
        query, key, value = (self.grouped(x) for x in (query, key, value))
        key, value = self.keys.write(layer, self.begin, key.transpose(1, 2), value.transpose(1, 2))
        # (A, W, J G, D) -> (A, J, W G, D)
        query = query.unflatten(2, (heads, groups)).transpose(1, 2).flatten(2, 3)
        found = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask(groups, query.dtype), scale=scaling
        )
        found = found.unflatten(2, (self.width, groups)).transpose(1, 2).flatten(2, 3)
        return self.ungrouped(found)

    def state(self) -> SpeechState:
        """Of the new rows, after the forward."""
        seen = torch.cat([self.seen, self.own], dim=1)
        return SpeechState(
            self.utterance, self.positions + 1, self.length, self.keys, self.index, seen
        )


def _repack(
    keys: SharedKeys, seen: Tensor, utterances: Tensor, index: Tensor, width: int
) -> tuple[SharedKeys, Tensor]:
    """Keys of ``utterances`` (A',) alone, without the columns that none of the rows sees, and what
    the rows, of utterance ``index`` (N,) among these, see of them (N, C')."""
    live = torch.zeros(len(utterances), seen.size(1), device=seen.device)
    live = live.index_add_(0, index, seen.float()) > 0
    number = int(live.sum(dim=1).max())
    columns = (~live).byte().argsort(dim=1, stable=True)[:, :number]
    room = max(ROOM, _STEPS * width)
    return keys.select(utterances, columns, room), seen.gather(1, columns[index])


class Recording(Plain):
    """A reading that attends as ever, and keeps keys and values.

    Args:
        keys: Where they go, from column ``begin`` on.
    """

    def __init__(self, keys: SharedKeys, begin: int = 0):
        super().__init__()
        self.keys, self.begin = keys, begin

    def attend(self, module, query, key, value, mask, scaling, dropout):
        self.keys.write(module.layer_idx, self.begin, key, value)
        return super().attend(module, query, key, value, mask, scaling, dropout)


class Packed:
    """What the layers read and write for A utterances whose padding is left out.

    Args:
        keys: Where keys and values go, from column 0 on; those of the padding are 0.
        valid: What is no padding (A, C) bool, N of them.
        mask: Keys that each query may see (A, 1, C, C) bool; None: those not after it.
    """

    def __init__(self, keys: SharedKeys, valid: Tensor, mask: Optional[Tensor] = None):
        self.keys, self.valid, self.mask = keys, valid, mask
        self._read: Optional[tuple[Tensor, Tensor]] = None
        self._places = None if bool(valid.all()) else valid.flatten().nonzero().squeeze(1)

    def packed(self, padded: Tensor) -> Tensor:
        """Of (A, C, ...) what is no padding: (N, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self._places is None else flat[self._places]

    def _padded(self, packed: Tensor) -> Tensor:
        """(N, heads, D) -> (A, heads, C, D)."""
        if self._places is not None:
            places = packed.new_zeros(self.valid.numel(), *packed.shape[1:])
            places[self._places] = packed
            packed = places
        return packed.unflatten(0, self.valid.shape).transpose(1, 2)

    def write(self, layer: int, kv: Tensor) -> None:
        """Keep keys and values (N, 2 J, D), side by side."""
        self._read = self.keys.write(layer, 0, *self._padded(kv).chunk(2, dim=1))

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Attention of the layer written last: queries (N, J G, D) -> (N, J G, D)."""
        key, value = self._read
        groups = query.size(1) // key.size(1)
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        found = functional.scaled_dot_product_attention(
            self._padded(query), key, value, attn_mask=self.mask, is_causal=self.mask is None
        )
        return self.packed(found.transpose(1, 2))
