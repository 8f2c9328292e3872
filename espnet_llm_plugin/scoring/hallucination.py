"""Signs of hallucination in recognised text: loops, insertions in few utterances, odd lengths.

A speech LLM that loses the audio repeats itself until it is stopped, or goes on with likely text:
few utterances then hold many of the insertions [LLMs and Speech, arXiv 2603.15045, "oscillations"].
All of it is seen in hypotheses and references alone; no model is needed.

N utterances, W words of an utterance.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from espnet_llm_plugin.scoring.wer import Scored

MAX_PERIOD = 8  # words of the longest n-gram that is watched
MIN_COPIES = 3  # of it in a row, to be a loop: people say things twice
NGRAM = 3  # words of the n-gram that occurs twice anywhere
WORST = 0.01  # share of the utterances, at least one
LONG, SHORT = 1.3, 0.7  # hypothesis over reference words
MIN_WORDS_OFF = 3  # words by which the lengths differ at least: "yes yes" is no hallucination
EXAMPLES = 5


class Loop(NamedTuple):
    """A phrase that is repeated in a row, and how often (the last copy may be cut)."""

    phrase: str
    copies: float


@dataclass(frozen=True)
class Hallucination:
    """Of a test set; shares are from 0 to 1.

    Attributes:
        utterances: N.
        loops: Share of the hypotheses with a loop.
        reference_loops: Share of the references with a loop.
        new_loops: Share of the utterances with more repeated words in the hypothesis's loops than
            in the reference's.
        looped_words: Repeated words in loops, the first copies not counted, over all hypothesis
            words.
        repeated_ngrams: Share of the hypotheses in which some three words in a row occur twice.
        reference_repeated_ngrams: The same of the references.
        worst: Utterances that are 1 % of all, at least one.
        worst_insertions: Share of all insertions that the utterances with most of them hold; None
            without any insertion.
        worst_rate: Insertions per reference word in these.
        worst_errors: Share of all errors that the utterances with most errors hold; None without.
        ratio_low, ratio_median, ratio_high: Hypothesis over reference words of an utterance: 1st,
            50th, 99th percentile.
        too_long: Share of the utterances with more than ``LONG`` times the reference's words.
        too_short: Share with less than ``SHORT`` times; both ``MIN_WORDS_OFF`` words off at least.
        examples: Utterance, repeated phrase and number of copies: the longest of the new loops.
        most_inserted: Utterances with the most insertions, and how many.
    """

    utterances: int
    loops: float
    reference_loops: float
    new_loops: float
    looped_words: float
    repeated_ngrams: float
    reference_repeated_ngrams: float
    worst: int
    worst_insertions: Optional[float]
    worst_rate: float
    worst_errors: Optional[float]
    ratio_low: float
    ratio_median: float
    ratio_high: float
    too_long: float
    too_short: float
    examples: list[tuple[str, str, float]]
    most_inserted: list[tuple[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "Hallucination":
        """Read what :meth:`as_dict` gave, from JSON too; raises TypeError or KeyError."""
        lists = {
            name: [tuple(row) for row in table[name]] for name in ("examples", "most_inserted")
        }
        return cls(**{**table, **lists})


def hallucination(scored: Scored) -> Hallucination:
    """Look for the signs in a scored test set."""
    number = len(scored.ids)
    looped = np.array([repeated_in_loops(words) for words in scored.hypotheses])
    looped_ref = np.array([repeated_in_loops(words) for words in scored.references])
    new = looped > looped_ref
    insertions, words = scored.counts[:, 3], scored.words
    worst = math.ceil(WORST * number)
    most = np.argsort(-insertions, kind="stable")[:worst]
    lengths = np.array([len(hyp) for hyp in scored.hypotheses])
    some = words > 0
    # references without any word: nothing is longer or shorter
    ratios = lengths[some] / words[some] if some.any() else np.ones(1)
    low, median, high = np.percentile(ratios, [1, 50, 99]).tolist()
    off = abs(lengths - words) >= MIN_WORDS_OFF
    loops = [
        (row, longest_loop(scored.hypotheses[row]))
        for row in sorted(new.nonzero()[0], key=lambda row: (-looped[row], row))[:EXAMPLES]
    ]
    return Hallucination(
        utterances=number,
        loops=float((looped > 0).mean()),
        reference_loops=float((looped_ref > 0).mean()),
        new_loops=float(new.mean()),
        looped_words=float(looped.sum() / max(lengths.sum(), 1)),
        repeated_ngrams=_share(map(has_repeated_ngram, scored.hypotheses), number),
        reference_repeated_ngrams=_share(map(has_repeated_ngram, scored.references), number),
        worst=worst,
        worst_insertions=_part(insertions[most].sum(), insertions.sum()),
        worst_rate=float(insertions[most].sum() / max(words[most].sum(), 1)),
        worst_errors=_part(np.sort(scored.errors)[::-1][:worst].sum(), scored.errors.sum()),
        ratio_low=low,
        ratio_median=median,
        ratio_high=high,
        too_long=float((off & (lengths > LONG * words)).mean()),
        too_short=float((off & (lengths < SHORT * words)).mean()),
        examples=[(scored.ids[row], *loop) for row, loop in loops],
        most_inserted=[
            (scored.ids[row], int(insertions[row])) for row in most[:EXAMPLES] if insertions[row]
        ],
    )


def repeated_in_loops(words: Sequence[str]) -> int:
    """Words of all loops that are not of a loop's first copy."""
    repeated: set[int] = set()
    for first, end, _ in _loops(words):
        repeated.update(range(first, end))
    return len(repeated)


def longest_loop(words: Sequence[str]) -> Loop:
    """The loop of most words, of shorter phrases first; there must be one."""
    first, end, period = max(_loops(words), key=lambda loop: (loop[1] - loop[0], -loop[2]))
    return Loop(" ".join(words[first - period : first]), 1 + (end - first) / period)


def _loops(words: Sequence[str]) -> list[tuple[int, int, int]]:
    """First and last position (excluded) of the words that repeat the period before, and it."""
    found = []
    for period in range(1, min(MAX_PERIOD, len(words) // MIN_COPIES) + 1):
        first = None
        for i in range(period, len(words) + 1):
            if i < len(words) and words[i] == words[i - period]:
                first = i if first is None else first
            elif first is not None:
                if i - first >= (MIN_COPIES - 1) * period:
                    found.append((first, i, period))
                first = None
    return found


def has_repeated_ngram(words: Sequence[str]) -> bool:
    """Whether some ``NGRAM`` words in a row occur twice."""
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return len(set(ngrams)) < len(ngrams)


def _share(found: Any, number: int) -> float:
    return sum(found) / number


def _part(some: int, all_: int) -> Optional[float]:
    return float(some / all_) if all_ else None


def named_values(found: Hallucination) -> list[tuple[str, str]]:
    """Names and values for the reader."""

    def percent(share: Optional[float]) -> str:
        return "-" if share is None else f"{100 * share:.1f} %"

    return [
        ("utterances with a loop", percent(found.loops)),
        ("references with a loop", percent(found.reference_loops)),
        ("utterances with more loops than the reference", percent(found.new_loops)),
        ("repeated words in loops", percent(found.looped_words)),
        (f"utterances with {NGRAM} words twice", percent(found.repeated_ngrams)),
        (f"references with {NGRAM} words twice", percent(found.reference_repeated_ngrams)),
        ("insertions in the worst 1 % of the utterances", percent(found.worst_insertions)),
        ("insertions per reference word there", f"{found.worst_rate:.2f}"),
        ("errors in the worst 1 % of the utterances", percent(found.worst_errors)),
        (
            "hyp/ref words, percentiles 1, 50, 99",
            f"{found.ratio_low:.2f}, {found.ratio_median:.2f}, {found.ratio_high:.2f}",
        ),
        (f"hyp/ref words > {LONG}", percent(found.too_long)),
        (f"hyp/ref words < {SHORT}", percent(found.too_short)),
    ]
