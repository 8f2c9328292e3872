"""MLS: layout, opus, languages through all data stages, faults."""

import shutil

import pytest

from espnet_llm_plugin.bin import prepare_mls as command
from espnet_llm_plugin.data.corpora.mls import LANGUAGES, SPLITS, prepare_mls
from espnet_llm_plugin.data.filter import filter_data_dir
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.perturb import perturb_speed
from espnet_llm_plugin.data.validate import validate_data_dir
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table
from tests.data.corpora.conftest import write_audio


def test_tables(mls, tmp_path):
    written, mismatches = prepare_mls(mls, tmp_path / "data", ["pl", "de"])
    assert mismatches == [] and set(written) == set(SPLITS)
    train = tmp_path / "data" / "train"
    assert table(train / "text") == {
        "de_10_0_000000": "train das weiße pferd",
        "de_10_0_000002": "train der fluss",
        "de_11_0_000001": "train die grüne tür",
        "pl_10_0_000000": "train białego konia",
        "pl_11_0_000001": "train zielone drzwi",
    }
    assert table(train / "utt2lang") == {key: key[:2] for key in table(train / "text")}
    assert table(train / "utt2spk") == {key: key[:5] for key in table(train / "text")}
    assert table(train / "spk2gender") == {"de_10": "f", "de_11": "m", "pl_10": "f", "pl_11": "m"}


@pytest.mark.parametrize("lang, opus", [("de", True), ("pl", False)])
def test_equals_lhotses_own_recipe(mls, tmp_path, lang, opus):
    """lhotse's prepare_mls: the reference, too slow for the true corpus."""
    from lhotse.recipes.mls import prepare_mls as reference

    shutil.rmtree(mls / ("mls_polish" if opus else "mls_german_opus"))
    expected = reference(mls, opus=opus)[LANGUAGES[lang]]
    written, _ = prepare_mls(mls, tmp_path / "data", [lang])
    for split, data in written.items():
        manifests = expected[split]
        supervisions = {f"{lang}_{s.id}": s for s in manifests["supervisions"]}
        assert data.text == {key: s.text for key, s in supervisions.items()}
        assert data.utt2spk == {key: f"{lang}_{s.speaker}" for key, s in supervisions.items()}
        assert data.extra["spk2gender"] == {
            f"{lang}_{s.speaker}": s.gender.lower() for s in manifests["supervisions"]
        }
        assert data.wav == {f"{lang}_{r.id}": r.sources[0].source for r in manifests["recordings"]}


def test_opus_is_decoded_with_its_length(mls, tmp_path):
    prepare_mls(mls, tmp_path / "data", ["de"], nj=2)
    assert all(path.endswith(".opus") for path in table(tmp_path / "data/dev/wav.scp").values())
    format_data_dir(tmp_path / "data/dev", tmp_path / "dump", fs=16000)
    samples = {key: int(count) for key, count in table(tmp_path / "dump/utt2num_samples").items()}
    assert samples == {"de_10_1_000000": 4800, "de_11_1_000001": 6400, "de_10_1_000002": 8000}


def test_languages_survive_all_data_stages(mls, tmp_path):
    """utt2lang through validation, speed perturbation, formatting and filtering."""
    prepare_mls(mls, tmp_path / "data", ["de", "pl"])
    expected = table(tmp_path / "data/train/utt2lang")
    with (tmp_path / "data/train/wav.scp").open("a") as stream:
        stream.write("de_99_0_000000 nowhere.flac\n")
    validate_data_dir(tmp_path / "data/train", output_dir=tmp_path / "valid", drop_bad=True)
    assert table(tmp_path / "valid/utt2lang") == expected
    perturb_speed(tmp_path / "valid", tmp_path / "train_sp", ["0.9", "1.0"])
    expected |= {f"sp0.9-{key}": lang for key, lang in expected.items()}
    assert table(tmp_path / "train_sp/utt2lang") == expected
    format_data_dir(tmp_path / "train_sp", tmp_path / "org", fs=16000)
    assert table(tmp_path / "org/utt2lang") == expected
    # 0.3, 0.4, 0.5 s of German; the slow copies are longer by a ninth
    filter_data_dir(tmp_path / "org", tmp_path / "dump", fs=16000, max_duration=0.42)
    kept = table(tmp_path / "dump/text").keys()
    assert {key: expected[key] for key in kept} == table(tmp_path / "dump/utt2lang")
    assert len(kept) < len(expected)
    categories = table(tmp_path / "dump/category2utt")
    assert {lang: set(keys.split()) for lang, keys in categories.items()} == {
        lang: {key for key in kept if expected[key] == lang} for lang in ("de", "pl")
    }


def test_without_languages_there_is_no_category2utt(mls, tmp_path):
    prepare_mls(mls, tmp_path / "data", ["pl"])
    format_data_dir(tmp_path / "data/dev", tmp_path / "org", fs=16000)
    (tmp_path / "org/utt2lang").unlink()
    filter_data_dir(tmp_path / "org", tmp_path / "dump", fs=16000)
    assert not (tmp_path / "dump/category2utt").exists()


def test_flac_is_preferred(mls, tmp_path):
    shutil.copytree(mls / "mls_polish", mls / "mls_german")
    written, _ = prepare_mls(mls, tmp_path / "data", ["de"])
    assert all("/mls_german/" in path for path in written["dev"].wav.values())


def test_lengths_are_compared_with_segments(mls, tmp_path, capsys):
    write_audio(mls / "mls_polish/dev/audio/10/1/10_1_000000.flac", 1.0)
    _, mismatches = prepare_mls(mls, tmp_path / "data", ["de", "pl"])
    assert [str(mismatch) for mismatch in mismatches] == ["pl_10_1_000000 (1.00 s, not 0.30 s)"]
    command.main(["--mls", str(mls), "--langs", "pl", "--output_dir", str(tmp_path), "--nj", "1"])
    captured = capsys.readouterr()
    assert "1 utterance(s) are not as long as segments.txt says: pl_10_1_0" in captured.err
    assert "train: 2 utterances (pl 2)" in captured.out


TRANSCRIPTS = "mls_polish/dev/transcripts.txt"
SEGMENTS = "mls_polish/dev/segments.txt"


def append(path, line):
    def damage(root):
        with (root / path).open("a") as stream:
            stream.write(line)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / TRANSCRIPTS).unlink(), "mls_polish lacks dev/transcripts.txt"),
        (lambda root: (root / "mls_polish/metainfo.txt").unlink(), "mls_polish lacks metainfo.txt"),
        (
            lambda root: (root / "mls_polish/dev/audio/10/1/10_1_000000.flac").unlink(),
            r"text without audio \(1\): 10_1_000000",
        ),
        (
            lambda root: write_audio(root / "mls_polish/dev/audio/12/1/12_1_000007.flac"),
            r"audio without text \(1\): 12_1_000007",
        ),
        (append(TRANSCRIPTS, "12 a b\n"), r"not 2 columns separated by tabs \(1\): 12 a b"),
        (append(TRANSCRIPTS, "10_1_000000\tagain\n"), r"duplicate id \(1\): 10_1_000000 .*:3"),
        (append(TRANSCRIPTS, "10_1_000009\t\n"), r"empty transcript \(1\): 10_1_000009"),
        (append(SEGMENTS, "10_1_000009\tx\t1\n"), r"not 4 columns separated by tabs \(1\)"),
        (append(SEGMENTS, "10_1_000009\tx\t1\ttwo\n"), "times that are not numbers"),
    ],
)
def test_faults_are_named(mls, tmp_path, damage, message):
    damage(mls)
    with pytest.raises(UserError, match=rf"(?s){message}"):
        prepare_mls(mls, tmp_path / "data", ["de", "pl"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("nj", [1, 2])
def test_a_damaged_file_is_named(mls, tmp_path, nj):
    (mls / "mls_german_opus/dev/audio/11/1/11_1_000001.opus").write_bytes(b"OggS and no more")
    with pytest.raises(UserError, match="dev has a damaged audio file: .*11_1_000001.opus"):
        prepare_mls(mls, tmp_path / "data", ["de"], nj=nj)


@pytest.mark.parametrize("langs", [["de", "ru"], [], ["de", "de"]])
def test_wrong_languages(mls, tmp_path, langs):
    with pytest.raises(UserError, match=r"expected different ones of en \(english\), de \(ger"):
        prepare_mls(mls, tmp_path / "data", langs)


def test_missing_directories(mls, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory; expected one with mls_german"):
        prepare_mls(tmp_path / "nowhere", tmp_path / "data", ["de"])
    with pytest.raises(
        UserError,
        match="neither mls_english nor mls_english_opus; it has mls_german_opus, mls_polish",
    ):
        prepare_mls(mls, tmp_path / "data", ["de", "en"])
