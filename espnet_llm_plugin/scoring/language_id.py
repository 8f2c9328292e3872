"""How well the language of utterances was predicted: accuracies and confusions."""

from collections import Counter
from dataclasses import dataclass
from typing import Mapping

from espnet_llm_plugin.data.language_codes import UNKNOWN
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.trn import name_some

NAME = "language_id.json"  # in a scored directory
NOTHING = "none"  # of an utterance that could not be decoded


@dataclass(frozen=True)
class LanguageIdScores:
    """Of one set.

    Attributes:
        confusions: Utterances by language and predicted language.
        without: Utterances whose language is not known, which count nowhere.
    """

    confusions: dict[str, Counter]
    without: int

    @property
    def utterances(self) -> int:
        return sum(counts.total() for counts in self.confusions.values())

    @property
    def accuracy(self) -> float:
        """Share of all utterances, in per cent."""
        right = sum(counts[language] for language, counts in self.confusions.items())
        return 100 * right / self.utterances

    @property
    def macro(self) -> float:
        """Mean of the languages' accuracies, in per cent."""
        return sum(map(self.accuracy_of, self.confusions)) / len(self.confusions)

    def accuracy_of(self, language: str) -> float:
        """In per cent."""
        counts = self.confusions[language]
        return 100 * counts[language] / counts.total()

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "accuracy": self.accuracy,
            "macro": self.macro,
            "utterances": self.utterances,
            "without_language": self.without,
            "languages": {language: self.accuracy_of(language) for language in self.confusions},
            "confusions": {language: dict(counts) for language, counts in self.confusions.items()},
        }


def score_language_id(
    references: Mapping[str, str], hypotheses: Mapping[str, str]
) -> LanguageIdScores:
    """Compare predicted languages with true ones.

    Args:
        references: Languages by utterance; empty, ``unk`` or lacking: not known.
        hypotheses: Predicted ones; empty: none, which is wrong.

    Raises:
        UserError: An utterance without prediction, or no language that is known.
    """
    missing = sorted(
        key
        for key, code in references.items()
        if code not in ("", UNKNOWN) and key not in hypotheses
    )
    if missing:
        raise UserError(f"there is no predicted language of {name_some(missing)}")
    found: dict[str, Counter] = {}
    without = 0
    for key, predicted in hypotheses.items():
        if references.get(key, "") in ("", UNKNOWN):
            without += 1
            continue
        found.setdefault(references[key], Counter())[predicted or NOTHING] += 1
    if not found:
        raise UserError(f"no language is known of any of the {len(hypotheses)} utterances")
    return LanguageIdScores(dict(sorted(found.items())), without)


def confusion_table(scores: LanguageIdScores) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a language a row, with its utterances, accuracy, and what was predicted."""
    predicted = {name for counts in scores.confusions.values() for name in counts}
    columns = [*scores.confusions, *sorted(predicted - set(scores.confusions))]
    header = ["language", "utterances", "correct in %", *columns]
    cells = [
        [
            language,
            str(counts.total()),
            f"{scores.accuracy_of(language):.1f}",
            *(str(counts[name] or "") for name in columns),
        ]
        for language, counts in scores.confusions.items()
    ]
    empty = [""] * len(columns)
    cells.append(["all", str(scores.utterances), f"{scores.accuracy:.1f}", *empty])
    cells.append(["macro average", "", f"{scores.macro:.1f}", *empty])
    return header, cells
