"""Prefixes whose keys and values are in a shared pool, and trees of tokens after them."""

from typing import Iterator, Optional, Sequence, Union

from espnet_llm_plugin.llm.kv_pool import KVPool


class PrefixState:
    """One prefix (at least one token): immutable, opaque, shared freely between hypotheses.

    Attributes:
        token: the last one.
        skipped: tokens after the first that the LLM no longer sees.
        seen: tokens that it sees.
    """

    __slots__ = ("_pool", "_parent", "_slot", "_cut", "token", "skipped", "seen", "__weakref__")

    def __init__(
        self,
        pool: KVPool,
        parent: Optional["PrefixState"],
        slot: Optional[int],
        token: int,
        skipped: Optional[int] = None,
    ):
        self._pool = pool
        self._parent = parent  # keeps the slots of all shorter prefixes alive
        self._slot = slot
        self._cut: Optional[PrefixState] = None  # the same prefix with more tokens skipped
        self.token = token
        self.skipped = (0 if parent is None else parent.skipped) if skipped is None else skipped
        self.seen: int = 1 if parent is None else parent.seen + 1

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return self.seen + self.skipped

    def _path(self) -> Iterator["PrefixState"]:
        node: Optional[PrefixState] = self
        while node is not None:
            yield node
            node = node._parent

    def tokens(self) -> list[int]:
        """The tokens that the LLM sees, first to last."""
        return [node.token for node in self._path()][::-1]

    def is_of(self, tokens: Sequence[int]) -> bool:
        """Whether this is the state of a prefix, as far as the LLM sees it."""
        tokens = list(tokens)
        return len(tokens) == self.length and self.tokens() == (
            tokens[:1] + tokens[1 + self.skipped :]
        )

    @property
    def nbytes(self) -> int:
        """Memory of its last token's keys and values."""
        return self._pool.slot_bytes

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


class TokenTree:
    """Tokens after given prefixes, common ones once.

    For :meth:`~espnet_llm_plugin.llm.state.PrefixLM.grow`.

    Attributes:
        tokens: In the order of their numbers.
        parents: What each comes after.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[Union[PrefixState, int, None]] = []
        self._numbers: dict[tuple, int] = {}

    def add(self, start: Optional[PrefixState], tokens: Sequence[int]) -> int:
        """Tokens (at least one) after a prefix: the number of the last one."""
        above: Union[PrefixState, int, None] = start
        for token in tokens:
            # A state is kept by `parents`, so its id is its own.
            key = (id(above), token) if not isinstance(above, int) else (-1 - above, token)
            number = self._numbers.get(key)
            if number is None:
                number = self._numbers[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(above)
            above = number
        return number
