"""Is a hypothesis written in its language's own script? By language, of a scored test set.

* Wrong letters: the share of letters (and their marks) outside the Unicode blocks of the language's
  script. Of the references it is what the speakers mixed in, or what the transcribers wrote in
  Latin letters; only what the hypotheses have beyond that is the recogniser's fault.
* Switched words: substitutions of a word by one of another script (``डॉक्टर`` by ``doctor``), per
  hundred words of the references: correct perhaps by ear, but an error all the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.data.scripts import SCRIPT_OF_LANGUAGE, script_of, word_script
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.alignment import SUBSTITUTION, align, pairs
from espnet_llm_plugin.scoring.trn import name_some, read_scored_words
from espnet_llm_plugin.scoring.wer import fold_case

LETTERS = "letters of other scripts in %"
WORDS = "words in another script per 100"


@dataclass
class ScriptScore:
    """Counts of one language."""

    script: str
    letters: int = 0  # of the hypotheses
    foreign: int = 0
    ref_letters: int = 0
    ref_foreign: int = 0
    words: int = 0  # of the references
    switched: int = 0

    @property
    def foreign_rate(self) -> float:
        """Letters outside the script's blocks, per cent of the hypotheses' letters."""
        return 100 * self.foreign / max(self.letters, 1)

    @property
    def ref_foreign_rate(self) -> float:
        """The same of the references."""
        return 100 * self.ref_foreign / max(self.ref_letters, 1)

    @property
    def switch_rate(self) -> float:
        """Words that were recognised as ones of another script, per 100 reference words."""
        return 100 * self.switched / max(self.words, 1)

    def add(self, reference: list[str], hypothesis: list[str]) -> None:
        """Count an utterance."""
        for words, letters, foreign in (
            (hypothesis, "letters", "foreign"),
            (reference, "ref_letters", "ref_foreign"),
        ):
            scripts = [script_of(char) for word in words for char in word]
            known = [script for script in scripts if script is not None]
            setattr(self, letters, getattr(self, letters) + len(known))
            others = sum(script != self.script for script in known)
            setattr(self, foreign, getattr(self, foreign) + others)
        self.words += len(reference)
        ref, hyp = fold_case(reference, False), fold_case(hypothesis, False)
        for kind, expected, found in pairs(align(ref, hyp), ref, hyp):
            if kind == SUBSTITUTION:
                scripts = {word_script(expected), word_script(found)}
                self.switched += len(scripts) > 1 and None not in scripts

    def as_dict(self) -> dict:
        """For JSON."""
        rates = ("foreign_rate", "ref_foreign_rate", "switch_rate")
        return {**vars(self), **{name: getattr(self, name) for name in rates}}


@dataclass(frozen=True)
class ScriptScores:
    """Of one scored test set."""

    languages: dict[str, ScriptScore]  # in alphabetical order
    unknown: list[str]  # languages whose script is not known here: they are left out

    def warnings(self) -> list[str]:
        """What a reader must know, a line for each language that is left out."""
        return [
            f"language {name} is left out of tables of scripts: its script is not in "
            "data/scripts.py"
            for name in self.unknown
        ]


def score_scripts(directory: Union[str, Path], utt2lang: Union[str, Path]) -> ScriptScores:
    """Counts by language.

    Args:
        directory: Scored decoding directory of a test set.
        utt2lang: Table ``<utterance> <language>``; may have more utterances.

    Raises:
        UserError: The directory is not scored, or an utterance has no language.
    """
    table = read_clean_table(utt2lang)
    scored = read_scored_words(directory)
    missing = [key for key in scored if key not in table]
    if missing:
        raise UserError(f"{utt2lang} has no language for {name_some(missing)} of {directory}")
    languages = sorted({table[key] for key in scored})
    known = [lang for lang in languages if lang in SCRIPT_OF_LANGUAGE]
    scores = {lang: ScriptScore(SCRIPT_OF_LANGUAGE[lang]) for lang in known}
    for key, (reference, hypothesis) in scored.items():
        if table[key] in scores:
            scores[table[key]].add(reference, hypothesis)
    return ScriptScores(scores, [lang for lang in languages if lang not in scores])


def script_tables(
    rows: Mapping[str, Mapping[str, ScriptScore]],
) -> list[tuple[list[str], list[list[str]]]]:
    """Header and cells of two tables, a system a row, a language a column.

    The first has a row of the references before the systems. ``mean``: over the languages.

    Args:
        rows: By directory, ``languages`` of what :func:`score_scripts` found; the same in each, at
            least one.
    """
    first = next(iter(rows.values()))
    header = [*first, "mean"]
    references = _cells("references", [score.ref_foreign_rate for score in first.values()])
    letters, words = [references], []
    for directory, scores in rows.items():
        letters.append(_cells(directory, [score.foreign_rate for score in scores.values()]))
        words.append(_cells(directory, [score.switch_rate for score in scores.values()]))
    return [([LETTERS, *header], letters), ([WORDS, *header], words)]


def _cells(name: str, rates: Sequence[float]) -> list[str]:
    return [name, *(f"{rate:.2f}" for rate in (*rates, sum(rates) / len(rates)))]
