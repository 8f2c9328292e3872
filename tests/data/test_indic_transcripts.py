"""Transcripts that are empty or have other scripts are counted, by reason and language."""

from dataclasses import replace
from pathlib import Path

import pytest

from espnet_llm_plugin.data.indic_transcripts import (
    EMPTY,
    LATIN,
    OTHER,
    describe,
    normalize_transcripts,
)
from espnet_llm_plugin.data.kaldi import DataDir
from espnet_llm_plugin.errors import UserError

pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")

TEXT = {
    "a": "यह किताब है।",
    "b": "मेरा Phone कहाँ है?",
    "c": "…",
    "d": "یہ کتاب ہے",  # Urdu among the Hindi
    "e": "appवाला और கடை",
    "f": "کیا آپ؟",
}
LANG = dict.fromkeys("abcde", "hi") | {"f": "ur"}


@pytest.fixture
def data():
    wav = {key: f"{key}.wav" for key in TEXT}
    speakers = {key: key for key in TEXT}
    return DataDir(Path("data/train"), wav, speakers, dict(TEXT), extra={"utt2lang": dict(LANG)})


def test_kept_and_counted(data):
    kept, found = normalize_transcripts(data)
    assert kept.text == {
        "a": "यह किताब है",
        "b": "मेरा phone कहाँ है",
        "d": "یہ کتاب ہے",
        "e": "appवाला और கடை",
        "f": "کیا آپ",
    }
    assert kept.wav.keys() == kept.text.keys() == kept.extra["utt2lang"].keys()
    assert [(p.kind, p.key, p.detail) for p in found] == [
        (LATIN, "b", "phone"),
        (EMPTY, "c", "…"),
        (OTHER, "d", "یہ کتاب ہے"),
        (OTHER, "e", "appवाला கடை"),
    ]
    assert describe(found, LANG) == (
        "Latin words: 1 utterance(s) (hi 1); nothing left of the transcript: 1 utterance(s) (hi 1)"
        "; words of another script: 2 utterance(s) (hi 2)"
    )


def test_mixed_scripts_can_be_dropped(data):
    kept, found = normalize_transcripts(data, mixed_scripts="drop")
    assert kept.text.keys() == {"a", "f"} and len(found) == 4


def test_nothing_left_of_all(data):
    empty = replace(data, text=dict.fromkeys(TEXT, "!"))
    with pytest.raises(UserError, match="nothing is left of data/train: nothing left .*hi 5, ur 1"):
        normalize_transcripts(empty)


def test_languages_must_be_known(data):
    del data.extra["utt2lang"]["b"]
    with pytest.raises(UserError, match="1 utterance.* have no language in utt2lang, e.g. b"):
        normalize_transcripts(data)
    data.extra["utt2lang"]["b"] = "xx"
    with pytest.raises(UserError, match="unknown language codes: 'xx' .1 utterances.; expected"):
        normalize_transcripts(data)
    with pytest.raises(UserError, match="mixed_scripts is 'odd'"):
        normalize_transcripts(data, mixed_scripts="odd")
