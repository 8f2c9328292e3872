"""LibriSpeech: layout, faults, LM text, download."""

import gzip
import hashlib
import os
import sys
import tarfile
import urllib.error

import lhotse
import pytest

from espnet_llm_plugin.bin import prepare_librispeech as command
from espnet_llm_plugin.data.corpora import librispeech as module
from espnet_llm_plugin.data.corpora.librispeech import (
    SETS,
    download_librispeech,
    download_lm_text,
    prepare_librispeech,
    prepare_lm_text,
)
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.kaldi import check_consistency, read_data_dir
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.data.validate import validate_data_dir
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table
from tests.data.corpora.conftest import write_audio


@pytest.mark.parametrize("root", ["", "LibriSpeech"])
def test_tables(librispeech, tmp_path, root):
    prepare_librispeech(librispeech / root, tmp_path / "data", ["train_clean_100", "dev"], nj=2)
    train = tmp_path / "data" / "train_clean_100"
    assert table(train / "text") == {
        "19-198-0000": "northanger abbey",
        "19-198-0001": "it's 19 198",
        "26-495-0000": "northanger abbey",
        "26-495-0001": "it's 26 495",
    }
    assert table(train / "utt2spk") == {key: key.split("-")[0] for key in table(train / "text")}
    assert table(train / "spk2gender") == {"19": "f", "26": "m"}
    assert all(
        path.endswith(f"/{key}.flac") and os.path.isabs(path) and os.path.isfile(path)
        for key, path in table(train / "wav.scp").items()
    )
    # dev is both dev parts; only one of their readers is in SPEAKERS.TXT
    dev = tmp_path / "data" / "dev"
    assert set(table(dev / "utt2spk").values()) == {"84", "116"}
    assert table(dev / "spk2gender") == {"84": "f"}
    for directory in (train, dev):
        _, problems = validate_data_dir(directory, check_audio="full")
        assert not problems.found


def test_capitals_are_kept_on_request(librispeech, tmp_path):
    prepare_librispeech(librispeech, tmp_path / "data", ["dev_clean"], lower_case=False)
    assert table(tmp_path / "data/dev_clean/text")["84-121-0000"] == "NORTHANGER ABBEY"


def test_without_speakers_there_are_no_genders(librispeech, tmp_path):
    (librispeech / "LibriSpeech/SPEAKERS.TXT").unlink()
    prepare_librispeech(librispeech, tmp_path / "data", ["dev"])
    assert not (tmp_path / "data/dev/spk2gender").exists()


CHAPTER = "LibriSpeech/dev-clean/84/121"
TRANSCRIPTS = f"{CHAPTER}/84-121.trans.txt"


def rewrite(content):
    return lambda root: (root / TRANSCRIPTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / TRANSCRIPTS).unlink(), r"audio without text \(2\): 84-121-0000, 84-"),
        (rewrite(b"84-121-0000 A\n"), r"audio without text \(1\): 84-121-0001"),
        (
            lambda root: (root / CHAPTER / "84-121-0001.flac").unlink(),
            r"text without audio \(1\): 84-121-0001",
        ),
        (rewrite(b"84-121-0000 A\n84-121-0001\n"), r"empty transcript \(1\): 84-121-0001"),
        (rewrite(b"84-121-0000 A\n\n84-121-0001 B\n"), r"empty line \(1\): .*trans.txt:2"),
        (rewrite(b"84-121-0000 A\n84-121-0001 \xff\n"), r"not UTF-8 \(1\): 84-121-0001"),
    ],
)
def test_faults_are_named(librispeech, tmp_path, damage, message):
    damage(librispeech)
    with pytest.raises(UserError, match=rf"(?s)dev-clean: .*{message}"):
        prepare_librispeech(librispeech, tmp_path / "data", ["dev"])
    assert not (tmp_path / "data").exists()


def test_a_damaged_file_is_named(librispeech, tmp_path):
    (librispeech / CHAPTER / "84-121-0001.flac").write_bytes(b"")
    with pytest.raises(UserError, match="dev-clean has a damaged audio file: .*84-121-0001.flac"):
        prepare_librispeech(librispeech, tmp_path / "data", ["dev"])


def test_an_empty_part(librispeech, tmp_path):
    (librispeech / "LibriSpeech/test-clean").mkdir()
    with pytest.raises(UserError, match="test-clean has neither transcripts nor audio"):
        prepare_librispeech(librispeech, tmp_path / "data", ["test_clean"])


def test_missing_directories(librispeech, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory; expected one with"):
        prepare_librispeech(tmp_path / "nowhere", tmp_path / "data", ["dev"])
    with pytest.raises(
        UserError, match=r"lacks train-clean-360; it has dev-clean, .*Unpack train-clean-360.tar.gz"
    ):
        prepare_librispeech(librispeech, tmp_path / "data", ["train_460"])
    with pytest.raises(UserError, match="no part at all"):
        prepare_librispeech(tmp_path, tmp_path / "data", ["test_clean"])
    with pytest.raises(UserError, match="has no set 'train_1000'; expected some of train_clean_"):
        prepare_librispeech(librispeech, tmp_path / "data", ["train_1000"])


def test_missing_lhotse_is_named(librispeech, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(UserError, match="needs the Python package 'lhotse'.*pip install"):
        prepare_librispeech(librispeech, tmp_path / "data", ["dev"])


def test_true_files(shared_data, tmp_path):
    """The part of LibriSpeech that is at hand, against its hand-made Kaldi directory."""
    source = shared_data / "speech" / "librispeech"
    sets = ["train_clean_100", "dev_clean", "test_clean", "test_other"]
    written = prepare_librispeech(source, tmp_path / "data", sets)
    texts = {key: text for data in written.values() for key, text in data.text.items()}
    expected = table(source / "text")
    assert texts == {key: text.lower() for key, text in expected.items()}
    for name in sets:
        problems = Problems(name)
        data = read_data_dir(tmp_path / "data" / name, problems)
        check_consistency(data, problems)
        assert not problems.found and data.extra["spk2gender"].keys() == set(data.utt2spk.values())
    durations = table(source / "utt2dur")
    for name in sets[:3]:
        format_data_dir(tmp_path / "data" / name, tmp_path / "dump" / name, fs=16000)
        for key, samples in table(tmp_path / "dump" / name / "utt2num_samples").items():
            assert int(samples) / 16000 == pytest.approx(float(durations[key]), abs=0.01)


# ---- LM text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_lm_text(tmp_path, packed):
    content = "A  SENTENCE\n\nIT'S ÆSOP'S\n".encode()
    (tmp_path / "lm.txt").write_bytes(gzip.compress(content) if packed else content)
    assert prepare_lm_text(tmp_path / "lm.txt", tmp_path / "out" / "text") == 2
    assert (tmp_path / "out/text").read_text() == (
        "librispeech_lm-000000001 a sentence\nlibrispeech_lm-000000002 it's æsop's\n"
    )
    prepare_lm_text(tmp_path / "lm.txt", tmp_path / "out" / "text", lower_case=False)
    assert "A SENTENCE" in (tmp_path / "out/text").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; it can be had from https"),
        (b"\n \n", "has no sentence"),
        (gzip.compress(os.urandom(100).hex().encode() + b"\n")[:-20], "damaged"),
        (b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_lm_text(tmp_path, content, message):
    if content is not None:
        (tmp_path / "lm.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_lm_text(tmp_path / "lm.txt", tmp_path / "text")
    assert not (tmp_path / "text").exists()


# ---- download -----------------------------------------------------------------------------------


def test_checksums_are_those_of_torchaudio():
    from torchaudio.datasets import librispeech as reference

    assert {f"{part}.tar.gz": sha for part, sha in module.ARCHIVES.items()} == {
        url.rpartition("/")[2]: sha for url, sha in reference._CHECKSUMS.items()
    }
    assert {part for parts in SETS.values() for part in parts} == set(module.ARCHIVES)


@pytest.fixture
def server(librispeech, tmp_path, monkeypatch):
    """Instead of the network: archives of the fixture's parts; returns what was asked for."""
    archives = tmp_path / "server"
    archives.mkdir()
    for part in ("dev-clean", "dev-other"):
        with tarfile.open(archives / f"{part}.tar.gz", "w:gz") as tar:
            tar.add(librispeech / "LibriSpeech" / part, f"LibriSpeech/{part}")
        digest = hashlib.sha256((archives / f"{part}.tar.gz").read_bytes()).hexdigest()
        monkeypatch.setitem(module.ARCHIVES, part, digest)
    (archives / "librispeech-lm-norm.txt.gz").write_bytes(gzip.compress(b"A B\n"))
    asked = []

    def resumable_download(url, filename, force_download=False):
        if not os.path.exists(filename):  # lhotse asks the server whether the file is complete
            asked.append(url)
            content = (archives / url.rpartition("/")[2]).read_bytes()
            with open(filename, "wb") as stream:
                stream.write(content)

    monkeypatch.setattr(lhotse.utils, "resumable_download", resumable_download)
    monkeypatch.setattr(lhotse.recipes.librispeech, "resumable_download", resumable_download)
    return archives, asked


def test_download_is_verified_and_kept(server, tmp_path, capsys):
    archives, asked = server
    options = ["--download_dir", str(tmp_path / "down"), "--output_dir", str(tmp_path / "data")]
    command.main([*options, "--sets", "dev", "--lm_text", "download", "--nj", "1"])
    assert len(table(tmp_path / "data/dev/text")) == 4
    assert table(tmp_path / "data/lm_train/text") == {"librispeech_lm-000000001": "a b"}
    assert [url.removeprefix("https://www.openslr.org/resources") for url in asked] == [
        "/12/dev-clean.tar.gz",
        "/12/dev-other.tar.gz",
        "/11/librispeech-lm-norm.txt.gz",
    ]
    command.main([*options, "--sets", "dev", "--lm_text", "download", "--nj", "1"])
    assert len(asked) == 3
    assert "dev: 4 utterances, 2 speakers" in capsys.readouterr().out


def test_a_damaged_archive_is_refused_and_removed(server, tmp_path):
    archives, _ = server
    with (archives / "dev-clean.tar.gz").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="damaged on its way.*run the same command again"):
        download_librispeech(tmp_path / "down", ["dev-clean"])
    assert not list((tmp_path / "down").iterdir())


def test_no_network(tmp_path, monkeypatch):
    def fail(url, filename):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(lhotse.utils, "resumable_download", fail)
    message = r"cannot download https.*no route to host.*--librispeech, --lm_text"
    with pytest.raises(UserError, match=message):
        download_librispeech(tmp_path, ["dev-clean"])
    with pytest.raises(UserError, match=message):
        download_lm_text(tmp_path)


def test_write_audio_writes_what_the_suffix_says(tmp_path):
    """Of the fixtures: true opus and true flac."""
    import soundfile

    for suffix, subtype in (("opus", "OPUS"), ("flac", "PCM_16")):
        write_audio(tmp_path / f"a.{suffix}")
        assert soundfile.info(tmp_path / f"a.{suffix}").subtype == subtype
