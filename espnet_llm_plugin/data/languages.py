"""The table utt2lang of a set, made complete for a training."""

from collections import Counter
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

from espnet_llm_plugin.data.language_codes import UNKNOWN, describe_foreign
from espnet_llm_plugin.errors import UserError


@dataclass(frozen=True)
class CompleteLanguages:
    """A language for every utterance.

    Attributes:
        table: Codes by utterance, in the order of the utterances; ``unk`` where none is known.
        counts: Utterances by language.
        without: Utterances that have no language.
        foreign: Utterances, by language, that the model does not know and takes for unknown.
        unused: Languages of the model without an utterance.
    """

    table: dict[str, str]
    counts: Counter
    without: list[str]
    foreign: dict[str, list[str]]
    unused: list[str]

    def report(self) -> list[str]:
        """Lines for a person."""
        counts = ", ".join(f"{code} {n}" for code, n in sorted(self.counts.items()))
        lines = [f"{len(self.table)} utterances: {counts}"]
        if self.without:
            lines.append(
                f"{len(self.without)} utterances have no language, e.g. {self.without[0]}: they "
                "count as unknown"
            )
        if self.foreign:
            foreign = ", ".join(
                f"{code} {len(them)}" for code, them in sorted(self.foreign.items())
            )
            lines.append(f"languages that the model does not know, taken as unknown: {foreign}")
        if self.unused:
            lines.append(f"languages of the model without an utterance: {', '.join(self.unused)}")
        return lines


def complete_languages(
    utt2lang: Mapping[str, str],
    utterances: Sequence[str],
    languages: Optional[Sequence[str]] = None,
    unknown_language: str = "error",
) -> CompleteLanguages:
    """The languages of ``utterances``.

    ESPnet's statistics want the same utterances in all files, in the same order, and a value for
    each.

    Args:
        utt2lang: Codes by utterance; may lack some and have others.
        utterances: Of the set.
        languages: Those that the model knows; None: any.
        unknown_language: What others are: an ``error``, or ``unk``.

    Raises:
        UserError: A language that the model does not know, or no utterance has a language.
    """
    table, counts = {}, Counter()
    without: list[str] = []
    foreign: dict[str, list[str]] = {}
    for utterance in utterances:
        code = utt2lang.get(utterance, "").strip() or UNKNOWN
        if code == UNKNOWN:
            without.append(utterance)
        elif languages is not None and code not in languages:
            foreign.setdefault(code, []).append(utterance)
            code = UNKNOWN
        table[utterance] = code
        counts[code] += 1
    if foreign and unknown_language == "error":
        raise UserError(
            f"{describe_foreign(foreign)}; it knows {', '.join(languages)}. "
            "Correct utt2lang, list the languages in decoder_conf (soft_prompt_conf.languages), "
            "or set unknown_language: unk"
        )
    if len(without) == len(table):
        raise UserError(f"not one of the {len(table)} utterances has a language")
    unused = [code for code in languages or () if not counts[code]]
    return CompleteLanguages(table, counts, without, foreign, unused)
