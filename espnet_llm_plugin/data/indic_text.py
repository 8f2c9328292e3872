"""Transcripts of hi bn ta te ml kn gu mr pa ur in one spelling (Unicode NFC).

Vowel signs, viramas and nuktas are kept; what is unified are encodings of one and the same letter.
For the nine Indic scripts the package ``indic-nlp-library`` (an optional dependency) does that. It
is guarded from what would spoil transcripts of speech:

* after a letter or digit it makes a visarga of a colon (``समय: 5`` -> ``समयः 5``, ``१०:३०`` ->
  ``१०ः३०``): here only within a word (``दु:ख``);
* it replaces Marathi's ``ॲ`` by ``ए``, another vowel;
* it deletes all joiners, also those that make another letter (see :data:`JOINERS`);
* it writes Malayalam's AU sign as before the reform; here it is today's (U+0D57).

Its rules for Urdu need yet another package; they are here: presentation forms and Arabic letters
become Urdu's own, short vowels and tatweel go. Text is in logical order in every language: the
letter that is spoken first comes first, and controls of direction go.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from espnet_llm_plugin.data.scripts import SCRIPT_OF_LANGUAGE, script_of
from espnet_llm_plugin.errors import UserError

LANGUAGES = ("hi", "bn", "ta", "te", "ml", "kn", "gu", "mr", "pa", "ur")
DIGITS = ("ascii", "native", "keep")
# ZWJ and ZWNJ cannot be heard, and are typed or not as one likes. `distinctive` keeps those that
# make another letter (the eyelash ra of Marathi, Hindi; ya-phala after ra of Bengali), `keep` also
# those that choose between shapes of the same letters (after a virama; between letters of Urdu).
JOINERS = ("distinctive", "keep", "remove")
LATIN = ("lower", "keep")

ZEROS = {
    "Devanagari": 0x0966,
    "Bengali": 0x09E6,
    "Gurmukhi": 0x0A66,
    "Gujarati": 0x0AE6,
    "Tamil": 0x0BE6,
    "Telugu": 0x0C66,
    "Kannada": 0x0CE6,
    "Malayalam": 0x0D66,
    "Arabic": 0x06F0,
}

_ZWNJ, _ZWJ, _CANDRA_A = "\u200c", "\u200d", "\u0972"
# Private characters stand for what must pass the library unseen; those of the input are dropped.
_HIDE = str.maketrans({_ZWNJ: "\ue000", _ZWJ: "\ue001", _CANDRA_A: "\ue002"})
_SHOW = {ord(hidden): shown for shown, hidden in _HIDE.items()}
_EYELASH_RA = re.compile("\u0930\u094d\u200d(?=[\u0915-\u0939])")
_RA_YA_PHALA = re.compile("\u09b0[\u200c\u200d]\u09cd\u09af")  # with ZWNJ in older text
_AFTER_VIRAMA = re.compile(
    "(?<=[\u094d\u09cd\u0a4d\u0acd\u0bcd\u0c4d\u0ccd\u0d4d])[\u200c\u200d](?=[\u0900-\u0d7f])"
)
_BETWEEN_ARABIC = re.compile("(?<=[\u0620-\u06d3])\u200c(?=[\u0620-\u06d3])")

_PRESENTATION_FORMS = re.compile("[\ufb50-\ufdff\ufe70-\ufefc]")
_HARAKAT = re.compile("[\u0610-\u061a\u064b-\u0653\u0656-\u065f\u0670\u06d6-\u06ed]")
_URDU = {
    0x064A: 0x06CC,  # yeh, alef maksura -> Farsi yeh
    0x0649: 0x06CC,
    0x0643: 0x06A9,  # kaf -> keheh
    0x0647: 0x06C1,  # heh, ae -> heh goal
    0x06D5: 0x06C1,
    0x06C0: 0x06C2,
    0x0629: 0x06C3,  # teh marbuta -> teh marbuta goal
    0x0640: None,  # tatweel
}
# Separators of 1,234,567 and 12,34,567, but not those of lists (2,3).
_GROUPED = re.compile(r"(?<=\d)[,\u066c](?=(?:\d\d[,\u066c])*\d{3}(?!\d))")
_DECIMAL = re.compile(r"(?<=\d)[.\u066b](?=\d)")
_POINT, _APOSTROPHE = "\ue003", "\ue004"


@dataclass(frozen=True)
class TextOptions:
    """How transcripts are spelt.

    Attributes:
        digits: ``ascii``, ``native`` (the script's own) or ``keep``, one of :data:`DIGITS`.
        joiners: One of :data:`JOINERS`.
        latin: Latin words stay, in lower case (``lower``) or as they are (``keep``).
    """

    digits: str = "ascii"
    joiners: str = "distinctive"
    latin: str = "lower"

    def __post_init__(self) -> None:
        for name, choices in (("digits", DIGITS), ("joiners", JOINERS), ("latin", LATIN)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} is '{getattr(self, name)}'; expected one of {', '.join(choices)}"
                )


DEFAULTS = TextOptions()


def check_language(lang: str) -> None:
    """Raise a :class:`UserError` unless ``lang`` is one of :data:`LANGUAGES`."""
    if lang not in LANGUAGES:
        raise UserError(f"unknown language code '{lang}'; expected one of {', '.join(LANGUAGES)}")


@cache
def _indic_normalizer(lang: str) -> Callable[[str], str]:
    try:
        from indicnlp.normalize.indic_normalize import IndicNormalizerFactory
    except ImportError:
        raise UserError(
            "normalising Indic text needs the Python package 'indic-nlp-library', which is not "
            "installed: run  pip install indic-nlp-library  (or install this package with its "
            "extra 'indic')"
        ) from None
    return IndicNormalizerFactory().get_normalizer(lang).normalize


def normalize(text: str, lang: str, options: TextOptions = DEFAULTS) -> str:
    """``text`` in the one spelling; ``""`` if no letter or digit is left.

    Punctuation (danda, Urdu's full stop, ...), symbols and control characters become spaces, but
    decimal points and the apostrophes of Latin words stay; separators of thousands go. Doing it
    twice changes nothing more.

    Args:
        text: A transcript, in any Unicode form.
        lang: One of :data:`LANGUAGES`.
        options: Spelling of digits, joiners and Latin words.

    Raises:
        UserError: Unknown language, or indic-nlp-library is missing (Urdu does not need it).
    """
    check_language(lang)
    text = "".join(map(_clean_character, unicodedata.normalize("NFC", text)))
    if lang == "ur":
        text = _normalize_urdu(text, options.joiners)
    else:
        text = _normalize_indic(text, lang, options.joiners)
    text = "".join(_respell_digit(char, lang, options.digits) for char in text)
    text = _without_punctuation(text)
    if options.latin == "lower":
        text = "".join(char.lower() if script_of(char) == "Latin" else char for char in text)
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if lang == "ml":
        text = text.replace("\u0d4c", "\u0d57")  # after NFC, which knows the old sign only
    return text if any(unicodedata.category(char)[0] in "LN" for char in text) else ""


@cache
def _clean_character(char: str) -> str:
    category = unicodedata.category(char)
    if char == "\u2019":
        return "'"
    if char == "\u200b" or category in ("Cc", "Zs", "Zl", "Zp"):
        return " "
    if category in ("Cf", "Co", "Cn", "Cs") and char not in (_ZWJ, _ZWNJ):
        return ""  # directions, soft hyphens, byte-order marks, unassigned
    if category == "No":  # superscripts, fractions
        return unicodedata.normalize("NFKC", char)
    return unicodedata.normalize("NFKC", char) if 0xFF01 <= ord(char) <= 0xFF5E else char


def _normalize_urdu(text: str, joiners: str) -> str:
    text = _PRESENTATION_FORMS.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFC", text).translate(_URDU)
    text = _HARAKAT.sub("", text)
    # Farsi yeh with a hamza above has no composition of its own.
    text = unicodedata.normalize("NFC", text).replace("\u06cc\u0654", "\u0626")
    if joiners == "keep":
        text = _BETWEEN_ARABIC.sub(lambda m: m[0].translate(_HIDE), text)
    return re.sub("[\u200c\u200d]", "", text).translate(_SHOW)


def _normalize_indic(text: str, lang: str, joiners: str) -> str:
    # 1. Colons that are none: within a word of the language's own script.
    script = SCRIPT_OF_LANGUAGE[lang]
    parts = text.split(":")
    for number, after in enumerate(parts[1:], 1):
        within = all(c and script_of(c) == script for c in (parts[number - 1][-1:], after[:1]))
        parts[number] = (":" if within else " ") + after
    text = "".join(parts)
    # 2. Hide what the library would replace. Malayalam's ZWJ are chillus of old, which it knows.
    text = text.replace("\u0905\u0945", _CANDRA_A).replace(_CANDRA_A, _CANDRA_A.translate(_HIDE))
    if joiners != "remove":
        text = _EYELASH_RA.sub(lambda m: m[0].translate(_HIDE), text)
        text = _RA_YA_PHALA.sub("\u09b0\u200d\u09cd\u09af".translate(_HIDE), text)
    if joiners == "keep":
        hidden = _AFTER_VIRAMA.sub(lambda m: m[0].translate(_HIDE), text)
        text = hidden if lang != "ml" else hidden.replace("\ue001", _ZWJ)
    return _indic_normalizer(lang)(text).translate(_SHOW)


def _respell_digit(char: str, lang: str, digits: str) -> str:
    if digits == "keep" or not char.isdecimal():
        return char
    value = unicodedata.decimal(char)
    return str(value) if digits == "ascii" else chr(ZEROS[SCRIPT_OF_LANGUAGE[lang]] + value)


def _without_punctuation(text: str) -> str:
    text = _DECIMAL.sub(_POINT, _GROUPED.sub("", text))
    text = re.sub("(?<=[A-Za-z])'(?=[A-Za-z])", _APOSTROPHE, text)
    kept = (" " if unicodedata.category(char)[0] in "PS" else char for char in text)
    return "".join(kept).replace(_POINT, ".").replace(_APOSTROPHE, "'")
