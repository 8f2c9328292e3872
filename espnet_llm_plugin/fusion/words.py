"""Words in label sequences: where one is complete, and how it is written.

L labels (label = token id - 1), M prefixes.
"""

from typing import Callable, Optional, Sequence

import numpy as np

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.token_list import SPACE
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree

# What a token begins with that begins a word: of sentencepiece, and of byte-level BPE.
_BEGINNINGS = ("\u2581", "\u0120")
TOKEN_TYPES = ("bpe", "hugging_face", "char", "word")


class Spelling:
    """How labels make words.

    Args:
        token_list: V tokens, blank first.
        token_type: ``bpe`` or ``hugging_face``: a word ends where a piece begins the next one;
            ``char``: where ``<space>`` is; ``word``: every label is a word.
        to_text: Text of tokens, as ``TextConverter.text``.

    Attributes:
        begins: Whether a label begins a word (L,); None where words are separated.
        separator: The label of ``<space>``; None where there is none.

    Raises:
        UserError: Of this token type it is not known where words end.
    """

    def __init__(
        self,
        token_list: Sequence[str],
        token_type: Optional[str],
        to_text: Callable[[Sequence[str]], Optional[str]],
    ):
        if token_type not in TOKEN_TYPES:
            raise UserError(
                f"token_type {token_type}: an LLM that scores whole words needs to know where "
                f"words end; expected one of {', '.join(TOKEN_TYPES)}"
            )
        self._tokens = list(token_list)[1:]
        self._to_text = to_text
        self.begins: Optional[np.ndarray] = None
        self.separator: Optional[int] = None
        if token_type == "char":
            if SPACE not in self._tokens:
                raise UserError(f"the token list of characters has no {SPACE}: words never end")
            self.separator = self._tokens.index(SPACE)
        elif token_type == "word":
            self.begins = np.ones(len(self._tokens), dtype=bool)
        else:
            self.begins = np.array([token.startswith(_BEGINNINGS) for token in self._tokens])
        self.at_once = token_type == "word"

    def text(self, labels: Sequence[int]) -> str:
        """Text of a word's labels, without separators."""
        tokens = [self._tokens[label] for label in labels if label != self.separator]
        return (self._to_text(tokens) or "").strip() if tokens else ""


class WordEnds:
    """The complete words of the prefixes of a search, by node.

    Args:
        tree: Of the prefixes.
        spelling: Of the labels.
    """

    def __init__(self, tree: PrefixTree, spelling: Spelling):
        self._tree, self._spelling = tree, spelling
        self._complete = np.zeros(64, dtype=np.int64)
        self._number = np.zeros(64, dtype=np.int64)
        self._known = np.zeros(64, dtype=bool)
        self._known[ROOT] = True
        tree.followers.append(self)

    def complete(self, nodes: np.ndarray) -> np.ndarray:
        """The longest beginning of each prefix that consists of complete words: nodes (M,)."""
        self._need(nodes)
        return self._complete[nodes]

    def number(self, nodes: np.ndarray) -> np.ndarray:
        """How many complete words prefixes have (M,)."""
        self._need(nodes)
        return self._number[nodes]

    def before(self, node: int) -> int:
        """What comes before the last word of a prefix of complete words that is not empty."""
        at = node if self._spelling.separator is None else int(self._tree.parent[node])
        if self._spelling.at_once:
            return int(self._tree.parent[node])
        return int(self.complete(np.array([at]))[0])

    def text(self, after: int, node: int) -> str:
        """The text of a prefix behind a shorter one."""
        labels = []
        while node != after:
            labels.append(int(self._tree.label[node]))
            node = int(self._tree.parent[node])
        return self._spelling.text(labels[::-1])

    def _need(self, nodes: np.ndarray) -> None:
        tree = self._tree
        if len(self._known) < len(tree.parent):
            more = len(tree.parent) - len(self._known)
            for name in ("_complete", "_number", "_known"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros(more, dtype=array.dtype)]))
        if self._known[nodes].all():
            return
        for node in np.unique(nodes).tolist():
            path = []
            while not self._known[node]:
                path.append(node)
                node = int(tree.parent[node])
            for node in reversed(path):
                self._add(node, int(tree.parent[node]), int(tree.label[node]))

    def _add(self, node: int, parent: int, label: int) -> None:
        spelling = self._spelling
        complete, number = self._complete[parent], self._number[parent]
        if spelling.at_once:
            complete, number = node, number + 1
        elif spelling.separator is None:
            if spelling.begins[label]:  # ends the word before, if there is one
                number += parent != ROOT
                complete = parent
        elif label == spelling.separator:
            number += complete != parent  # no second word where two separators meet
            complete = node
        self._complete[node], self._number[node] = complete, number
        self._known[node] = True

    def forget(self, nodes: list[int]) -> None:
        """See :class:`PrefixTree`."""
        self._known[[node for node in nodes if node < len(self._known)]] = False
