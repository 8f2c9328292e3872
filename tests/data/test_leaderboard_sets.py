"""Where a test set is found, and what of it is scored."""

import pytest

from espnet_llm_plugin.data.leaderboard_sets import (
    find_source,
    given_source,
    prepare_audio,
    read_references,
)
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table

pytest.importorskip("pyarrow", reason="pyarrow (extra `leaderboard`) is not installed")
from tests.data.parquet_sets import cell, encoded, write_parquet


def kaldi(directory, texts):
    directory.mkdir(parents=True)
    (directory / "r.wav").write_bytes(encoded(1.0, 8000))
    (directory / "wav.scp").write_text("r r.wav\n")  # relative to the directory
    starts = enumerate(texts)
    (directory / "segments").write_text(
        "".join(f"{key} r {n / 10} {n / 10 + 0.1}\n" for n, key in starts)
    )
    (directory / "text").write_text("".join(f"{key} {text}\n" for key, text in texts.items()))


@pytest.mark.parametrize(
    "place",
    ["ls_clean", "librispeech_test.clean", "librispeech_test_clean", "librispeech/test_clean"],
)
def test_names_of_kaldi_directories(tmp_path, place):
    assert find_source(tmp_path, "ls_clean", "librispeech", "test.clean") is None
    kaldi(tmp_path / place, {"a": "x"})
    source = find_source(tmp_path, "ls_clean", "librispeech", "test.clean")
    assert source.path == tmp_path / place and not source.parquet
    assert given_source(tmp_path / place) == source
    assert find_source(None, "ls_clean", "librispeech", "test.clean") is None


def test_parquet_files_go_before(tmp_path):
    kaldi(tmp_path / "ami", {"a": "x"})
    write_parquet(tmp_path / "ami/test-0.parquet", [{"id": "a", "audio": cell(b"")}])
    assert find_source(tmp_path, "ami", "ami", "test").parquet
    assert not given_source(tmp_path / "ami").parquet


def test_segments_and_empty_transcripts(tmp_path):
    kaldi(tmp_path / "set", {"a": "one  two", "b": "", "c": "three", "d": "no"})
    source = given_source(tmp_path / "set")
    references, dropped = read_references(source, lambda text: text not in ("", "no"))
    assert (references, dropped) == ({"a": "one two", "c": "three"}, 2)
    directory, seconds = prepare_audio(source, references, tmp_path / "out", fs=16000)
    assert directory == tmp_path / "out/data" and seconds == pytest.approx(0.2)
    assert table(directory / "utt2num_samples") == {"a": "1600", "c": "1600"}
    with pytest.raises(UserError, match="not one utterance has a reference to be scored"):
        read_references(source, lambda text: False)


def test_repeated_ids_are_told_apart(tmp_path):
    """In the references as in the audio, across files, whatever is not scored."""
    lengths = {"x": 0.1, "y": 0.2, "": 0.3, "z": 0.4}
    rows = [{"id": "a", "audio": cell(encoded(lengths[t])), "text": t} for t in lengths]
    write_parquet(tmp_path / "in/0.parquet", rows[:2])
    write_parquet(tmp_path / "in/1.parquet", rows[2:])
    source = given_source(tmp_path / "in")
    references, dropped = read_references(source, bool)
    assert (references, dropped) == ({"a": "x", "a-2": "y", "a-4": "z"}, 1)
    directory, _ = prepare_audio(source, references, tmp_path / "out")
    samples = table(directory / "utt2num_samples")
    assert samples == {"a": "1600", "a-2": "3200", "a-4": "6400"}
    assert table(directory / "text") == references


def test_a_result_depends_on_the_files(tmp_path):
    kaldi(tmp_path / "set", {"a": "one"})
    source = given_source(tmp_path / "set")
    before = source.identity()
    assert len(before) == 3
    (tmp_path / "set/text").write_text("a other\n")
    assert source.identity() != before
