"""Synthetic corpora in the layouts of FLEURS, LibriSpeech and MLS."""

import json
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.bin import make_mini_corpus as command
from espnet_llm_plugin.data.corpora import mini_fleurs, mini_librispeech, mini_mls
from espnet_llm_plugin.data.corpora.fleurs import NAMES
from espnet_llm_plugin.data.corpora.indic import prepare_indic
from espnet_llm_plugin.data.corpora.librispeech import SETS, prepare_librispeech, prepare_lm_text
from espnet_llm_plugin.data.corpora.mini_fleurs import make_mini_fleurs
from espnet_llm_plugin.data.corpora.mini_librispeech import make_mini_librispeech
from espnet_llm_plugin.data.corpora.mini_mls import make_mini_mls, sentences
from espnet_llm_plugin.data.corpora.mls import LANGUAGES, prepare_mls
from espnet_llm_plugin.data.indic_text import LANGUAGES as INDIC
from espnet_llm_plugin.data.indic_text import normalize
from espnet_llm_plugin.data.scripts import SCRIPT_OF_LANGUAGE, word_script
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table

pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra `demo`) is not installed")

LIBRISPEECH = mini_librispeech.Sizes(train=12, dev=2, test=3, lm=30)
MLS = mini_mls.Sizes(train=4, dev=1, test=2)
FLEURS = mini_fleurs.Sizes(train=4, dev=1, test=2)


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini") / "librispeech"
    assert make_mini_librispeech(root, LIBRISPEECH, nj=2)
    return root


@pytest.fixture(scope="module")
def mls(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini") / "mls"
    assert make_mini_mls(root, MLS, nj=1)
    return root


def contents(root):
    """Files by name; of opus the samples, since every Ogg stream has a random serial number."""
    return {
        path.relative_to(root): soundfile.read(path)[0].tobytes()
        if path.suffix == ".opus"
        else path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_librispeech_is_prepared_as_the_true_corpus(librispeech, tmp_path):
    written = prepare_librispeech(librispeech, tmp_path, list(SETS))
    sizes = {name: len(data.utterances) for name, data in written.items()}
    assert sizes == {"train_clean_100": 12, "train_460": 24, "train_960": 36} | {
        "dev": 4,
        "dev_clean": 2,
        "dev_other": 2,
        "test_clean": 3,
        "test_other": 3,
    }
    for data in written.values():
        assert data.extra["spk2gender"].keys() == set(data.utt2spk.values())
    # readers and sentences of one part only
    parts = [data for name, data in written.items() if len(SETS[name]) == 1]
    for values in ("utt2spk", "text"):
        seen = Counter(v for data in parts for v in set(getattr(data, values).values()))
        assert max(seen.values()) == 1
    assert prepare_lm_text(librispeech / mini_librispeech.LM_TEXT, tmp_path / "lm") == 30
    lm = set(table(tmp_path / "lm").values())
    assert not lm & {text for data in parts for text in data.text.values()}


def test_other_is_noisier_than_clean(librispeech):
    """The margins hold no speech: silence where it is clean."""

    def floor(part):
        files = sorted((librispeech / "LibriSpeech" / part).rglob("*.flac"))
        return np.mean([np.abs(soundfile.read(file)[0][:600]).mean() for file in files])

    assert floor("test-clean") < 1e-4 < 1e-3 < floor("test-other")


def test_mls_is_prepared_as_the_true_corpus(mls, tmp_path):
    written, mismatches = prepare_mls(mls, tmp_path, list(LANGUAGES))
    assert not mismatches
    counts = {s: Counter(data.extra["utt2lang"].values()) for s, data in written.items()}
    assert counts["train"] == dict(zip(LANGUAGES, (4, 2, 2, 1, 1, 1, 1, 1)))
    assert counts["dev"] == dict.fromkeys(LANGUAGES, 1)
    assert counts["test"] == dict.fromkeys(LANGUAGES, 2)
    suffixes = {key[:2]: path.rpartition(".")[2] for key, path in written["test"].wav.items()}
    assert suffixes == {lang: "flac" if lang == "pl" else "opus" for lang in LANGUAGES}
    seen = Counter(text for data in written.values() for text in data.text.values())
    assert max(seen.values()) == 1


def test_every_language_has_its_own_voice(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(mini_mls, "build", lambda root, files, *_: planned.extend(files))
    make_mini_mls(tmp_path / "never", MLS)
    accents = {re.split("[_/]", s.path)[1]: s.speaker.accent for s in planned}
    assert accents == {language: lang for lang, language in LANGUAGES.items()} | {
        "english": "en-us"
    }
    sets = {(s.path.split("/")[0], s.path.split("/")[1], s.speaker) for s in planned}
    voices = Counter((top, voice) for top, _, voice in sets)
    assert max(voices.values()) == 1  # no voice in two splits


@pytest.fixture(scope="module")
def fleurs(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini") / "fleurs"
    assert make_mini_fleurs(root, FLEURS, nj=2)
    return root


@pytest.mark.parametrize("text_field", ["transcription", "raw_transcription"])
def test_fleurs_is_prepared_as_the_true_corpus(fleurs, tmp_path, text_field):
    pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")
    written = prepare_indic(fleurs, tmp_path, INDIC, text_field=text_field)
    assert not written.mismatches and not any(written.odd.values())
    counts = {s: Counter(data.extra["utt2lang"].values()) for s, data in written.data.items()}
    assert counts["train"] == dict(zip(INDIC, (4, 4, 4, 4, 2, 2, 2, 2, 2, 2)))
    assert counts["dev"] == dict.fromkeys(INDIC, 1) and counts["test"] == dict.fromkeys(INDIC, 2)
    seen = Counter(text for data in written.data.values() for text in data.text.values())
    assert max(seen.values()) == 1
    for data in written.data.values():
        for key, text in data.text.items():
            assert text in map(lambda s: normalize(s, key[:2]), mini_fleurs.sentences(key[:2]))


def test_fleurs_is_read_by_lhotse(fleurs, tmp_path):
    """With its tables where lhotse's own downloader puts them."""
    from lhotse.recipes.fleurs import prepare_single_fleurs_language

    for split in ("train", "dev", "test"):
        (tmp_path / "metadata/ta_in").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"metadata/ta_in/{split}.tsv").symlink_to(fleurs / f"ta_in/{split}.tsv")
    (tmp_path / "ta_in").symlink_to(fleurs / "ta_in/audio")
    manifests = prepare_single_fleurs_language(tmp_path / "ta_in", tmp_path / "out", "ta_in")
    assert {split: len(m["recordings"]) for split, m in manifests.items()} == {
        "train": 4,
        "dev": 1,
        "test": 2,
    }


def test_every_indic_language_has_its_own_voice(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(mini_fleurs, "build", lambda root, files, *_: planned.extend(files))
    make_mini_fleurs(tmp_path / "never", FLEURS)
    assert {s.path.split("/")[0]: s.speaker.accent for s in planned} == {
        name: lang for lang, name in NAMES.items()
    }
    sets = {(s.path.split("/")[0], s.path.split("/")[2], s.speaker) for s in planned}
    assert max(Counter((top, voice) for top, _, voice in sets).values()) == 1
    assert len({s.path for s in planned}) == len(planned)


def test_voices_differ(fleurs):
    """espeak-ng has a voice of its own for each: one sentence of Devanagari, two languages."""
    from espnet_llm_plugin.data.synthetic.speech import Synthesizer

    synthesizer = Synthesizer()
    phonemes = {lang: synthesizer.phonemes("ज्ञान चार", lang) for lang in ("hi", "mr")}
    assert phonemes["hi"] != phonemes["mr"]


@pytest.mark.parametrize("lang", INDIC)
def test_indic_templates(lang):
    pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")
    every = mini_fleurs.sentences(lang)
    assert len(every) == len(set(every)) == 900
    words = {word for sentence in every for word in sentence.split()}
    assert {word_script(word) for word in words} == {SCRIPT_OF_LANGUAGE[lang]}
    assert all(normalize(word, lang) == unicodedata.normalize("NFC", word) for word in words)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_templates(lang):
    every = sentences(lang)
    assert len(every) == len(set(every)) == 900
    text = " ".join(every)
    assert text == text.lower() and set(text) <= set("' ") | {c for c in text if c.isalpha()}


def test_the_same_arguments_give_the_same_corpus(mls, tmp_path):
    from espnet_llm_plugin.data.corpora import mini

    assert make_mini_mls(tmp_path / "again", MLS, nj=2)
    assert contents(tmp_path / "again") == contents(mls)
    assert not make_mini_mls(tmp_path / "again", MLS, nj=2)
    assert make_mini_mls(tmp_path / "again", MLS, seed=1)  # replaces the other
    report = json.loads((tmp_path / "again" / mini.REPORT).read_text())
    assert report["files"] == len(list((tmp_path / "again").rglob("audio/*/*/*")))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_true_corpus_is_never_replaced(tmp_path):
    (tmp_path / "mls_german").mkdir()
    with pytest.raises(UserError, match="exists and is not a synthetic corpus"):
        make_mini_mls(tmp_path, MLS)
    assert [path.name for path in tmp_path.iterdir()] == ["mls_german"]


def test_command_line(tmp_path, capsys):
    sizes = ["--train", "1", "--dev", "1", "--test", "1"]
    command.main(["mls", str(tmp_path / "c"), *sizes, "--nj", "1"])
    command.main(["mls", str(tmp_path / "c"), *sizes, "--nj", "1"])
    assert capsys.readouterr().out == f"{tmp_path}/c: made\n{tmp_path}/c: already complete\n"
    with pytest.raises(UserError, match="--lm 5: mls has train, dev, test"):
        command.main(["mls", str(tmp_path / "d"), "--lm", "5"])
