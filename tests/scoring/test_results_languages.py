"""Tables by language in RESULTS.md."""

import pytest

from espnet_llm_plugin.bin import score_language_id
from espnet_llm_plugin.bin.results_table import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.evaluate import evaluate

REF = "u1 घर है\nu2 دن ہے\nu3 हाँ जी\n"
HYPS = {
    "a1": "u1 घर है\nu2 دن\nu3 हाँ जी\n",
    "a2": "u1 ghar है\nu2 دن ہے\nu3 हाँ जी\n",
    "b1": "u1 घर था\nu2 دن ہے\nu3 हाँ\n",
}
TITLE = "language identification, correct utterances in %"
CONFIG = """
seeds: [1, 2]
unfinished: true
utt2lang: {test: utt2lang}
systems:
  - {name: A, test: {test: "a{seed}"}}
  - {name: B, test: {test: "b{seed}"}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(REF, encoding="utf-8")
    (tmp_path / "utt2lang").write_text("u1 hi\nu2 ur\nu3 hi\n")
    (tmp_path / "results.yaml").write_text(CONFIG)
    for name, hyp in HYPS.items():
        (tmp_path / f"{name}.txt").write_text(hyp, encoding="utf-8")
        evaluate("text", f"{name}.txt", name, resamples=10)
    return tmp_path


def rows(page, kind):
    lines = page.split(f"test: {kind}\n\n")[1].split("\n\n")[0].strip().splitlines()
    return [line.strip("|").split("|") for line in lines if not line.startswith("|---")]


def test_means_over_seeds(place):
    main(["--config", "results.yaml", "--output", "RESULTS.md", "--resamples", "10"])
    page = (place / "RESULTS.md").read_text("utf-8")
    # A: no error and one of 4 Hindi words, one and none of 2 Urdu words; B has one run: 2 of 4
    assert rows(page, "WER in %") == [
        ["system", "hi", "ur", "macro average"],
        ["A", "12.50", "25.00", "18.75"],
        ["B", "50.00", "0.00", "25.00"],
    ]
    # घर 2, है 2, हाँ 3, जी 2 letters with their marks; the second run has the 4 of ghar for the first
    assert rows(page, "letters of other scripts in %")[1][:3] == ["A", f"{50 * 4 / 11:.2f}", "0.00"]
    assert rows(page, "words in another script per 100")[1] == ["A", "12.50", "0.00", "6.25"]
    assert rows(page, "CER in %")[2][2] == "0.00"


def test_languages_that_are_left_out_are_named(place):
    """The other languages stay as they were."""
    (place / "utt2lang").write_text("u1 hi\nu2 zz\nu3 hi\n")
    main(["--config", "results.yaml", "--output", "RESULTS.md", "--resamples", "10"])
    page = (place / "RESULTS.md").read_text("utf-8")
    assert rows(page, "WER in %")[0] == ["system", "hi", "zz", "macro average"]
    title = "test: letters of other scripts in %; language zz is left out of tables of scripts: "
    lines = page.split(title)[1].splitlines()
    assert lines[2] == "|system|hi|macro average|"
    assert lines[4] == f"|A|{50 * 4 / 11:.2f}|{50 * 4 / 11:.2f}|"
    (place / "utt2lang").write_text("u1 yy\nu2 zz\nu3 yy\n")
    main(["--config", "results.yaml", "--output", "RESULTS.md", "--resamples", "10"])
    assert "of other scripts in %" not in (place / "RESULTS.md").read_text("utf-8")


def test_language_identification(place):
    """A mean over the runs that have it, by language; without a table utt2lang too."""
    for name, predicted in (("a1", "hi ur hi"), ("a2", "hi hi ta"), ("b1", None)):
        if predicted:
            lines = [f"u{n} {code}\n" for n, code in enumerate(predicted.split(), start=1)]
            (place / "lang_predicted").write_text("".join(lines))
            files = ["--utt2lang", "utt2lang", "--hyp", "lang_predicted", "--output_dir", name]
            score_language_id.main(files)
    (place / "results.yaml").write_text(CONFIG.replace("utt2lang: {test: utt2lang}\n", ""))
    main(["--config", "results.yaml", "--output", "RESULTS.md", "--resamples", "10"])
    assert rows((place / "RESULTS.md").read_text("utf-8"), TITLE) == [
        ["system", "hi", "ur", "macro average", "all"],
        ["A", "75.00", "50.00", "62.50", f"{200 / 3:.2f}"],
    ]
    (place / "a1/language_id.json").write_text("{}")
    with pytest.raises(UserError, match="a1/language_id.json: not written by .*score_language_id"):
        main(["--config", "results.yaml"])


def test_without_utt2lang_there_are_none(place):
    (place / "results.yaml").write_text(CONFIG.replace("utt2lang: {test: utt2lang}\n", ""))
    main(["--config", "results.yaml", "--output", "RESULTS.md", "--resamples", "10"])
    assert "macro average" not in (place / "RESULTS.md").read_text("utf-8")


@pytest.mark.parametrize("value", ["{dev: utt2lang}", "utt2lang"])
def test_mistakes(place, value):
    (place / "results.yaml").write_text(
        CONFIG.replace("utt2lang: {test: utt2lang}", f"utt2lang: {value}")
    )
    with pytest.raises(UserError, match="expected a mapping from some of the data sets test to"):
        main(["--config", "results.yaml"])
