"""Scripts of characters, words and languages."""

import unicodedata

import pytest

from espnet_llm_plugin.data.indic_text import LANGUAGES
from espnet_llm_plugin.data.scripts import (
    BLOCKS,
    MIXED,
    SCRIPT_OF_LANGUAGE,
    script_of,
    word_script,
)
from tests.contracts.sentences import SENTENCES


@pytest.mark.parametrize("lang", sorted(SENTENCES))
def test_sentences_are_in_the_script_of_their_language(lang):
    for word in " ".join(SENTENCES[lang]).split():
        assert word_script(word) == SCRIPT_OF_LANGUAGE[lang]


@pytest.mark.parametrize("script", sorted(set(BLOCKS) - {"Latin"}))
def test_blocks_agree_with_the_names_of_unicode(script):
    """Every letter whose name begins with the script's is in its blocks, and no other."""
    for code in range(0x370, 0xFFFF):
        char = chr(code)
        name = unicodedata.name(char, "")
        if unicodedata.category(char) in ("Lo", "Mc") and not name.startswith("VEDIC"):
            assert (script_of(char) == script) == name.startswith(f"{script.upper()} "), name


def test_marks_and_letters_have_a_script():
    assert {script_of(char) for char in "क्षेड़ी"} == {"Devanagari"}
    assert script_of("é") == script_of("ł") == script_of("ａ") == "Latin"
    assert script_of("я") == "Cyrillic" and script_of("漢") == "Cjk"


@pytest.mark.parametrize("char", ["1", "१", " ", "।", "-", "\u200c", "\u0301", "₹", "ʼ"])
def test_others_have_none(char):
    assert script_of(char) is None


def test_words():
    assert word_script("2020") is None and word_script("") is None
    assert word_script("covid19") == "Latin" and word_script("१९वीं") == "Devanagari"
    assert word_script("appवाला") == MIXED


def test_every_language_of_the_recipe_has_one():
    assert {SCRIPT_OF_LANGUAGE[lang] for lang in LANGUAGES} == set(BLOCKS) - {"Latin"}
