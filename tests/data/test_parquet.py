"""Parquet files of the Hub: which they are, their rows, and their audio in Kaldi archives."""

import sys

import kaldiio
import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.data import parquet as module
from espnet_llm_plugin.data.audio import open_recording
from espnet_llm_plugin.data.parquet import (
    audio_bytes,
    columns_of,
    download,
    read_rows,
    require_pyarrow,
    seconds_of,
    split_files,
)
from espnet_llm_plugin.data.parquet_audio import (
    Columns,
    count_skipped,
    extract,
    extract_all,
    to_data_dir,
)
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import tone

pytest.importorskip("pyarrow", reason="pyarrow (extras `recipes`, `leaderboard`) is not installed")
from tests.data.parquet_sets import cell, encoded, write_parquet

COLUMNS = Columns(key="ID", audio="wav", text="text", speaker="spk_id", sex="sex")


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "names",
    [
        ["small/train-00000-of-00002.parquet", "small/train-00001-of-00002.parquet"],
        ["small/train/0000.parquet", "small/train/0001.parquet"],
        ["data/small/train-0.parquet"],
        ["small/train.parquet"],
        ["data/small/train/part/0.parquet"],
    ],
)
def test_usual_names(tmp_path, names):
    others = ["small/train_noisy-0.parquet", "medium/train-0.parquet", "small/dev-0.parquet"]
    for name in [*names, *others]:
        touch(tmp_path / name)
    assert split_files(tmp_path, "small", "train") == [tmp_path / name for name in names]
    assert split_files(tmp_path, "small", "test") == []


def test_the_card_has_the_last_word(tmp_path):
    for name in ("files/b.parquet", "files/a.parquet", "files/c.parquet", "one/train-0.parquet"):
        touch(tmp_path / name)
    card = """---
configs:
- config_name: one
  data_files:
  - split: train
    path: files/[ab].parquet
  - split: test.clean
    path: [nothing/here.parquet, files/c.parquet]
---
text
"""
    (tmp_path / "README.md").write_text(card)
    assert split_files(tmp_path, "one", "train") == [tmp_path / f"files/{n}.parquet" for n in "ab"]
    assert split_files(tmp_path, "one", "test.clean") == [tmp_path / "files/c.parquet"]
    assert split_files(tmp_path, "two", "train") == []
    for broken in ("---\nconfigs: 3\n---\n", "---\n: [\n---\n", "no head"):
        (tmp_path / "README.md").write_text(broken)
        assert split_files(tmp_path, "one", "train") == [tmp_path / "one/train-0.parquet"]


def test_rows(tmp_path):
    rows = [{"ID": f"u{n}", "text": f"t {n}", "wav": cell(b"x")} for n in range(150)]
    write_parquet(tmp_path / "a.parquet", rows, audio="wav")
    assert columns_of(tmp_path / "a.parquet") == ["ID", "text", "wav"]
    read = list(read_rows(tmp_path / "a.parquet", ["ID", "text"]))
    assert read == [{"ID": f"u{n}", "text": f"t {n}"} for n in range(150)]
    with pytest.raises(UserError, match="has no column sex; it has ID, text, wav"):
        list(read_rows(tmp_path / "a.parquet", ["ID", "sex"]))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="b.parquet is not a whole Parquet file"):
        list(read_rows(tmp_path / "b.parquet", ["ID"]))


def test_audio_of_a_cell(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded())
    assert audio_bytes(cell(b"x", "a.wav"), tmp_path) == b"x"
    assert audio_bytes(cell(None, "a.wav"), tmp_path) == encoded()
    for nothing in (None, cell(None), cell(None, "b.wav"), cell(b"")):
        assert audio_bytes(nothing, tmp_path) == b""
    assert seconds_of(encoded(0.5, 8000)) == 0.5
    assert seconds_of(b"no audio") is None and seconds_of(encoded(0.0)) is None


def row(key, text="A B", audio=b"", speaker="s", sex="male"):
    wav = cell(audio or encoded())
    return {"ID": key, "wav": wav, "text": text, "spk_id": speaker, "sex": sex}


@pytest.fixture
def files(tmp_path):
    write_parquet(
        tmp_path / "in/train-0.parquet",
        [
            row("a", audio=encoded(0.3)),
            row("b 1", "  C   D ", encoded(0.1, kind="FLAC"), None, None),
            row("bad", audio=b"not audio"),
            row(None),
        ],
        audio="wav",
    )
    more = [row("c", "", speaker="t 1", sex="Female"), row("a", "again"), {**row("d"), "wav": None}]
    write_parquet(tmp_path / "in/train-1.parquet", more, audio="wav")
    return [tmp_path / f"in/train-{n}.parquet" for n in range(2)]


def keep(text):
    return text.lower(), "" if text else "empty"


@pytest.mark.parametrize("nj", [1, 2])
def test_archives_and_tables(files, tmp_path, nj):
    data, skipped = to_data_dir(tmp_path, extract_all(files, tmp_path / "out", COLUMNS, nj), keep)
    assert data.text == {"a": "a b", "b_1": "c d"}
    assert data.utt2spk == {"a": "s", "b_1": "b_1"}
    assert data.extra == {"utt2dur": {"a": "0.300", "b_1": "0.100"}, "spk2gender": {"s": "m"}}
    assert skipped == {
        "unreadable audio": ["bad"],
        "no id": [""],
        "no audio": ["d"],
        "empty": ["c"],
        "duplicate id": ["a"],
    }
    assert count_skipped(skipped).startswith("5 skipped: 1 ")
    assert count_skipped({}) == "none skipped"
    # as this package and as ESPnet's library read them
    for key, seconds in (("a", 0.3), ("b_1", 0.1)):
        expected = tone(seconds, 16000)
        with open_recording(data.wav[key]) as recording:
            assert recording.rate == 16000
            np.testing.assert_allclose(recording.read()[:, 0], expected, atol=1e-4)
        rate, samples = kaldiio.load_mat(data.wav[key])
        assert (rate, len(samples)) == (16000, len(expected))


def test_an_interrupted_run_continues(files, tmp_path, monkeypatch):
    first = extract(files[0], tmp_path / "x.ark", COLUMNS)
    monkeypatch.setattr("espnet_llm_plugin.data.parquet_audio.read_rows", lambda *_: 1 / 0)
    assert extract(files[0], tmp_path / "x.ark", COLUMNS) == first
    with pytest.raises(ZeroDivisionError):  # another file, and other columns, are other work
        extract(files[1], tmp_path / "x.ark", COLUMNS)
    with pytest.raises(ZeroDivisionError):
        extract(files[0], tmp_path / "x.ark", COLUMNS._replace(sex=None))


def test_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="need the Python package 'pyarrow'.*pip install"):
        require_pyarrow()


class NoNetwork(Exception):
    """HTTP clients have errors of their own."""


class Hub:
    """Instead of the network: a data set's files; notes what was asked for."""

    def __init__(self, monkeypatch, files):
        import huggingface_hub

        self.files, self.asked = files, []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def list_repo_files(self, repository, repo_type):
        assert repo_type == "dataset"
        if self.files is None:
            raise NoNetwork("no route to host")
        return list(self.files)

    def snapshot_download(self, repository, allow_patterns, local_dir, repo_type):
        self.asked.append(allow_patterns)
        for name in allow_patterns:
            if name in self.files:
                touch(local_dir / name)
                (local_dir / name).write_text(self.files[name])


def test_download(tmp_path, monkeypatch):
    names = ["large/train-0.parquet", "small/train-1.parquet", "small/train-0.parquet"]
    hub = Hub(monkeypatch, dict.fromkeys([*names, "small/test-0.parquet", "README.md"], ""))
    assert download("a/b", "small", ["train", "test"], tmp_path / "x") == tmp_path / "x"
    assert hub.asked == [[module.CARD], [*names[1:], "small/test-0.parquet"]]
    with pytest.raises(UserError, match="a/b has no split 'dev' of configuration 'small'"):
        download("a/b", "small", ["dev"], tmp_path / "x")
    hub.files = None
    with pytest.raises(UserError, match="cannot download a/b: no route to host. Run the same"):
        download("a/b", "small", ["train"], tmp_path / "y")


def test_download_by_the_card(tmp_path, monkeypatch):
    card = "---\nconfigs:\n- config_name: s\n  data_files:\n  - split: train\n    path: x/*\n---\n"
    hub = Hub(monkeypatch, {"README.md": card, "x/0.parquet": "", "s/train-0.parquet": ""})
    download("a/b", "s", ["train"], tmp_path)
    assert hub.asked[-1] == ["x/0.parquet"]


def test_tones_are_what_the_reader_expects(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(0.25, 8000))
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.duration) == (8000, 0.25)
