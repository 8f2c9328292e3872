"""The transcripts of a data directory in one spelling, with what is odd about them, by reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.indic_text import DEFAULTS, LANGUAGES, TextOptions, normalize
from espnet_llm_plugin.data.kaldi import DataDir
from espnet_llm_plugin.data.problems import EXAMPLES, Problem
from espnet_llm_plugin.data.scripts import SCRIPT_OF_LANGUAGE, word_script
from espnet_llm_plugin.errors import UserError

EMPTY = "nothing left of the transcript"
LATIN = "Latin words"
OTHER = "words of another script"
MIXED_SCRIPTS = ("keep", "drop")


def normalize_transcripts(
    data: DataDir,
    options: TextOptions = DEFAULTS,
    *,
    mixed_scripts: str = "keep",
) -> tuple[DataDir, list[Problem]]:
    """Normalise all transcripts; utterances without any text left are dropped.

    Args:
        data: With ``utt2lang`` in ``extra``.
        options: Spelling.
        mixed_scripts: What becomes of utterances with words that are not in the language's script:
            ``keep`` (code-switching is speech, too), or ``drop`` them like the empty ones.

    Returns:
        The data, and one :class:`Problem` for each utterance that is empty or has other scripts
        (with these words).

    Raises:
        UserError: Utterances without a language or with an unknown one, or nothing is left.
    """
    if mixed_scripts not in MIXED_SCRIPTS:
        raise UserError(
            f"mixed_scripts is '{mixed_scripts}'; expected one of {', '.join(MIXED_SCRIPTS)}"
        )
    utt2lang = data.extra.get("utt2lang", {})
    text = normalize_table(data.path, data.text, utt2lang, options)
    found = [
        problem
        for key, original in data.text.items()
        for problem in _oddities(key, text[key], original, utt2lang[key])
    ]
    dropped = {p.key for p in found if p.kind == EMPTY or mixed_scripts == "drop"}
    kept = replace(data, text=text).restrict(text.keys() - dropped)
    if text and not kept.text:
        raise UserError(f"nothing is left of {data.path}: {describe(found, utt2lang)}")
    return kept, found


def normalize_table(
    source: Union[str, Path],
    text: dict[str, str],
    utt2lang: dict[str, str],
    options: TextOptions = DEFAULTS,
) -> dict[str, str]:
    """``text`` (by utterance) in one spelling; ``source`` is for messages.

    Raises:
        UserError: Utterances without a language or with an unknown one.
    """
    without = sorted(text.keys() - utt2lang.keys())
    if without:
        raise UserError(
            f"{source}: {len(without)} utterance(s) have no language in utt2lang, e.g. "
            + ", ".join(without[:EXAMPLES])
        )
    unknown = Counter(utt2lang[key] for key in text if utt2lang[key] not in LANGUAGES)
    if unknown:
        raise UserError(
            f"utt2lang of {source} has unknown language codes: "
            + ", ".join(f"'{code}' ({count} utterances)" for code, count in unknown.most_common())
            + f"; expected some of {', '.join(LANGUAGES)}"
        )
    return {key: normalize(line, utt2lang[key], options) for key, line in text.items()}


def _oddities(key: str, text: str, original: str, lang: str) -> list[Problem]:
    if not text:
        return [Problem(EMPTY, key, original)]
    own = SCRIPT_OF_LANGUAGE[lang]
    latin, other = [], []
    for word in text.split():
        script = word_script(word)
        if script == "Latin":
            latin.append(word)
        elif script not in (None, own):
            other.append(word)
    pairs = ((LATIN, latin), (OTHER, other))
    return [Problem(kind, key, " ".join(words)) for kind, words in pairs if words]


def describe(found: Sequence[Problem], utt2lang: dict[str, str]) -> str:
    """One line: how many utterances of which language, by reason."""
    counts: dict[str, Counter] = {}
    for problem in found:
        counts.setdefault(problem.kind, Counter())[utt2lang[problem.key]] += 1
    return "; ".join(
        f"{kind}: {languages.total()} utterance(s) ("
        + ", ".join(f"{lang} {count}" for lang, count in sorted(languages.items()))
        + ")"
        for kind, languages in counts.items()
    )
