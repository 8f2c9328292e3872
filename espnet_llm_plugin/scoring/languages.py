"""Error rates by language, and their mean over languages, of scored test sets.

Works on what :mod:`evaluate` left (``score_<unit>/utterances.tsv``), so a test set need not be
scored again. The macro average is the mean of the languages' error rates, as the MLS tables have
it: every language counts the same, however many words its test set has.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence, Union

import numpy as np

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.bootstrap import RESAMPLES, error_rate_interval
from espnet_llm_plugin.scoring.evaluate import read_counts
from espnet_llm_plugin.scoring.graphemes import GER, count_graphemes
from espnet_llm_plugin.scoring.trn import name_some
from espnet_llm_plugin.scoring.units import WER

MACRO = "macro average"
MICRO = "all"


@dataclass(frozen=True)
class LanguageScore:
    """Error rate of one language in per cent, with its 95 % bootstrap interval."""

    utterances: int
    words: int
    errors: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return 100 * self.errors / self.words


@dataclass(frozen=True)
class LanguageScores:
    """Error rates of one system on one test set."""

    directory: str
    unit: str  # wer, cer, ter or ger
    languages: dict[str, LanguageScore]
    without_words: dict[str, int] = field(default_factory=dict)  # errors of languages left out

    @property
    def macro(self) -> float:
        """Mean of the languages' error rates."""
        return sum(score.rate for score in self.languages.values()) / len(self.languages)

    @property
    def micro(self) -> float:
        """Error rate of all utterances together, those of languages left out among them."""
        scores = self.languages.values()
        errors = sum(s.errors for s in scores) + sum(self.without_words.values())
        return 100 * errors / sum(s.words for s in scores)

    def warnings(self) -> list[str]:
        """What a reader must know, a line for each language that is left out."""
        return [
            f"language {name} is left out: its references have no word"
            for name in self.without_words
        ]

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "directory": self.directory,
            "macro": self.macro,
            "micro": self.micro,
            "without_words": self.without_words,
            "languages": {
                name: {**vars(score), "rate": score.rate} for name, score in self.languages.items()
            },
        }


def score_languages(
    directory: Union[str, Path],
    utt2lang: Union[str, Path],
    *,
    unit: str = WER,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LanguageScores:
    """Group the counts of a scored test set by language; languages without any word are left out.

    Args:
        directory: Scored decoding directory of a test set.
        utt2lang: Table ``<utterance> <language>``; may have more utterances.
        unit: ``wer``, ``cer`` (code points), ``ter`` or ``ger`` (grapheme clusters).
        resamples, seed: Of the bootstrap, within each language.

    Raises:
        UserError: The directory is not scored, or an utterance has no language.
    """
    counted = count_graphemes(directory) if unit == GER else read_counts(directory, unit)
    table = read_clean_table(utt2lang)
    missing = [key for key in counted.words if key not in table]
    if missing:
        raise UserError(f"{utt2lang} has no language for {name_some(missing)} of {directory}")
    groups: dict[str, list[str]] = {}
    for key in counted.words:
        groups.setdefault(table[key], []).append(key)
    languages, without_words = {}, {}
    for language, keys in sorted(groups.items()):
        words = np.array([counted.words[key] for key in keys])
        errors = np.array([counted.errors[key] for key in keys])
        if not words.sum():
            without_words[language] = int(errors.sum())
            continue
        low, high = error_rate_interval(errors, words, resamples=resamples, seed=seed)
        languages[language] = LanguageScore(
            len(keys), int(words.sum()), int(errors.sum()), low, high
        )
    return LanguageScores(str(directory), unit, languages, without_words)


def comparison(rows: Sequence[LanguageScores]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table: a system a row, a language a column, then both averages.

    Raises:
        UserError: The systems were scored on different languages.
    """
    languages = list(rows[0].languages)
    for row in rows[1:]:
        if list(row.languages) != languages:
            raise UserError(
                f"{rows[0].directory} has the languages {', '.join(languages)}, but "
                f"{row.directory} has {', '.join(row.languages)}"
            )
    header = [f"{rows[0].unit.upper()} in %", *languages, MACRO, MICRO]
    cells = [
        [
            row.directory,
            *(f"{row.languages[name].rate:.2f}" for name in languages),
            f"{row.macro:.2f}",
            f"{row.micro:.2f}",
        ]
        for row in rows
    ]
    return header, cells
