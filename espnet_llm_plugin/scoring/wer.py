"""Word, character and token error rates of a test set, counted as NIST's sclite does.

What holds (tested on recorded output of sclite):

* correct, substitutions, deletions, insertions of every utterance equal sclite's, and hence all
  sums and percentages;
* jiwer's number of errors is the minimum over all alignments: sclite's is equal or larger, since
  its alignment weights a substitution 4 and a gap 3 (see ``alignment.py``); both are reported.

Dimensions: N = utterances.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import jiwer
import numpy as np

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.alignment import Counts, align, count
from espnet_llm_plugin.scoring.trn import name_some

# sclite folds ASCII letters only, whatever the encoding.
_FOLD = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


@dataclass(frozen=True)
class Summary:
    """One line of an sclite table: a set of utterances."""

    sentences: int
    sentence_errors: int
    counts: Counts

    def percentages(self) -> tuple[float, float, float, float, float, float]:
        """Corr, Sub, Del, Ins, Err in % of the reference's words, S.Err in % of the sentences.

        The first five are NaN where the references have no word.
        """
        counts = self.counts
        words = counts.words or math.nan
        return (
            100 * counts.correct / words,
            100 * counts.substitutions / words,
            100 * counts.deletions / words,
            100 * counts.insertions / words,
            100 * counts.errors / words,
            100 * self.sentence_errors / self.sentences,
        )

    @property
    def rate(self) -> float:
        """Error rate in per cent."""
        return self.percentages()[4]


@dataclass(frozen=True)
class Scored:
    """A test set, aligned utterance by utterance (in the order of the reference)."""

    ids: list[str]
    speakers: list[str]
    references: list[list[str]]
    hypotheses: list[list[str]]
    steps: list[str]  # alignments, see alignment.align
    counts: np.ndarray  # (N, 4) correct, substitutions, deletions, insertions
    jiwer: Counts  # of the Levenshtein alignment
    case_sensitive: bool

    @property
    def words(self) -> np.ndarray:
        """(N,) reference tokens of each utterance."""
        return self.counts[:, :3].sum(1)

    @property
    def errors(self) -> np.ndarray:
        """(N,) errors of each utterance."""
        return self.counts[:, 1:].sum(1)

    def summary(self, rows: Optional[Sequence[int]] = None) -> Summary:
        """Sum over all utterances, or over those with the given numbers."""
        counts = self.counts if rows is None else self.counts[list(rows)]
        return Summary(
            sentences=len(counts),
            sentence_errors=int((counts[:, 1:].sum(1) > 0).sum()),
            counts=Counts(*(int(number) for number in counts.sum(0))),
        )

    def by_speaker(self) -> dict[str, Summary]:
        """Sums of each speaker, in order of appearance."""
        rows = defaultdict(list)
        for row, speaker in enumerate(self.speakers):
            rows[speaker].append(row)
        return {speaker: self.summary(numbers) for speaker, numbers in rows.items()}


def score(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, Sequence[str]],
    speakers: Mapping[str, str],
    *,
    case_sensitive: bool = False,
) -> Scored:
    """Align and count a test set.

    Args:
        references: Tokens of each utterance; an empty reference is legal (all its hypothesis is
            insertions).
        hypotheses: Tokens of exactly the same utterances.
        speakers: Speaker of each utterance.
        case_sensitive: Tell ``A`` from ``a`` (sclite's ``-s``; ESPnet scores without it).

    Raises:
        UserError: The utterances differ, or no reference has a word.
    """
    odd = [key for key in hypotheses if key not in references]
    odd += [key for key in references if key not in hypotheses]
    if odd:
        raise UserError(f"references and hypotheses differ in utterances: {name_some(odd)}")

    ids = list(references)
    if not any(references[key] for key in ids):
        raise UserError("the references have no word at all: there is no error rate")
    refs = [fold_case(references[key], case_sensitive) for key in ids]
    hyps = [fold_case(hypotheses[key], case_sensitive) for key in ids]
    steps = [align(ref, hyp) for ref, hyp in zip(refs, hyps)]
    return Scored(
        ids=ids,
        speakers=[speakers[key] for key in ids],
        references=refs,
        hypotheses=hyps,
        steps=steps,
        counts=np.array([count(step) for step in steps], dtype=np.int64).reshape(-1, 4),
        jiwer=_jiwer_counts(refs, hyps),
        case_sensitive=case_sensitive,
    )


def fold_case(words: Sequence[str], case_sensitive: bool) -> list[str]:
    """The words as they are compared: in lower case (ASCII) unless ``case_sensitive``."""
    return list(words) if case_sensitive else [word.translate(_FOLD) for word in words]


def _jiwer_counts(refs: list[list[str]], hyps: list[list[str]]) -> Counts:
    # The texts are tokenized already; split at the blanks put in here, at nothing else.
    split = jiwer.ReduceToListOfListOfWords(word_delimiter=" ")
    output = jiwer.process_words(
        [" ".join(words) for words in refs], [" ".join(words) for words in hyps], split, split
    )
    return Counts(output.hits, output.substitutions, output.deletions, output.insertions)
