"""The command line of scoring."""

import json
import subprocess
import sys

import numpy as np
import pytest

from espnet_llm_plugin.bin.score import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.bootstrap import error_rate_interval, paired_difference

REF = "utt1 the cat sat\nutt2 on the mat\nutt3 hello world\n"
HYP = "utt3 hello word\nutt1 the cat\nutt2 on on the mat\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text").write_text(REF)
    (tmp_path / "hyp").write_text(HYP)
    (tmp_path / "utt2spk").write_text("utt1 anna\nutt2 anna\nutt3 bert\n")
    return tmp_path


def run(files, *options, hyp="hyp", out="out"):
    main(
        ["--ref", str(files / "text"), "--hyp", str(files / hyp), "--resamples", "100"]
        + ["--output_dir", str(files / out), *map(str, options)]
    )
    return json.loads((files / out / "scores.json").read_text())


def test_files_and_numbers(files, capsys):
    scores = run(files)
    out = files / "out"
    # In the order of the references, speakers from the utt2spk beside them.
    assert (out / "score_wer" / "ref.trn").read_text() == (
        "the cat sat\t(anna-utt1)\non the mat\t(anna-utt2)\nhello world\t(bert-utt3)\n"
    )
    assert (out / "score_wer" / "hyp.trn").read_text() == (
        "the cat\t(anna-utt1)\non on the mat\t(anna-utt2)\nhello word\t(bert-utt3)\n"
    )
    assert "h e l l o <space> w o r d\t(bert-utt3)" in (out / "score_cer" / "hyp.trn").read_text()
    wer = scores["wer"]
    kinds = [wer[name] for name in ("correct", "substitutions", "deletions", "insertions")]
    assert kinds == [6, 1, 1, 1]
    assert wer["rate"] == pytest.approx(100 * 3 / 8) and wer["jiwer"]["errors"] == 3
    expected = error_rate_interval(np.array([1, 1, 1]), np.array([3, 3, 2]), resamples=100)
    assert wer["interval"] == pytest.approx(list(expected))
    assert wer["speakers"]["bert"]["rate"] == 50
    assert scores["cer"]["deletions"] == 5 and scores["cer"]["insertions"] == 3
    assert "ter" not in scores and scores["missing"] == []
    captured = capsys.readouterr()
    assert "WER" in captured.out and "37.5" in captured.out and captured.err == ""
    assert "on -> " not in (out / "diagnostics.txt").read_text()


def test_token_error_rate(files, shared_data):
    model = shared_data / "llm" / "llama2_tokenizer" / "tokenizer.model"
    scores = run(files, "--bpemodel", model)
    line = (files / "out" / "score_ter" / "ref.trn").read_text().split("\n")[2]
    assert line.startswith("▁hello ▁world") and scores["ter"]["substitutions"] >= 1


def test_given_speakers_and_no_speakers(files):
    (files / "other").write_text("utt1 x\nutt2 y\nutt3 z\n")
    assert set(run(files, "--utt2spk", files / "other")["wer"]["speakers"]) == {"x", "y", "z"}
    (files / "utt2spk").unlink()
    run(files, out="alone")
    assert "(utt1-utt1)" in (files / "alone" / "score_wer" / "ref.trn").read_text()


def test_missing_hypotheses_count_as_empty(files, capsys):
    (files / "hyp").write_text("utt1 the cat sat\n")
    scores = run(files)
    assert scores["missing"] == ["utt2", "utt3"] and scores["wer"]["deletions"] == 5
    assert "2 of 3 utterances have no hypothesis" in capsys.readouterr().err
    assert "\t(bert-utt3)" in (files / "out" / "score_wer" / "hyp.trn").read_text()


def test_markup_of_sclite_is_named(files, capsys):
    (files / "hyp").write_text("utt1 the {cat} sat\nutt2 @ the mat*\nutt3 a;b *\n")
    run(files)
    assert "sclite would read @, a;b, mat*, {cat} as markup" in capsys.readouterr().err


def test_empty_reference(files):
    (files / "text").write_text(REF.replace("hello world", ""))
    with pytest.raises(UserError, match="text: empty reference for utt3"):
        run(files)
    assert not (files / "out").exists()
    scores = run(files, "--allow_empty_ref")
    assert scores["wer"]["words"] == 6 and scores["wer"]["insertions"] == 3
    assert scores["wer"]["speakers"]["bert"]["rate"] is None


def test_non_linguistic_symbols_and_case(files):
    (files / "hyp").write_text("utt1 The cat <noise> sat\nutt2 on the mat\nutt3 hello world\n")
    (files / "nlsyms.txt").write_text("<noise>\n")
    assert run(files)["wer"]["insertions"] == 1
    symbols = ["--non_linguistic_symbols", files / "nlsyms.txt"]
    assert run(files, *symbols)["wer"]["errors"] == 0
    assert run(files, *symbols, "--case_sensitive")["wer"]["substitutions"] == 1


def test_words_of_interest(files):
    (files / "words").write_text("word world\n")
    group, total = run(files, "--words", files / "words")["diagnostics"]["words"]
    assert group["recall"] == 0 and group["within"] == 1 and total["reference"] == 1
    assert "word world" in (files / "out" / "diagnostics.txt").read_text()


def test_unknown_tokens(files, capsys):
    (files / "tokens.txt").write_text("".join(f"{c}\n" for c in "abcdefghijklmnopqrtuvwxyz"))
    options = ["--token_list", files / "tokens.txt", "--token_type", "char"]
    characters = "the cat sat" + "on the mat" + "hello world"
    share = sum(c in "s " for c in characters) / len(characters)
    assert run(files, *options)["unknown_token_share"] == pytest.approx(share)
    assert f"{100 * share:.2f} % of the reference's tokens" in capsys.readouterr().err
    assert run(files)["unknown_token_share"] is None


def test_compare(files, capsys):
    run(files, out="first")
    (files / "better").write_text(REF)
    scores = run(files, "--compare", files / "first", hyp="better", out="second")
    pair = scores["comparisons"][str(files / "first")]
    expected = paired_difference(
        np.array([0, 0, 0]), np.array([1, 1, 1]), np.array([3, 3, 2]), resamples=100
    )
    assert pair["low"] == pytest.approx(expected.low) and pair["high"] < 0
    assert "WER of this system - WER of" in capsys.readouterr().out


def test_compare_other_test_sets(files):
    run(files, out="first")
    (files / "text").write_text(REF.replace("hello world", "hello big world"))
    with pytest.raises(UserError, match=r"different references: utt3"):
        run(files, "--compare", files / "first", out="second")
    (files / "text").write_text(REF.replace("utt3", "utt4"))
    (files / "hyp").write_text(HYP.replace("utt3", "utt4"))
    (files / "utt2spk").write_text("utt1 a\nutt2 a\nutt4 a\n")
    with pytest.raises(UserError, match=r"different utterances: utt3, utt4"):
        run(files, "--compare", files / "first", out="second")
    with pytest.raises(UserError, match=r"nowhere.*score .*nowhere first"):
        run(files, "--compare", files / "nowhere", out="second")
    assert not (files / "second").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hyp", HYP + "utt9 extra\n", "hyp: .*text has no reference for utt9"),
        ("hyp", HYP + "utt1 again\n", r"(?s)hyp.*duplicate.*utt1"),
        ("text", REF + "utt1 again\n", r"(?s)text.*duplicate.*utt1"),
        ("text", "", "text: the file is empty"),
        ("utt2spk", "utt1 anna\n", "utt2spk: no speaker for utt2, utt3"),
        ("hyp", b"utt1 \xff\xfe\n", "(?s)hyp.*UTF-8"),
    ],
)
def test_bad_files(files, name, content, message):
    (files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        run(files)
    assert not (files / "out").exists()


def test_nothing_remains_of_an_interrupted_run(files, monkeypatch):
    """scores.json comes last: a stage that was killed is seen as not done."""
    from espnet_llm_plugin.scoring import evaluate

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluate, "result_text", full)
    with pytest.raises(OSError, match="no space"):
        run(files)
    assert not (files / "out" / "scores.json").exists()


def test_command_line_needs_no_torch(files, root):
    """A message and exit code 2 instead of a traceback; torch would take seconds to import."""
    code = (
        "import sys; from espnet_llm_plugin.bin import score, results_table; "
        "assert 'torch' not in sys.modules; score.cli()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--ref", "nowhere", "--hyp", "x", "--output_dir", files / "y"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
