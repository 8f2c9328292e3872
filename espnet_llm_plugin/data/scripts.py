"""Writing systems: which one a character, a word or a language has, by Unicode blocks.

Only letters and the marks on them (vowel signs, viramas, nuktas, harakat) have a script. Digits,
punctuation, joiners and combining marks that every script uses have none.
"""

import unicodedata
from functools import cache
from typing import Optional

# Inclusive ranges of code points, by the script's name in the Unicode character database.
BLOCKS = {
    "Devanagari": ((0x0900, 0x0963), (0x0970, 0x097F), (0xA8E0, 0xA8FF)),
    "Bengali": ((0x0980, 0x09FF),),
    "Gurmukhi": ((0x0A00, 0x0A7F),),
    "Gujarati": ((0x0A80, 0x0AFF),),
    "Tamil": ((0x0B80, 0x0BFF),),
    "Telugu": ((0x0C00, 0x0C7F),),
    "Kannada": ((0x0C80, 0x0CFF),),
    "Malayalam": ((0x0D00, 0x0D7F),),
    "Arabic": (
        (0x0600, 0x06FF),
        (0x0750, 0x077F),
        (0x0870, 0x08FF),
        (0xFB50, 0xFDFF),
        (0xFE70, 0xFEFE),
    ),
    "Latin": ((0x0041, 0x024F), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A)),
}

SCRIPT_OF_LANGUAGE = {
    "hi": "Devanagari",
    "bn": "Bengali",
    "ta": "Tamil",
    "te": "Telugu",
    "ml": "Malayalam",
    "kn": "Kannada",
    "gu": "Gujarati",
    "mr": "Devanagari",
    "pa": "Gurmukhi",
    "ur": "Arabic",
    "ne": "Devanagari",
    **dict.fromkeys(("en", "de", "nl", "fr", "es", "it", "pt", "pl"), "Latin"),
}

MIXED = "mixed"


@cache
def script_of(character: str) -> Optional[str]:
    """Script of a letter or mark; ``None`` for anything else.

    Scripts outside :data:`BLOCKS` are called by the first word of the character's Unicode name
    (``Cyrillic``).
    """
    category = unicodedata.category(character)
    if category[0] not in "LM":
        return None
    code = ord(character)
    for script, ranges in BLOCKS.items():
        if any(first <= code <= last for first, last in ranges):
            return script
    if category[0] == "M" or category == "Lm":  # accents and modifiers of any script
        return None
    return unicodedata.name(character, "unknown").split()[0].capitalize()


def word_script(word: str) -> Optional[str]:
    """Script of a word's letters, :data:`MIXED` if there are several, ``None`` without letters."""
    scripts = {script_of(character) for character in word} - {None}
    if len(scripts) > 1:
        return MIXED
    return next(iter(scripts), None)
