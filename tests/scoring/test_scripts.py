"""Letters of other scripts, words in another script, grapheme clusters."""

import json

import pytest

from espnet_llm_plugin.bin import score, score_languages
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.graphemes import count_graphemes, graphemes
from espnet_llm_plugin.scoring.languages import score_languages as by_language
from espnet_llm_plugin.scoring.scripts import score_scripts, script_tables

# Hindi: 4 + 3 words; "डॉक्टर" is written in Latin letters, a word is in Urdu's script, one inserted.
REF = "u1 मेरा डॉक्टर घर है\nu2 phone कहाँ है\nu3 دن ہے\n"
HYP = "u1 मेरा doctor گھر है\nu2 phone कहाँ है the\nu3 دن ہے\n"


@pytest.fixture
def scored(tmp_path):
    for name, content in (("text", REF), ("hyp", HYP)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "utt2lang").write_text("u1 hi\nu2 hi\nu3 ur\nother ta\n")
    files = ["--ref", f"{tmp_path}/text", "--hyp", f"{tmp_path}/hyp", "--resamples", "10"]
    score.main([*files, "--output_dir", f"{tmp_path}/out"])
    return tmp_path


def test_counts(scored):
    scores = score_scripts(scored / "out", scored / "utt2lang").languages
    hindi, urdu = scores["hi"], scores["ur"]
    # letters with their marks: मेरा 4, है 2, कहाँ 4, है 2; doctor 6, گھر 3, phone 5, the 3
    assert (hindi.letters, hindi.foreign) == (12 + 17, 17)
    # मेरा 4, डॉक्टर 6, घर 2, है 2, कहाँ 4, है 2; phone 5
    assert (hindi.ref_letters, hindi.ref_foreign) == (25, 5)
    assert (hindi.words, hindi.switched) == (7, 2)
    assert hindi.foreign_rate == pytest.approx(100 * 17 / 29)
    assert hindi.switch_rate == pytest.approx(200 / 7)
    assert (urdu.foreign, urdu.ref_foreign, urdu.switched) == (0, 0, 0) and urdu.letters == 4


def test_tables(scored):
    scores = score_scripts(scored / "out", scored / "utt2lang").languages
    letters, words = script_tables({"A": scores, "B": scores})
    assert letters[0] == ["letters of other scripts in %", "hi", "ur", "mean"]
    assert letters[1][0] == ["references", "20.00", "0.00", "10.00"]
    assert [row[0] for row in letters[1]] == ["references", "A", "B"]
    assert words[1] == [[name, "28.57", "0.00", "14.29"] for name in "AB"]


def test_words_without_letters_are_not_switched(tmp_path, scored):
    (scored / "hyp").write_text("u1 मेरा 12 घर है\nu2 phone कहाँ है\nu3 ہے\n", encoding="utf-8")
    files = ["--ref", f"{tmp_path}/text", "--hyp", f"{tmp_path}/hyp", "--resamples", "10"]
    score.main([*files, "--output_dir", f"{tmp_path}/out"])
    scores = score_scripts(scored / "out", scored / "utt2lang")
    assert scores.languages["hi"].switched == 0


def test_graphemes():
    assert graphemes(["नमस्ते"]) != list("नमस्ते") and "".join(graphemes(["नमस्ते"])) == "नमस्ते"
    assert graphemes(["கி", "கோ"]) == ["கி", "<space>", "கோ"]
    assert graphemes(["घर", "ab"]) == ["घ", "र", "<space>", "a", "b"]
    assert graphemes([]) == []


def test_grapheme_error_rate(tmp_path):
    """A wrong vowel sign is one error of 4 code points, and of 2 clusters."""
    (tmp_path / "text").write_text("u1 कीकी\nu2 AB\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("u1 कीकि\nu2 ab\n", encoding="utf-8")
    (tmp_path / "utt2lang").write_text("u1 hi\nu2 en\n")
    files = ["--ref", f"{tmp_path}/text", "--hyp", f"{tmp_path}/hyp", "--resamples", "10"]
    score.main([*files, "--output_dir", f"{tmp_path}/out"])
    counted = count_graphemes(tmp_path / "out")
    assert counted.words == {"u1": 2, "u2": 2} and counted.errors == {"u1": 1, "u2": 0}
    rates = {
        unit: by_language(tmp_path / "out", tmp_path / "utt2lang", unit=unit, resamples=10)
        for unit in ("cer", "ger")
    }
    assert rates["cer"].languages["hi"].rate == 25 and rates["ger"].languages["hi"].rate == 50
    assert rates["ger"].macro == 25


def test_command_line(scored, capsys):
    capsys.readouterr()
    options = ["--utt2lang", f"{scored}/utt2lang", "--resamples", "10", "--output"]
    options += [f"{scored}/table.md", "--units", "wer", "cer", "ger"]
    score_languages.main([f"{scored}/out", *options])
    printed = capsys.readouterr().out
    for head in ("WER in %", "CER in %", "GER in %", "letters of other scripts in %"):
        assert head in printed and f"|{head}|hi|ur|" in (scored / "table.md").read_text("utf-8")
    assert f"|{scored}/out|28.57|0.00|14.29|" in (scored / "table.md").read_text("utf-8")
    stored = json.loads((scored / "out" / score_languages.NAME).read_text("utf-8"))
    assert stored["scripts"]["hi"]["switched"] == 2
    assert stored["scripts"]["hi"]["foreign_rate"] == pytest.approx(100 * 17 / 29)


def test_only_the_language_of_an_unknown_script_is_left_out(scored, capsys):
    before = score_scripts(scored / "out", scored / "utt2lang").languages
    (scored / "utt2lang").write_text("u1 hi\nu2 zz\nu3 ur\n")
    scores = score_scripts(scored / "out", scored / "utt2lang")
    assert scores.unknown == ["zz"] and list(scores.languages) == ["hi", "ur"]
    assert scores.languages["ur"] == before["ur"] and scores.languages["hi"].words == 4
    command = [f"{scored}/out", "--utt2lang", f"{scored}/utt2lang", "--resamples", "9"]
    score_languages.main(command)
    printed = capsys.readouterr()
    heads = [line.split() for line in printed.out.splitlines() if "of other scripts" in line]
    assert heads == [["letters", "of", "other", "scripts", "in", "%", "hi", "ur", "mean"]]
    warning = "warning: language zz is left out of tables of scripts: its script is not in"
    assert printed.err.count(warning) == 1 and printed.err.count("warning") == 1
    assert list(json.loads((scored / "out/languages.json").read_text())["scripts"]) == ["hi", "ur"]

    (scored / "utt2lang").write_text("u1 zz\nu2 zz\nu3 yy\n")
    score_languages.main(command)
    printed = capsys.readouterr()
    assert "letters of other scripts" not in printed.out
    assert "language yy is left out" in printed.err and "language zz is left out" in printed.err
    assert "scripts" not in json.loads((scored / "out/languages.json").read_text())


def test_errors(scored):
    with pytest.raises(UserError, match="nowhere.*score .*nowhere first"):
        score_scripts(scored / "nowhere", scored / "utt2lang")
    (scored / "utt2lang").write_text("u1 hi\n")
    with pytest.raises(UserError, match="utt2lang has no language for u2, u3 of "):
        score_scripts(scored / "out", scored / "utt2lang")
    (scored / "out/score_wer/hyp.trn").write_text("a\t(u1-u1)\n")
    with pytest.raises(UserError, match="its files differ in utterances; score .* again"):
        count_graphemes(scored / "out")
