"""Accuracy and confusions of predicted languages."""

import json

import pytest

from espnet_llm_plugin.bin.score_language_id import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.language_id import confusion_table, score_language_id

REFERENCES = {"a": "en", "b": "en", "c": "en", "d": "de", "e": "", "f": "de"}
HYPOTHESES = {"a": "en", "b": "en", "c": "fr", "d": "en", "e": "de", "f": ""}


def test_scores():
    scores = score_language_id(REFERENCES, HYPOTHESES)
    assert (scores.utterances, scores.without) == (5, 1)
    assert scores.accuracy == pytest.approx(40.0)
    assert scores.macro == pytest.approx((200 / 3 + 0) / 2)
    assert scores.as_dict()["confusions"] == {
        "de": {"en": 1, "none": 1},
        "en": {"en": 2, "fr": 1},
    }
    header, cells = confusion_table(scores)
    assert header == ["language", "utterances", "correct in %", "de", "en", "fr", "none"]
    assert cells[0] == ["de", "2", "0.0", "", "1", "", "1"]
    assert cells[1] == ["en", "3", "66.7", "", "2", "1", ""]
    assert cells[2][:3] == ["all", "5", "40.0"] and cells[3][2] == "33.3"


def test_command_line(tmp_path, capsys):
    for name, table in (("utt2lang", REFERENCES), ("hyp", HYPOTHESES)):
        (tmp_path / name).write_text("".join(f"{k} {v}\n" for k, v in table.items()))
    options = ["--utt2lang", str(tmp_path / "utt2lang"), "--hyp", str(tmp_path / "hyp")]
    main([*options, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "macro average" in printed and "1 utterances without a language" in printed
    assert json.loads((tmp_path / "out/language_id.json").read_text())["accuracy"] == 40.0
    assert (tmp_path / "out/language_id.md").read_text().startswith("|language|utterances|")
    with pytest.raises(UserError, match="--hyp .*there is no such file"):
        main([*options[:2], "--hyp", str(tmp_path / "nowhere")])


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="no predicted language of d"):
        score_language_id(REFERENCES, {key: "en" for key in "abcef"})
    with pytest.raises(UserError, match="no language is known of any of the 1"):
        score_language_id({"a": ""}, {"a": "en"})
