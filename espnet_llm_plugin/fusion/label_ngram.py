"""An n-gram of labels, estimated in seconds: a cheap LM of a recogniser's tokens.

As a bigram of training transcripts it stands for what a recogniser has learned of the text, its
internal LM (low-order density ratio, LODR [arXiv 2203.16776]). With more words of context, and of
LM text, it stands in for an LLM until that has read a word (:mod:`.delayed`). Smoothing is
interpolated Kneser-Ney [Chen and Goodman 1999] with one discount for each order k:

    P_k(v | h) = max(c(h v) - d_k, 0) / c(h .) + d_k N(h .) / c(h .) * P_k-1(v | h'),
    d_k = n1 / (n1 + 2 n2)

with h' the history h without its first token, n1, n2 the numbers of k-grams counted once and twice,
and N(h .) the number of labels seen after h. The highest order, and k-grams from the beginning of a
sentence, have their frequencies as counts c; others the number of tokens seen before them. P_1 is
1 % uniform.

The k-grams are the nodes of a trie of depth K: node = place in the sorted keys
``V * (node of the first k - 1 tokens) + token``.

N prefixes, V tokens of the list (blank 0, sos/eos V-1), E_k k-grams seen.
"""

import json
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from torch import Tensor

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError

_UNIFORM = 0.01
# Of the blank, which is no label. Not lower: it may be subtracted.
_BLANK = -16.0


class Order(NamedTuple):
    """The k-grams of one k, from 2.

    Attributes:
        keys: Sorted (E_k,).
        seen: Their discounted shares (E_k,).
        backoff: Weight of the lower order after each (k-1)-gram (E_k-1,).
        starts: Where the k-grams that go on from each (k-1)-gram begin (E_k-1 + 1,).
    """

    keys: np.ndarray
    seen: np.ndarray
    backoff: np.ndarray
    starts: np.ndarray


class LabelNgram(BatchScorerInterface):
    """Log-probs of the label after others, sentence begin and end included.

    Args:
        lower: P_1 (V,), 0 for the blank.
        orders: k-grams for k = 2, ..., K; the 1-grams are all V tokens.
    """

    # Rows depend on the last K - 1 tokens alone, whatever the lengths of prefixes and states.
    batch_any_length = True
    batch_any_extension = True

    def __init__(self, lower: np.ndarray, orders: Sequence[Order]):
        self._lower, self._orders = lower, tuple(orders)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self._lower)

    @property
    def order(self) -> int:
        """K."""
        return len(self._orders) + 1

    @property
    def context(self) -> int:
        """Tokens that the next one depends on: K - 1."""
        return len(self._orders)

    @classmethod
    def estimate(
        cls, sentences: Iterable[Sequence[int]], vocab_size: int, order: int
    ) -> "LabelNgram":
        """From sentences of token ids; 50 bytes of memory a token and order.

        Raises:
            UserError: No sentence, or ``order`` below 2.
        """
        if order < 2:
            raise UserError(f"order {order} of an n-gram: expected at least 2")
        eos = vocab_size - 1
        parts = [np.array([eos, *ids, eos], dtype=np.int64) for ids in sentences]
        if not parts:
            raise UserError("an n-gram cannot be estimated: there is not one sentence")
        token = np.concatenate(parts)
        place = np.concatenate([np.arange(len(part)) for part in parts])  # 0: sos
        # Nodes of the k-grams that end at each token, of those without their first token, and the
        # k-grams at the beginning of a sentence.
        node, keys, ends, shorter, first = token, [], [], [], []
        for k in range(2, order + 1):
            at = np.flatnonzero(place >= k - 1)
            found, number = np.unique(node[at - 1] * vocab_size + token[at], return_inverse=True)
            suffix, begins = np.empty(len(found), np.int64), np.zeros(len(found), bool)
            suffix[number] = node[at]
            begins[number[place[at] == k - 1]] = True
            node = np.full_like(token, -1)
            node[at] = number
            keys.append(found)
            ends.append(number)
            shorter.append(suffix)
            first.append(begins)
        lower = np.bincount(shorter[0], minlength=vocab_size).astype(float)
        lower = (1 - _UNIFORM) * lower / lower.sum() + _UNIFORM / (vocab_size - 1)
        lower[0] = 0.0
        orders = []
        for k in range(order - 1):  # of the (k + 2)-grams
            count = np.bincount(ends[k], minlength=len(keys[k]))
            if k < order - 2:
                before = np.bincount(shorter[k + 1], minlength=len(keys[k]))
                count = np.where(first[k], count, before)
            histories = vocab_size if k == 0 else len(keys[k - 1])
            orders.append(_discounted(keys[k], count.astype(float), histories, vocab_size))
        return cls((lower / lower.sum()).astype(np.float32), orders)

    def rows(self, before: Tensor) -> Tensor:
        """Log-probs (N, V) after the last tokens (N, C) of prefixes that begin with sos (V - 1).

        Only the last K - 1 tokens count; shorter prefixes are padded on the left with 0.
        """
        tokens = before.cpu().numpy()[:, -self.context :]
        rows = np.repeat(self._lower[None], len(tokens), axis=0)
        for length in range(1, tokens.shape[1] + 1):
            node = self._find(tokens[:, -length:])
            (row,) = np.nonzero(node >= 0)
            node, order = node[row], self._orders[length - 1]
            rows[row] *= order.backoff[node, None]
            first, last = order.starts[node], order.starts[node + 1]
            each = np.repeat(np.arange(len(row)), last - first)
            at = np.arange(len(each)) + np.repeat(last - np.cumsum(last - first), last - first)
            rows[row[each], order.keys[at] % self.vocab_size] += order.seen[at]
        rows[:, 0] = 1.0
        found = torch.from_numpy(np.log(rows))
        found[:, 0] = _BLANK
        return found

    def _find(self, tokens: np.ndarray) -> np.ndarray:
        """Nodes (N,) of k-grams (N, k), -1 where there is none."""
        node = tokens[:, 0]
        for k in range(1, tokens.shape[1]):
            keys = self._orders[k - 1].keys
            key = node * self.vocab_size + tokens[:, k]
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            node = np.where((node >= 0) & (keys[at] == key), at, -1)
        return node

    def __call__(self, ids: Tensor, hidden: None = None) -> tuple[Tensor, None]:
        """Log-probs (N, L, V) after each token of sequences (N, L) that begin with sos."""
        before = torch.nn.functional.pad(ids, (self.order - 2, 0)).unfold(1, self.order - 1, 1)
        return self.rows(before.flatten(0, 1)).view(*ids.shape, -1).to(ids.device), None

    def init_state(self, x: Any) -> None:
        """The last tokens of a prefix say everything."""
        return None

    def score(self, y: Tensor, state: None, x: Any) -> tuple[Tensor, None]:
        """Log-probs (V,) after a prefix (L,) that begins with sos; ``x`` is not used."""
        return self.rows(y[None])[0].to(y.device), None

    def batch_score(
        self, ys: Tensor, states: Sequence[Any], xs: Any
    ) -> tuple[Tensor, list[Optional[Any]]]:
        """As :meth:`score` for N prefixes (N, L), shorter ones padded on the left with 0."""
        return self.rows(ys).to(ys.device), [None] * len(ys)

    def save(self, path: Union[str, Path], tokens: Sequence[str]) -> None:
        """Write one file (numpy's ``npz``) with the token list."""
        if len(tokens) != self.vocab_size:
            raise ValueError(f"{len(tokens)} tokens, an n-gram over {self.vocab_size}")
        arrays = {"lower": self._lower, "tokens": np.array(json.dumps(list(tokens)))}
        for k, order in enumerate(self._orders, 2):
            arrays.update({f"{name}{k}": array for name, array in order._asdict().items()})
        with atomic_write(path, "wb") as stream:
            np.savez_compressed(stream, order=self.order, **arrays)

    @classmethod
    def load(
        cls, path: Union[str, Path], tokens: Sequence[str], name: str = "the ASR model"
    ) -> "LabelNgram":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: Missing or malformed, or of another token list than ``tokens``.
        """
        try:
            with np.load(path) as content:
                theirs = json.loads(str(content["tokens"]))
                lower = content["lower"]
                orders = [
                    Order(*(content[f"{field}{k}"] for field in Order._fields))
                    for k in range(2, int(content["order"]) + 1)
                ]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is not an n-gram as `python -m espnet_llm_plugin.bin.estimate_ngram` "
                f"writes it ({error})"
            ) from None
        if theirs != list(tokens):
            raise UserError(
                f"n-gram {path} is over another token list ({len(theirs)} tokens) than {name} "
                f"({len(tokens)} tokens): estimate it again with this token list by `python -m "
                "espnet_llm_plugin.bin.estimate_ngram`"
            )
        return cls(lower, orders)


def _discounted(keys: np.ndarray, count: np.ndarray, histories: int, vocab_size: int) -> Order:
    once, twice = (count == 1).sum(), (count == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    history = keys // vocab_size
    total = np.bincount(history, count, histories)
    kinds = np.bincount(history, minlength=histories)
    never = total == 0
    total[never] = 1.0
    return Order(
        keys,
        ((count - discount) / total[history]).astype(np.float32),
        np.where(never, 1.0, discount * kinds / total).astype(np.float32),
        np.searchsorted(history, np.arange(histories + 1)),
    )
