"""What is in the n-best lists: oracle error rate, posterior, variance of the errors.

N utterances, K hypotheses of the longest list.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence, Union

from rapidfuzz.distance import Levenshtein

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.wer import fold_case


class Entry(NamedTuple):
    """A hypothesis of a list: words and score of the search (natural logarithm)."""

    words: list[str]
    total: float


@dataclass(frozen=True)
class NBestStatistics:
    """Of a test set; word errors are Levenshtein distances, rates are per cent.

    Attributes:
        utterances: N.
        words: Of the references.
        mean_length: Hypotheses of a list, on average.
        oracle: Error rate of the best of the first 1, 2, ..., K hypotheses; the first number is
            the 1-best's error rate.
        effective: exp(entropy) of the lists' posteriors (softmax of the totals), on average:
            1 if one hypothesis has all the probability, K if K are equal.
        without_variance: Share of the lists whose hypotheses all have as many errors.
    """

    utterances: int
    words: int
    mean_length: float
    oracle: list[float]
    effective: float
    without_variance: float

    @property
    def best(self) -> float:
        """Oracle error rate of the whole lists."""
        return self.oracle[-1]

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def read_lists(paths: Sequence[Union[str, Path]]) -> dict[str, list[Entry]]:
    """Lists by utterance, in order of rank, from ``nbest.jsonl`` files of decoding jobs.

    Raises:
        UserError: A missing or malformed file, a hypothesis without text, or ranks out of order.
    """
    lists: dict[str, list[Entry]] = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    entry = json.loads(line)
                    utt, rank = entry["utt"], int(entry["rank"])
                    words, total = entry["text"].split(), float(entry["total"])
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"{path}:{number} is not a line of asr_inference's nbest.jsonl ({error!r})"
                    ) from error
                if rank != len(lists.setdefault(utt, [])) + 1:
                    raise UserError(f"{path}:{number}: {utt} has rank {rank} out of order")
                lists[utt].append(Entry(words, total))
    return lists


def statistics(
    references: Mapping[str, str],
    lists: Mapping[str, Sequence[Entry]],
    *,
    case_sensitive: bool = False,
) -> NBestStatistics:
    """Statistics of the lists of the utterances of ``references``; a missing list is empty.

    Raises:
        UserError: No reference word, or no list at all.
    """
    words = sum(len(reference.split()) for reference in references.values())
    if not words or not any(lists.get(utt) for utt in references):
        raise UserError("no n-best list of an utterance with a reference")
    longest = max(len(lists.get(utt, ())) for utt in references)
    oracle, effective, alike, length = [0] * longest, 0.0, 0, 0
    for utt, reference in references.items():
        ref = fold_case(reference.split(), case_sensitive)
        entries = lists.get(utt) or [Entry([], 0.0)]
        errors = [
            Levenshtein.distance(ref, fold_case(entry.words, case_sensitive)) for entry in entries
        ]
        for k in range(longest):
            oracle[k] += min(errors[: k + 1])
        effective += math.exp(entropy([entry.total for entry in entries]))
        alike += len(set(errors)) == 1
        length += len(entries)
    number = len(references)
    return NBestStatistics(
        utterances=number,
        words=words,
        mean_length=length / number,
        oracle=[100 * errors / words for errors in oracle],
        effective=effective / number,
        without_variance=alike / number,
    )


def entropy(scores: Sequence[float]) -> float:
    """Entropy in nats of the softmax of scores."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights)
    return sum(-w / total * math.log(w / total) for w in weights if w)
