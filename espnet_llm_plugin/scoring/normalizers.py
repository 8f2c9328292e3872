"""Text normalisation before scoring: by Whisper's rules, and as on the Open ASR Leaderboard.

==================  ==========================================================================
``none``            the transcripts as they are
``whisper_basic``   lower case; no brackets, symbols and punctuation (any language with letters
                    that are not combined; it destroys the vowel signs of Indic scripts)
``whisper_english`` Whisper's rules for English (Radford et al., arXiv 2212.04356, appendix C):
                    fillers, contractions, titles, numbers, currencies, British spellings
``leaderboard``     these, and what the leaderboard adds to them: ellipses and abbreviations
==================  ==========================================================================

The rules are those of ``transformers.models.whisper.english_normalizer``, which the leaderboard
started from; the table of spellings is that of the PyPI package ``whisper-normalizer``, with the
entries restored in which it differs from the leaderboard's. (The rules of that package itself add
``kinda``, ``sorta``, ``dunno`` and ``cause`` to the contractions, hence are not the leaderboard's.)

The leaderboard changes its rules without numbering them. ``leaderboard`` here is
``normalizer/normalizer.py`` at commit 0c261bf of github.com/huggingface/open_asr_leaderboard, from
the time of the eight test sets of ESB (see ``leaderboard.py``); later versions fold names (``jon``
-> ``john``), join acronyms, rewrite times of day and know more fillers. For the rules of another
version give its checkout: :func:`build_normalizer`'s ``leaderboard_repo``.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Callable, Optional

from espnet_llm_plugin.errors import UserError

Normalizer = Callable[[str], str]
NORMALIZERS = ("none", "whisper_basic", "whisper_english", "leaderboard")

# What the leaderboard's table has otherwise than the package's.
RESTORED = {
    "archaeological": "archeological",
    "archaeology": "archeology",
    "cancellation": "cancelation",
    "cancellations": "cancelations",
    "mm": "hmm",
    "pummelled": "pummeled",
    "pummelling": "pummeling",
    "snowploughs": "snowplows",
    "travelogue": "travelog",
    "travelogues": "travelogs",
}
REMOVED = ("archeological", "cancelation", "cancelations", "travelog", "travelogs")


def build_normalizer(name: str, leaderboard_repo: Optional[str] = None) -> Normalizer:
    """The function from a transcript to its normalised form, words separated by one space.

    Args:
        name: One of :data:`NORMALIZERS`.
        leaderboard_repo: Checkout of huggingface/open_asr_leaderboard whose own normaliser
            ``leaderboard`` is then (its Python files are executed).

    Raises:
        UserError: An unknown name, no such checkout, or a missing package.
    """
    if name not in NORMALIZERS:
        raise UserError(f"normalizer '{name}' is not one of {', '.join(NORMALIZERS)}")
    if leaderboard_repo is not None:
        if name != "leaderboard":
            raise UserError(f"--leaderboard_repo belongs to the normalizer leaderboard, not {name}")
        rules = _of_checkout(Path(leaderboard_repo))
    elif name == "none":
        return lambda text: text
    elif name == "whisper_basic":
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        rules = BasicTextNormalizer()
    elif name == "whisper_english":
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        rules = EnglishTextNormalizer(english_spellings())
    else:
        rules = _leaderboard_rules()
    return lambda text: " ".join(rules(text).split())


@cache
def english_spellings() -> dict[str, str]:
    """The leaderboard's table of British -> American spellings.

    Raises:
        UserError: ``whisper-normalizer`` is not installed.
    """
    # Found, not imported: the package's own modules need more than its table.
    spec = importlib.util.find_spec("whisper_normalizer")
    if spec is None or spec.origin is None:
        raise UserError(
            "the English normalizers need the Python package 'whisper-normalizer', which is not "
            "installed: run pip install whisper-normalizer  (or install this package with its "
            "extra 'leaderboard')"
        )
    path = Path(spec.origin).parent / "normalizers" / "english.json"
    spellings = json.loads(path.read_text(encoding="utf-8"))
    for word in REMOVED:
        spellings.pop(word, None)
    return {**spellings, **RESTORED}


def _leaderboard_rules() -> Normalizer:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    rules = EnglishTextNormalizer(english_spellings())
    # Abbreviations come before the contractions and titles, after brackets and fillers.
    rules.replacers = {**_abbreviations(), **rules.replacers}

    def normalize(text: str) -> str:
        # An ellipsis separates words; its dots would otherwise be taken for decimal points.
        text = re.sub(r"\.{3,}\s*$", "", text)
        return rules(re.sub(r"\s*\.{3,}\s*", " ", text))

    return normalize


def _abbreviations() -> dict[str, str]:
    """Patterns and replacements that join letters with dots: ``u.s.a.`` -> ``usa``, in order."""

    def letters(number: int, separator: str) -> str:
        return r"\b" + separator.join(["([a-z])"] * number)

    def joined(number: int) -> str:
        return "".join(rf"\{group}" for group in range(1, number + 1))

    dot, dot_and_blanks = r"\.", r"\.\s+"
    rules = {letters(3, dot) + r"\.s\b": joined(3) + "s"}
    # \b after an optional dot: the dot is taken only where a letter or digit follows it.
    rules |= {letters(number, dot) + r"\.?\b": joined(number) for number in (4, 3, 2)}
    rules |= {letters(number, dot_and_blanks) + r"\.\b": joined(number) for number in (4, 3, 2)}
    rules[letters(3, dot) + r"\.'s\b"] = joined(3) + "s"
    return rules


def _of_checkout(repository: Path) -> Normalizer:
    """``EnglishTextNormalizer`` of the package ``normalizer`` in a checkout of the leaderboard."""
    package = repository / "normalizer"
    missing = [
        n for n in ("normalizer.py", "english_abbreviations.py") if not (package / n).exists()
    ]
    if missing:
        raise UserError(
            f"--leaderboard_repo {repository}: there is no {package / missing[0]}; expected a "
            "checkout of https://github.com/huggingface/open_asr_leaderboard"
        )
    # Under a name of its own, and without its __init__.py, which needs every dependency of theirs.
    name = "_open_asr_leaderboard"
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    for known in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[known]  # of another checkout
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{name}.normalizer").EnglishTextNormalizer()
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        raise UserError(
            f"--leaderboard_repo {repository}: its English normaliser cannot be used ({error})"
        ) from error
