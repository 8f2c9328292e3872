"""A bigram of labels from training transcripts: a cheap estimate of the internal LM.

Low-order density ratio (LODR): a bigram stands for what a recogniser has learned of the text, and
its log-prob is subtracted where an external LM's is added [arXiv 2203.16776]. Smoothing is
interpolated Kneser-Ney with one discount:

    P(v | u) = max(c(u v) - d, 0) / c(u) + d N(u .) / c(u) * P1(v),   d = n1 / (n1 + 2 n2)

with n1, n2 the numbers of bigrams seen once and twice, N(u .) the number of labels seen after u,
and P1 proportional to the number of labels seen before v, 1 % of it uniform.

N prefixes, V tokens of the list (blank 0, sos/eos V-1), E bigrams seen.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence, Union

import numpy as np
import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from torch import Tensor

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError

_UNIFORM = 0.01
# Of the blank, which is no label. Not lower: it may be subtracted.
_BLANK = -16.0


class LabelBigram(BatchScorerInterface):
    """Log-probs of the label after another one, sentence begin and end included.

    Args:
        starts: Where the labels seen after each token begin in ``labels`` (V + 1,).
        labels: Labels seen (E,), by the token before them.
        seen: Their discounted shares (E,).
        backoff: Weight of P1 after each token (V,).
        lower: P1 (V,), 0 for the blank.
    """

    def __init__(
        self, starts: Tensor, labels: Tensor, seen: Tensor, backoff: Tensor, lower: Tensor
    ):
        self._starts, self._labels, self._seen = starts, labels, seen
        self._backoff, self._lower = backoff, lower

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self._lower)

    @classmethod
    def estimate(cls, sentences: Iterable[Sequence[int]], vocab_size: int) -> "LabelBigram":
        """From sentences of token ids.

        Raises:
            UserError: No sentence.
        """
        counts: Counter[tuple[int, int]] = Counter()
        eos = vocab_size - 1
        for ids in sentences:
            counts.update(zip([eos, *ids], [*ids, eos]))
        if not counts:
            raise UserError("a bigram cannot be estimated: there is not one sentence")
        pairs = np.array(sorted(counts), dtype=np.int64)
        number = np.array([counts[before, label] for before, label in map(tuple, pairs)], float)
        once, twice = (number == 1).sum(), (number == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.5
        total = np.bincount(pairs[:, 0], number, vocab_size)
        kinds = np.bincount(pairs[:, 0], minlength=vocab_size)
        before = np.bincount(pairs[:, 1], minlength=vocab_size).astype(float)
        lower = (1 - _UNIFORM) * before / before.sum() + _UNIFORM / (vocab_size - 1)
        lower[0] = 0.0
        never = total == 0
        total[never] = 1.0
        return cls(
            torch.from_numpy(np.searchsorted(pairs[:, 0], np.arange(vocab_size + 1))),
            torch.from_numpy(pairs[:, 1].copy()),
            torch.from_numpy((number - discount) / total[pairs[:, 0]]).float(),
            torch.from_numpy(np.where(never, 1.0, discount * kinds / total)).float(),
            torch.from_numpy(lower / lower.sum()).float(),
        )

    def rows(self, before: Tensor) -> Tensor:
        """Log-probs (N, V) after tokens (N,); sos is V - 1."""
        before = before.cpu()
        probabilities = self._backoff[before, None] * self._lower
        first, last = self._starts[before], self._starts[before + 1]
        which = torch.repeat_interleave(torch.arange(len(before)), last - first)
        offset = torch.arange(len(which)) - torch.repeat_interleave(
            (last - first).cumsum(0) - (last - first), last - first
        )
        at = first[which] + offset
        probabilities[which, self._labels[at]] += self._seen[at]
        probabilities[:, 0] = 1.0
        rows = probabilities.log()
        rows[:, 0] = _BLANK
        return rows

    def __call__(self, ids: Tensor, hidden: None = None) -> tuple[Tensor, None]:
        """Log-probs (N, L, V) after each token of sequences (N, L) that begin with sos."""
        return self.rows(ids.flatten()).view(*ids.shape, -1).to(ids.device), None

    def init_state(self, x: Any) -> None:
        """A bigram looks at the last token alone."""
        return None

    def score(self, y: Tensor, state: None, x: Any) -> tuple[Tensor, None]:
        """Log-probs (V,) after a prefix (L,) that begins with sos; ``x`` is not used."""
        return self.rows(y[-1:])[0].to(y.device), None

    def batch_score(
        self, ys: Tensor, states: Sequence[Any], xs: Any
    ) -> tuple[Tensor, list[Optional[Any]]]:
        """As :meth:`score` for N prefixes (N, L)."""
        return self.rows(ys[:, -1]).to(ys.device), [None] * len(ys)

    def save(self, path: Union[str, Path], tokens: Sequence[str]) -> None:
        """Write one file (numpy's ``npz``) with the token list."""
        if len(tokens) != self.vocab_size:
            raise ValueError(f"{len(tokens)} tokens, a bigram over {self.vocab_size}")
        arrays = {name.lstrip("_"): tensor.numpy() for name, tensor in vars(self).items()}
        with atomic_write(path, "wb") as stream:
            np.savez_compressed(stream, tokens=json.dumps(list(tokens)), **arrays)

    @classmethod
    def load(
        cls, path: Union[str, Path], tokens: Sequence[str], name: str = "the ASR model"
    ) -> "LabelBigram":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: Missing or malformed, or of another token list than ``tokens``.
        """
        try:
            with np.load(path) as content:
                theirs = json.loads(str(content["tokens"]))
                parts = [
                    torch.from_numpy(content[part])
                    for part in ("starts", "labels", "seen", "backoff", "lower")
                ]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is not a bigram as `python -m espnet_llm_plugin.bin.estimate_bigram` "
                f"writes it ({error})"
            ) from None
        if theirs != list(tokens):
            raise UserError(
                f"bigram {path} is over another token list ({len(theirs)} tokens) than {name} "
                f"({len(tokens)} tokens): estimate it again with this token list by `python -m "
                "espnet_llm_plugin.bin.estimate_bigram`"
            )
        return cls(*parts)
