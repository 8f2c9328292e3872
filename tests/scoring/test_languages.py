"""Error rates by language and their macro average."""

import json

import numpy as np
import pytest

from espnet_llm_plugin.bin import score, score_languages
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import languages as module
from espnet_llm_plugin.scoring.bootstrap import error_rate_interval

# German: 5 words, 2 errors (one deleted, one inserted). Polish: 2 words, 1 error. CER: below.
REF = "u1 a b c\nu2 d e\nu3 x y\n"
HYP = "u1 a b\nu2 d e e\nu3 x z\n"


@pytest.fixture
def scored(tmp_path):
    """A scored directory ``out`` with utt2lang beside it."""
    (tmp_path / "text").write_text(REF)
    (tmp_path / "hyp").write_text(HYP)
    (tmp_path / "utt2lang").write_text("u1 de\nu2 de\nu3 pl\nother fr\n")
    run_score(tmp_path, "out")
    return tmp_path


def run_score(directory, out, hyp="hyp"):
    arguments = ["--ref", f"{directory}/text", "--hyp", f"{directory}/{hyp}", "--resamples", "10"]
    score.main([*arguments, "--output_dir", f"{directory}/{out}"])


def by_language(directory, out="out", **kwargs):
    return module.score_languages(
        directory / out, directory / "utt2lang", resamples=200, seed=3, **kwargs
    )


def test_rates_by_language(scored):
    scores = by_language(scored)
    german, polish = scores.languages["de"], scores.languages["pl"]
    assert (german.utterances, german.words, german.errors, german.rate) == (2, 5, 2, 40.0)
    assert (polish.utterances, polish.words, polish.errors, polish.rate) == (1, 2, 1, 50.0)
    assert scores.macro == 45.0
    assert scores.micro == pytest.approx(100 * 3 / 7)
    expected = error_rate_interval(np.array([1, 1]), np.array([3, 2]), resamples=200, seed=3)
    assert (german.low, german.high) == expected
    # characters with blanks: "a b c" (5) loses two, "d e" (3) gains two, one of "x y" (3) is wrong
    characters = by_language(scored, unit="cer")
    assert characters.languages["de"].rate == pytest.approx(100 * 4 / 8)
    assert characters.macro == pytest.approx((50 + 100 / 3) / 2)


def test_sums_are_those_of_the_whole_test_set(scored):
    scores = by_language(scored)
    whole = json.loads((scored / "out/scores.json").read_text())["wer"]
    assert sum(s.errors for s in scores.languages.values()) == whole["errors"]
    assert scores.micro == pytest.approx(whole["rate"])


def test_command_line(scored, capsys):
    (scored / "better").write_text(REF)
    run_score(scored, "second", "better")
    capsys.readouterr()
    directories = [str(scored / "out"), str(scored / "second")]
    options = ["--utt2lang", str(scored / "utt2lang"), "--resamples", "10"]
    score_languages.main([*directories, *options, "--output", str(scored / "table.md")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == ["WER", "in", "%", "de", "pl", "macro", "average", "all"]
    assert printed[2] == [directories[0], "40.00", "50.00", "45.00", "42.86"]
    assert printed[3] == [directories[1], "0.00", "0.00", "0.00", "0.00"]
    table = (scored / "table.md").read_text()
    assert f"|{directories[0]}|40.00|50.00|45.00|42.86|\n" in table
    assert "|CER in %|de|pl|macro average|all|\n" in table
    stored = json.loads((scored / "out" / score_languages.NAME).read_text())
    assert stored["wer"]["macro"] == 45.0 and stored["cer"]["languages"]["de"]["errors"] == 4


def test_errors(scored):
    with pytest.raises(UserError, match="nowhere.*score .*nowhere first"):
        by_language(scored, "nowhere")
    (scored / "utt2lang").write_text("u1 de\n")
    with pytest.raises(UserError, match="utt2lang has no language for u2, u3 of "):
        by_language(scored)


def test_only_the_language_without_words_is_left_out(scored, capsys):
    before = by_language(scored).languages["de"]
    (scored / "text").write_text("u1 a b c\nu2 d e\nu3\n")
    arguments = ["--ref", f"{scored}/text", "--hyp", f"{scored}/hyp", "--resamples", "10"]
    score.main([*arguments, "--output_dir", f"{scored}/empty", "--allow_empty_ref"])
    scores = by_language(scored, "empty")
    assert scores.languages == {"de": before} and scores.macro == 40.0
    # its two insertions are errors of the whole set
    whole = json.loads((scored / "empty/scores.json").read_text())["wer"]
    assert scores.without_words == {"pl": 2} and scores.micro == pytest.approx(whole["rate"]) == 80
    capsys.readouterr()
    options = ["--utt2lang", str(scored / "utt2lang"), "--resamples", "10"]
    score_languages.main([str(scored / "empty"), *options])
    printed = capsys.readouterr()
    assert printed.out.split()[:4] == ["WER", "in", "%", "de"]
    assert "warning: language pl is left out: its references have no word\n" in printed.err


def test_systems_of_different_languages_are_not_compared(scored):
    (scored / "other").write_text("u1 de\nu2 nl\nu3 pl\n")
    first = by_language(scored)
    second = module.score_languages(scored / "out", scored / "other", resamples=10)
    with pytest.raises(UserError, match="has the languages de, pl, but .* has de, nl, pl"):
        module.comparison([first, second])
