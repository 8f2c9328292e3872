"""Dividing keys among jobs and merging results."""

import pytest

from espnet_llm_plugin.data.kaldi import read_data_dir
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.data.split import merge_outputs, select, split_keys
from espnet_llm_plugin.errors import UserError


@pytest.mark.parametrize("lines, nj, sizes", [(7, 3, [3, 2, 2]), (2, 5, [1, 1]), (4, 1, [4])])
def test_split(tmp_path, lines, nj, sizes):
    keys = tmp_path / "wav.scp"
    keys.write_text("".join(f"u{i} path {i}.wav\n" for i in range(lines)))
    target = tmp_path / "log"
    assert split_keys(keys, nj, target) == len(sizes)
    parts = [(target / f"keys.{job + 1}.scp").read_text() for job in range(len(sizes))]
    assert [len(part.splitlines()) for part in parts] == sizes
    assert "".join(parts) == keys.read_text()


def test_split_again_leaves_no_files_of_more_jobs(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a\nb\nc\n")
    split_keys(keys, 3, tmp_path / "log", "train")
    split_keys(keys, 2, tmp_path / "log", "train")
    assert sorted(f.name for f in (tmp_path / "log").iterdir()) == ["train.1.scp", "train.2.scp"]


def test_wrong_split(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("")
    with pytest.raises(UserError, match="keys is empty"):
        split_keys(keys, 2, tmp_path / "log")
    with pytest.raises(UserError, match="at least 1, not 0"):
        split_keys(keys, 0, tmp_path / "log")
    with pytest.raises(UserError, match="cannot read"):
        split_keys(tmp_path / "none", 2, tmp_path / "log")


@pytest.fixture
def decoded(tmp_path):
    """Two jobs of two utterances; in 2best the second has one hypothesis."""
    (tmp_path / "keys").write_text("d 1\nb 2\na 3\nc 4\n")
    for job, keys in enumerate(("db", "ac")):
        for n, some in ((1, keys), (2, keys if job == 0 else "")):
            if not some:
                continue
            directory = tmp_path / f"output.{job + 1}/{n}best_recog"
            directory.mkdir(parents=True)
            (directory / "text").write_text("".join(f"{k} text of {k}\n" for k in some))
            (directory / "score").write_text("".join(f"{k} -{n}.5\n" for k in some))
    (tmp_path / "output.1/1best_recog/text").write_text("d\nb text of b\n")  # recognised nothing
    return tmp_path


def test_merge(decoded):
    counts = merge_outputs(
        [decoded / "output.1", decoded / "output.2"], decoded / "out", decoded / "keys"
    )
    assert counts == {
        "1best_recog/score": 4,
        "1best_recog/text": 4,
        "2best_recog/score": 2,
        "2best_recog/text": 2,
    }
    assert (decoded / "out/1best_recog/text").read_text() == (
        "a text of a\nb text of b\nc text of c\nd\n"
    )
    assert (decoded / "out/2best_recog/score").read_text() == "b -2.5\nd -2.5\n"


def test_wrong_merge(decoded):
    jobs = [decoded / "output.1", decoded / "output.2"]
    with pytest.raises(UserError, match=r"differ in 2 key\(s\): a, c. Did a job fail"):
        merge_outputs(jobs[:1], decoded / "out", decoded / "keys")
    with pytest.raises(UserError, match="was decoded by two jobs"):
        merge_outputs([*jobs, jobs[1]], decoded / "out", decoded / "keys")
    (decoded / "keys").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"differ in 1 key\(s\): d"):
        merge_outputs(jobs, decoded / "out", decoded / "keys")
    with pytest.raises(UserError, match="no decoding results"):
        merge_outputs([decoded / "output.9"], decoded / "out", decoded / "keys")
    assert not (decoded / "out").exists()


def test_select(data_dir):
    data = read_data_dir(data_dir.path, Problems(""))
    assert select(data, ["u3", "u1"], "list").utterances == ["u1", "u3"]
    with pytest.raises(UserError, match="list names 1 utterance.*: x"):
        select(data, ["u3", "x"], "list")
    with pytest.raises(UserError, match="list selects no utterance"):
        select(data, [], "list")
