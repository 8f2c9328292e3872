"""Text normalisation: the Open ASR Leaderboard's results on hard cases, and what they should be."""

import json
import random
import sys
from pathlib import Path

import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.evaluate import evaluate
from espnet_llm_plugin.scoring.normalizers import (
    NORMALIZERS,
    REMOVED,
    RESTORED,
    build_normalizer,
    english_spellings,
)

pytest.importorskip("whisper_normalizer", reason="whisper-normalizer (extra `leaderboard`)")

FIXTURE = json.loads((Path(__file__).parent / "fixtures/leaderboard.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def leaderboard():
    return build_normalizer("leaderboard")


@pytest.mark.parametrize("side", ["reference", "hypothesis"])
@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: case["reference"][:30])
def test_equals_the_leaderboards_own_code(leaderboard, case, side):
    assert leaderboard(case[side]) == case[f"normalized_{side}"]


# By hand, from the rules' description.
HAND = {
    "I have twenty-one apples": "i have 21 apples",
    "in nineteen ninety nine": "in 1999",
    "$2 and 7 cents": "$2.07",
    "twenty pounds": "£20",
    "50 per cent": "50%",
    "the twenty-third": "the 23rd",
    "they can't, won't and shouldn't": "they can not will not and should not",
    "Mr. Brown's honour": "mister brown is honor",
    "Um, the grey theatre": "the gray theater",
    "[laughter] so <unk> (inaudible)": "so",
    "the U.S.A. and A.B.C.s": "the usa and abcs",
    "well... yes...": "well yes",
    "1,234 cafés": "1234 cafes",
}


@pytest.mark.parametrize("text", HAND)
def test_by_hand(leaderboard, text):
    assert leaderboard(text) == HAND[text]


def test_what_the_leaderboard_adds_to_whisper(leaderboard):
    whisper = build_normalizer("whisper_english")
    for text in ("the U.S.A. team", "well...5 men"):
        assert whisper(text) != leaderboard(text)
    same = "it's twenty pounds, Dr. Smith"
    assert whisper(same) == leaderboard(same) == "it is £20 doctor smith"
    # not the rules of the package that the table of spellings comes from
    assert whisper("kinda sorta dunno cause") == "kinda sorta dunno cause"


def test_basic_and_none():
    basic = build_normalizer("whisper_basic")
    assert basic("  Straße, (laut) [x] naïve!") == "straße naïve"
    # why it is not for Indic scripts: the vowel sign is gone
    assert basic("कि") != "कि"
    assert build_normalizer("none")(" A  b ") == " A  b "


@pytest.mark.parametrize("name", [name for name in NORMALIZERS if name != "none"])
def test_single_spaces_and_empty(name):
    normalize = build_normalizer(name)
    assert normalize("") == normalize(" \t\n") == ""
    words = ["Um", "a\t", "$5", "...", "(x)", "U.S.", "one", "o'clock,", "don't", "%", "3rd", "é"]
    pick = random.Random(0)
    for _ in range(200):
        text = normalize(" ".join(pick.choices(words, k=8)))
        assert text == " ".join(text.split())


def test_table_of_spellings_is_repaired():
    table = english_spellings()
    assert all(table[word] == value for word, value in RESTORED.items())
    assert not set(REMOVED) & set(table)
    assert table["colour"] == "color" and not [word for word in table.values() if "<" in word]


def test_own_normaliser_of_a_checkout(tmp_path):
    package = tmp_path / "normalizer"
    package.mkdir()
    with pytest.raises(UserError, match="no .*normalizer.py; expected a checkout of https"):
        build_normalizer("leaderboard", str(tmp_path))
    (package / "__init__.py").write_text("raise RuntimeError('needs all of their packages')\n")
    (package / "english_abbreviations.py").write_text("names = {'jon': 'john'}\n")
    code = (
        "from .english_abbreviations import names\n"
        "class EnglishTextNormalizer:\n"
        "    def __call__(self, text):\n"
        "        return '  '.join(names.get(word, word) for word in text.lower().split())\n"
    )
    (package / "normalizer.py").write_text(code)
    assert build_normalizer("leaderboard", str(tmp_path))("Jon  Smith") == "john smith"
    (package / "english_abbreviations.py").write_text("names = {'jon': 'jonathan'}\n")
    for cached in package.glob("__pycache__/*"):
        cached.unlink()
    assert build_normalizer("leaderboard", str(tmp_path))("Jon") == "jonathan"
    (package / "normalizer.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match="cannot be used .*no_such_package"):
        build_normalizer("leaderboard", str(tmp_path))


def test_bad_names(monkeypatch):
    with pytest.raises(UserError, match="'hf' is not one of none, whisper_basic"):
        build_normalizer("hf")
    with pytest.raises(UserError, match="belongs to the normalizer leaderboard, not none"):
        build_normalizer("none", "checkout")
    english_spellings.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install whisper-normalizer"):
        build_normalizer("leaderboard")


def test_scoring_with_a_normaliser(tmp_path):
    (tmp_path / "ref").write_text("a It's twenty pounds\nb The colour\n")
    (tmp_path / "hyp").write_text("a it is £20\nb the color um\n")
    errors = {}
    for name in ("none", "leaderboard"):
        result = evaluate(
            str(tmp_path / "ref"), str(tmp_path / "hyp"), str(tmp_path / name), normalizer=name
        )
        errors[name] = result.scores["wer"]["errors"]
        assert result.scores["normalizer"] == name
    assert errors == {"none": 5, "leaderboard": 0}
    (tmp_path / "ref").write_text("a <noise>\nb the colour\n")
    with pytest.raises(UserError, match="empty reference for a"):
        evaluate(
            str(tmp_path / "ref"),
            str(tmp_path / "hyp"),
            str(tmp_path / "x"),
            normalizer="leaderboard",
        )
