"""Scorers without networks, and slow obvious searches, for tests of the label-synchronous search.

V tokens: 0 is forbidden (blank), V - 1 is start and end symbol.
"""

import itertools
from typing import Callable, Optional, Sequence

import torch

Prefix = tuple[int, ...]


class TableLM:
    """Random next-token log-probs looked up by utterance and prefix.

    It is a ``TokenScorer``; rows that extend an impossible parent fail.
    """

    def __init__(self, vocab_size: int, seed: int, sharpness: float = 1.5, end: float = 0.0):
        self.vocab_size = vocab_size
        self.seed, self.sharpness, self.end = seed, sharpness, end
        self.utterances: Sequence[int] = ()
        self.rows: list[tuple[int, Prefix]] = []
        self.batch_sizes: list[int] = []

    def begin(self, utterances: Sequence[int]) -> "TableLM":
        """For a batch; the numbers choose the tables."""
        self.utterances, self.rows, self.batch_sizes = list(utterances), [], []
        return self

    def log_probs(self, utterance: int, prefix: Prefix) -> torch.Tensor:
        seed = hash((self.seed, utterance, prefix)) % 2**31
        logits = torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))
        logits = logits * self.sharpness
        logits[-1] += self.end
        logits[0] = -torch.inf
        return logits.log_softmax(-1)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        before = self.rows or [(utt, ()) for utt in self.utterances]
        if not self.rows:
            assert tokens.tolist() == [self.vocab_size - 1] * len(self.utterances)
            assert parents.tolist() == list(range(len(self.utterances)))
            self.rows = before
        else:
            self.rows = [
                (before[parent][0], (*before[parent][1], token))
                for parent, token in zip(parents.tolist(), tokens.tolist())
            ]
        self.batch_sizes.append(len(self.rows))
        return torch.stack([self.log_probs(*row) for row in self.rows])

    def score(self, utterance: int, tokens: Sequence[int], ended: bool = True) -> float:
        """Log-prob of a whole sequence."""
        sequence = [*tokens, self.vocab_size - 1] if ended else list(tokens)
        return sum(
            float(self.log_probs(utterance, tuple(sequence[:i]))[token])
            for i, token in enumerate(sequence)
        )


class TableCTC:
    """CTC prefix scores by summing over all paths: a ``PartialScorer`` that is slow and obvious.

    Args:
        log_probs: Frames of each utterance (T, V), T small.
        eos: End symbol.
        candidates: Tokens that may be emitted besides ``eos``; default: all but the blank.
    """

    def __init__(
        self, log_probs: Sequence[torch.Tensor], eos: int, candidates: Optional[Sequence] = None
    ):
        self.eos = eos
        if candidates is None:
            candidates = [range(1, eos)] * len(log_probs)
        self.candidates = torch.tensor([[*sorted(some), eos] for some in candidates])
        self.tables = [prefix_table(frames, eos) for frames in log_probs]
        self.rows: list[tuple[int, Prefix]] = [(u, ()) for u in range(len(log_probs))]

    def score(self) -> torch.Tensor:
        rows = []
        for utterance, prefix in self.rows:
            prob = self.tables[utterance]
            before = prob((prefix, False))
            rows.append(
                [
                    prob((prefix, True)) - before
                    if token == self.eos
                    else prob(((*prefix, token), False)) - before
                    for token in self.candidates[utterance].tolist()
                ]
            )
        return torch.tensor(rows).nan_to_num(nan=-torch.inf, neginf=-torch.inf)

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        self.rows = [
            (self.rows[parent][0], (*self.rows[parent][1], token))
            for parent, token in zip(parents.tolist(), tokens.tolist())
        ]


def prefix_table(log_probs: torch.Tensor, eos: int) -> Callable[[tuple[Prefix, bool]], float]:
    """Log-probability of (prefix, whole): that the labels begin with it, or are it."""
    frames, size = log_probs.shape
    whole: dict[Prefix, float] = {}
    for path in itertools.product(range(size), repeat=frames):
        labels = tuple(label for label, _ in itertools.groupby(path) if label != 0)
        if eos in labels:
            continue
        prob = float(sum(log_probs[t, label] for t, label in enumerate(path)).exp())
        whole[labels] = whole.get(labels, 0.0) + prob
    prefixes: dict[Prefix, float] = {}
    for labels, prob in whole.items():
        for length in range(len(labels) + 1):
            prefixes[labels[:length]] = prefixes.get(labels[:length], 0.0) + prob

    def log_prob(key: tuple[Prefix, bool]) -> float:
        table = whole if key[1] else prefixes
        return float(torch.tensor(table.get(key[0], 0.0), dtype=torch.float64).log())

    return log_prob


def all_sequences(vocab_size: int, longest: int) -> list[Prefix]:
    """Every sequence of tokens 1 ... V - 2 of at most so many."""
    return [
        sequence
        for length in range(longest + 1)
        for sequence in itertools.product(range(1, vocab_size - 1), repeat=length)
    ]
