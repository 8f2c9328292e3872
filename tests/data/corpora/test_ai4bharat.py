"""Larger sets of AI4Bharat, in the layouts that their publishers describe."""

import json

import pytest

from espnet_llm_plugin.data.corpora.ai4bharat import SETS, read_set
from espnet_llm_plugin.data.corpora.indic import prepare_indic
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table
from tests.data.corpora.conftest import write_audio
from tests.data.corpora.tiny_fleurs import make_fleurs

pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")


@pytest.fixture
def repository(tmp_path):
    return make_fleurs(tmp_path / "fleurs", "repository")


def make_kathbath(root):
    table_file = root / "hindi/train/transcription_n2w.txt"
    for name in ("844424931537866-594-f", "844424931029859-973-m"):
        write_audio(root / f"hindi/train/audio/{name}.wav", 0.3)
    table_file.write_text(
        "844424931537866-594-f.m4a\tनमस्ते दुनिया\n844424931029859-973-m.m4a\tघर\n", encoding="utf-8"
    )
    return ["hi_kathbath_844424931029859-973-m", "hi_kathbath_844424931537866-594-f"]


def make_indicvoices(root):
    write_audio(root / "Hindi/v1/train/0a_1.wav", 2.0)
    parts = [(0.0, 0.5, 0, "[noise] एक दो"), (0.5, 1.0, 1, "हाँ"), (1.0, 2.0, 0, "तीन")]
    content = {
        "speaker_id": "S77",
        "gender": "Female",
        "verbatim": [{"start": a, "end": b, "speaker_id": s, "text": "-"} for a, b, s, _ in parts],
        "normalized": [{"start": 0, "end": 9, "speaker_id": s, "text": t} for _, _, s, t in parts],
    }
    (root / "Hindi/v1/train/0a_1.json").write_text(json.dumps(content), encoding="utf-8")
    return ["hi_indicvoices_0a_1_001", "hi_indicvoices_0a_1_002"]


def make_shrutilipi(root):
    for number in (1, 2):
        write_audio(root / f"hindi/news-5/sent_{number}.wav", 0.3)
    (root / "hindi/train.tsv").write_text("/nowhere\nnews-5/sent_1.wav\t9\nnews-5/sent_2.wav\t9\n")
    (root / "hindi/train.wrd").write_text("आज का समाचार\nमौसम\n", encoding="utf-8")
    return ["hi_shrutilipi_news-5_sent_1", "hi_shrutilipi_news-5_sent_2"]


MAKE = {"kathbath": make_kathbath, "indicvoices": make_indicvoices, "shrutilipi": make_shrutilipi}


@pytest.mark.parametrize("name", list(SETS))
def test_more_training_data(name, repository, tmp_path):
    keys = MAKE[name](tmp_path / "set")
    prepared = prepare_indic(
        repository, tmp_path / "data", ["hi"], more_train={name: tmp_path / "set"}
    )
    sizes = {split: len(data.utterances) for split, data in prepared.data.items()}
    assert sizes == {"train": 5, "dev": 3, "test": 3}
    train = tmp_path / "data/train"
    assert set(keys) < table(train / "text").keys() == table(train / "utt2lang").keys()
    format_data_dir(train, tmp_path / "dump", fs=16000)  # FLEURS's recordings are whole segments
    samples = {k: int(v) for k, v in table(tmp_path / "dump/utt2num_samples").items()}
    assert samples["hi_7_1_trainhi1"] == 3200
    if name == "indicvoices":
        assert [samples[key] for key in keys] == [8000, 16000]
        assert [table(train / "text")[key] for key in keys] == ["एक दो", "तीन"]
        assert table(train / "utt2spk")[keys[0]] == "hi_indicvoices_S77"
        assert table(train / "spk2gender")["hi_indicvoices_S77"] == "f"
    else:
        assert [samples[key] for key in keys] == [4800, 4800]
    if name == "kathbath":
        assert table(train / "utt2spk")[keys[1]] == "hi_kathbath_594"
        assert table(train / "spk2gender")["hi_kathbath_594"] == "f"


KATHBATH_WAV = "hindi/train/audio/844424931029859-973-m.wav"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "kathbath",
            "hindi/train/transcription_n2w.txt",
            "no .*n2w.txt; expected .* its publishers",
        ),
        (
            "kathbath",
            "hindi/train/audio/844424931029859-973-m.wav",
            r"transcript without audio \(1",
        ),
        (
            "shrutilipi",
            "hindi/train.wrd",
            "no .*train.wrd; expected .* could not be tried",
        ),
        ("shrutilipi", "hindi/news-5/sent_1.wav", r"transcript without audio \(1\): news-5/sent_1"),
        ("indicvoices", "Hindi/v1/train/0a_1.wav", r"transcript without audio \(1\): 0a_1"),
        ("indicvoices", "Hindi/v1/train/0a_1.json", "Hindi has no utterance; expected <Language>/"),
    ],
)
def test_other_layouts_are_told(name, damage, message, tmp_path):
    MAKE[name](tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(UserError, match=rf"(?s){message}"):
        read_set(name, tmp_path, "hi")


def test_faults_of_larger_sets(tmp_path):
    make_kathbath(tmp_path)
    audio = tmp_path / "hindi/train/audio"
    (audio / "844424931029859-973-m.wav").rename(audio / "844424931029859-973-m.m4a")
    with pytest.raises(UserError, match=r"neither .wav nor .flac: convert it first .* \(1\): 8444"):
        read_set("kathbath", tmp_path, "hi")
    with pytest.raises(UserError, match="has no directory tamil or Tamil .*its directories: hindi"):
        read_set("kathbath", tmp_path, "ta")
    with pytest.raises(UserError, match="none is not a directory; expected <language>/train"):
        read_set("kathbath", tmp_path / "none", "hi")
    other = tmp_path / "other"
    make_shrutilipi(other)
    (other / "hindi/train.wrd").write_text("एक\n", encoding="utf-8")
    with pytest.raises(UserError, match="has 2 files below its header, but .*wrd has 1 lines"):
        read_set("shrutilipi", other, "hi")
    voices = tmp_path / "voices"
    make_indicvoices(voices)
    (voices / "Hindi/v1/train/0a_1.json").write_text('{"speaker_id": 1}')
    with pytest.raises(UserError, match=r"not as described \(1\): 0a_1.json .KeyError 'verbatim'"):
        read_set("indicvoices", voices, "hi")


def test_unknown_set(repository, tmp_path):
    with pytest.raises(UserError, match="unknown set 'odd'; expected one of kathbath"):
        prepare_indic(repository, tmp_path, ["hi"], more_train={"odd": tmp_path})
