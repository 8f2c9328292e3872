"""Other text in the spelling of the transcripts."""

import pytest

from espnet_llm_plugin.bin.normalize_indic import main
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table

pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("b यह १२ है।\na کیا؟\nc !\n", encoding="utf-8")
    return path


def test_languages_of_a_table(text, tmp_path, capsys):
    (tmp_path / "utt2lang").write_text("a ur\nb hi\nc hi\nd ta\n")
    common = ["--text", str(text), "--output", str(tmp_path / "out")]
    main([*common, "--utt2lang", str(tmp_path / "utt2lang"), "--digits", "keep"])
    assert table(tmp_path / "out") == {"a": "کیا", "b": "यह १२ है", "c": ""}
    captured = capsys.readouterr()
    assert "out: 3 lines" in captured.out and "1 line(s) have nothing but" in captured.err
    main([*common, "--lang", "hi"])
    assert table(tmp_path / "out")["b"] == "यह 12 है"


def test_mistakes(text, tmp_path):
    common = ["--text", str(text), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="give either --lang or --utt2lang"):
        main(common)
    (tmp_path / "utt2lang").write_text("a ur\nb xx\n")
    with pytest.raises(UserError, match="1 utterance.* have no language in utt2lang, e.g. c"):
        main([*common, "--utt2lang", str(tmp_path / "utt2lang")])
    (tmp_path / "utt2lang").write_text("a ur\nb xx\nc hi\n")
    with pytest.raises(UserError, match="unknown language codes: 'xx' .1 utterances."):
        main([*common, "--utt2lang", str(tmp_path / "utt2lang")])
    assert not (tmp_path / "out").exists()
