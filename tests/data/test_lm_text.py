"""LM training text: joined, without empty lines, compared with the evaluation sets."""

import pytest

from espnet_llm_plugin.data.lm_text import LMTextSummary, prepare_lm_text
from espnet_llm_plugin.errors import UserError


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a").write_text("a1 one  two\na2\na3 Three Four\n\n")
    (tmp_path / "b.txt").write_text("five six\n\nthree four\n")
    (tmp_path / "dev").write_text("d1 three   four\nd2 seven\n")
    return tmp_path


def run(files, **kwargs):
    counts = prepare_lm_text([files / "a"], files / "out", plain_texts=[files / "b.txt"], **kwargs)
    return counts, (files / "out").read_text().splitlines()


def test_join(files):
    counts, lines = run(files)
    assert counts == LMTextSummary(written=4, empty=3, contaminated=0)
    assert lines == [
        "a1 one two", "a3 Three Four", "b-000000001 five six", "b-000000003 three four",
    ]  # fmt: skip


def test_contamination(files):
    counts, lines = run(files, evaluation_texts=[files / "dev"])
    assert counts == LMTextSummary(4, 3, 2) and len(lines) == 4
    counts, lines = run(files, evaluation_texts=[files / "dev"], contamination="drop")
    assert counts == LMTextSummary(2, 3, 2)
    assert lines == ["a1 one two", "b-000000001 five six"]
    with pytest.raises(UserError, match=r"2 line\(s\) of the LM text .*a:3, .*b.txt:3"):
        run(files, evaluation_texts=[files / "dev"], contamination="error")
    assert (files / "out").read_text().splitlines() == lines  # as it was
    with pytest.raises(UserError, match="not one of keep, drop, error"):
        run(files, contamination="x")


def test_ids_must_be_unique(files):
    (files / "c").write_text("a3 x\na2 y\n")  # a2 is an empty line of the first file
    with pytest.raises(UserError, match=r"duplicate id \(1\): a3 \(.*a:3 and .*c:1\)"):
        prepare_lm_text([files / "a", files / "c"], files / "out")
    (files / "other").mkdir()
    (files / "other/b.txt").write_text("x\n")
    with pytest.raises(UserError, match="b-000000001"):
        prepare_lm_text([], files / "out", plain_texts=[files / "b.txt", files / "other/b.txt"])
    assert not (files / "out").exists()


def test_wrong_input(files):
    (files / "bad").write_bytes(b"x ok\ny \xe9\n")
    with pytest.raises(UserError, match="bad:2"):
        prepare_lm_text([files / "bad"], files / "out")
    (files / "empty").write_text("\n")
    with pytest.raises(UserError, match="no sentences in"):
        prepare_lm_text([files / "empty"], files / "out")
    with pytest.raises(UserError, match="cannot read"):
        prepare_lm_text([files / "none"], files / "out")
    assert not (files / "out").exists()


def test_real_text(shared_data, tmp_path):
    text = shared_data / "text/librispeech"
    lines = {
        f: len((text / f"{f}.txt").read_text().splitlines()) for f in ("dev-clean", "test-clean")
    }
    counts = prepare_lm_text(
        [text / "dev-clean.txt", text / "test-clean.txt"],
        tmp_path / "out",
        evaluation_texts=[text / "test-clean.txt"],
        contamination="drop",
    )
    assert counts.contaminated >= lines["test-clean"]
    assert counts.written == sum(lines.values()) - counts.contaminated - counts.empty > 2000


def test_lower_case(files):
    _, lines = run(files, lowercase=True)
    assert lines[1] == "a3 three four"
