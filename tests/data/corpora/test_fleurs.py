"""FLEURS: both layouts, lhotse's recipe as the reference, faults; all of prepare_indic."""

import shutil
from pathlib import Path

import pytest

from espnet_llm_plugin.bin import prepare_fleurs as command
from espnet_llm_plugin.data.corpora.fleurs import SPLITS, find_languages, read_fleurs
from espnet_llm_plugin.data.corpora.indic import prepare_indic
from espnet_llm_plugin.data.filter import filter_data_dir
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.indic_text import LANGUAGES
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table
from tests.data.corpora.conftest import write_audio
from tests.data.corpora.tiny_fleurs import TEXTS, make_fleurs, row

pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")


@pytest.fixture(params=["lhotse", "repository"])
def fleurs(request, tmp_path):
    return make_fleurs(tmp_path / "fleurs", request.param)


@pytest.fixture
def repository(tmp_path):
    return make_fleurs(tmp_path / "fleurs", "repository")


def test_tables(fleurs, tmp_path):
    prepared = prepare_indic(fleurs, tmp_path / "data", ["hi", "ur"])
    assert set(prepared.data) == set(SPLITS) and prepared.mismatches == []
    dev = tmp_path / "data/dev"
    assert table(dev / "text") == {
        "hi_7_1_devhi1": "यह किताब है",
        "hi_7_2_devhi2": "यह किताब है",
        "hi_9_1_devhi3": "मेरा phone",
        "ur_7_1_devur1": "یہ کتاب ہے",
        "ur_7_2_devur2": "یہ کتاب ہے",
        "ur_9_1_devur3": "دن",
    }
    assert table(dev / "utt2lang") == {key: key[:2] for key in table(dev / "text")}
    assert table(dev / "utt2spk") == {key: key[:6] for key in table(dev / "text")}
    assert table(dev / "spk2gender") == {"hi_7_1": "f", "hi_7_2": "m", "ur_7_1": "f", "ur_7_2": "m"}
    assert (dev / "transcripts.txt").read_text() == "hi_9_1_devhi3 Latin words: phone\n"
    assert all(Path(path).is_file() for path in table(dev / "wav.scp").values())


def test_equals_lhotses_own_recipe(tmp_path):
    from lhotse.recipes.fleurs import prepare_single_fleurs_language

    root = make_fleurs(tmp_path / "fleurs", "lhotse")
    expected = prepare_single_fleurs_language(root / "hi_in", tmp_path / "out", "hi_in")
    (language,) = find_languages(root, ["hi"])
    for split in SPLITS:
        data, _ = read_fleurs(language, split)
        supervisions = {f"hi_{s.id}": s for s in expected[split]["supervisions"]}
        assert data.text == {key: s.text for key, s in supervisions.items()}
        assert data.utt2spk == {key: f"hi_{s.speaker}" for key, s in supervisions.items()}
        sources = {r.id: str(r.sources[0].source) for r in expected[split]["recordings"]}
        assert data.wav == {key: sources[s.recording_id] for key, s in supervisions.items()}


def test_raw_transcripts(repository):
    language = find_languages(repository, ["hi"])[0]
    data, _ = read_fleurs(language, "dev", text_field="raw_transcription")
    assert data.text["hi_7_1_devhi1"] == TEXTS["hi"][0]
    with pytest.raises(UserError, match="text field 'odd'; expected one of transcription, raw"):
        read_fleurs(language, "dev", text_field="odd")


def test_languages_survive_formatting_and_filtering(repository, tmp_path):
    prepare_indic(repository, tmp_path / "data", ["hi", "ur"])
    format_data_dir(tmp_path / "data/train", tmp_path / "org", fs=16000)
    filter_data_dir(tmp_path / "org", tmp_path / "dump", fs=16000)
    assert table(tmp_path / "dump/utt2lang") == table(tmp_path / "data/train/utt2lang")
    assert list(table(tmp_path / "dump/category2utt")) == ["hi", "ur"]


def test_command(repository, tmp_path, capsys):
    tsv = repository / "data/hi_in/train.tsv"
    tsv.write_text(
        tsv.read_text("utf-8").replace("यह किताब है", "!", 2).replace("3200", "9000"), "utf-8"
    )
    common = ["--fleurs", str(repository), "--output_dir", str(tmp_path / "data"), "--nj", "1"]
    command.main([*common, "--langs", "hi", "ur", "--mixed_scripts", "drop"])
    captured = capsys.readouterr()
    assert f"{tmp_path}/data/train: 4 utterances (hi 1, ur 3)" in captured.out
    assert "nothing left of the transcript: 1 utterance(s) (hi 1)" in captured.err
    assert "Latin words: 1 utterance(s) (hi 1)" in captured.err
    assert "3 utterance(s) are not as long as their table says: hi_7_1_trainhi1 " in captured.err
    assert "(3200 samples, not 9000)" in captured.err
    assert set(table(tmp_path / "data/balanced_text")) <= set(table(tmp_path / "data/train/text"))
    assert len(table(tmp_path / "data/dev/text")) == 6  # mixed scripts are dropped of train only


TSV = "data/hi_in/dev.tsv"


def append(*rows):
    def damage(root):
        with (root / TSV).open("a", encoding="utf-8") as stream:
            stream.write("".join("\t".join(r) + "\n" for r in rows))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / TSV).unlink(), "FLEURS of 'hi' lacks .*hi_in/dev.tsv: download it"),
        (
            lambda root: shutil.rmtree(root / "data/hi_in/audio/dev"),
            "lacks .*audio/dev: download it again, or unpack audio/dev.tar.gz",
        ),
        (lambda root: (root / "data/hi_in/train.tsv").unlink(), "has no FLEURS of 'hi' .hi_in."),
        (append(row(9, "none.wav", "अब")), r"text without audio \(1\): none"),
        (append(row(9, "devhi1.wav", "अब")), r"duplicate file \(1\): devhi1 \(dev.tsv:4\)"),
        (append(["9", "a.wav", "अब"]), r"not 7 columns separated by tabs \(1\): a \(dev.tsv:4\)"),
        (append(row(9, "a.wav", "अब", samples="x")), r"no number \(1\): a \(dev.tsv:4: x\)"),
        (
            lambda root: write_audio(root / "data/hi_in/audio/dev/more.wav"),
            r"audio without text \(1\): more",
        ),
    ],
)
def test_faults_are_named(repository, tmp_path, damage, message):
    damage(repository)
    with pytest.raises(UserError, match=rf"(?s){message}"):
        prepare_indic(repository, tmp_path / "data", ["hi", "ur"])
    assert not (tmp_path / "data").exists()


def test_wrong_languages(repository, tmp_path):
    with pytest.raises(UserError, match="unknown language code 'xx'; expected one of hi, bn"):
        prepare_indic(repository, tmp_path, ["hi", "xx"])
    for langs in ([], ["hi", "hi"]):
        with pytest.raises(UserError, match="expected different ones of hi, bn"):
            prepare_indic(repository, tmp_path, langs)
    with pytest.raises(UserError, match="no FLEURS of 'ta' .ta_in.: .*ta_in/train.tsv"):
        prepare_indic(repository, tmp_path, ["ta"])
    with pytest.raises(UserError, match="nowhere is not a directory; expected one with hi_in"):
        prepare_indic(tmp_path / "nowhere", tmp_path, LANGUAGES)
