"""Kinds of errors."""

import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.diagnostics import (
    by_length,
    confusions,
    diagnostics_text,
    length_ratio,
    read_word_groups,
    total_group,
    word_groups,
)
from espnet_llm_plugin.scoring.wer import score

REFERENCES = {
    "a": "They're over there by the sea",
    "b": "I see the sea and their boat",
    "c": "no",
    "d": "w " * 40,
}
HYPOTHESES = {
    "a": "their over there by see",  # They're -> their, the deleted, sea -> see
    "b": "I see the sea and and there boat",  # and inserted, their -> there
    "c": "no",
    "d": "w " * 30,
}


@pytest.fixture
def scored():
    refs, hyps = (
        {key: text.split() for key, text in texts.items()} for texts in (REFERENCES, HYPOTHESES)
    )
    return score(refs, hyps, dict.fromkeys(refs, "spk"))


def test_by_length(scored):
    found = by_length(scored)
    assert list(found) == ["1-5", "6-10", "31-"]
    assert found["6-10"].counts == (9, 3, 1, 1)
    assert found["31-"].counts == (30, 0, 10, 0)
    assert sum(summary.counts.errors for summary in found.values()) == scored.errors.sum()


def test_limits_of_lengths():
    lengths = (0, 1, 5, 6, 10, 30, 31)
    texts = {str(n): ["w"] * n for n in lengths}
    found = by_length(score(texts, texts, dict.fromkeys(texts, "spk")))
    sentences = {name: summary.sentences for name, summary in found.items()}
    assert sentences == {"1-5": 3, "6-10": 2, "21-30": 1, "31-": 1}


def test_length_ratio(scored):
    assert length_ratio(scored) == pytest.approx((5 + 8 + 1 + 30) / (6 + 7 + 1 + 40))


def test_confusions(scored):
    tables = confusions(scored)
    assert tables["S"] == {("they're", "their"): 1, ("sea", "see"): 1, ("their", "there"): 1}
    assert tables["D"] == {"the": 1, "w": 10}
    assert tables["I"] == {"and": 1}


def test_word_groups(scored):
    there, sea = word_groups(scored, [("There", "their", "they're"), ("sea", "see")])
    assert (there.reference, there.hypothesis, there.correct, there.within) == (3, 3, 1, 2)
    assert there.recall == there.precision == pytest.approx(100 / 3)
    assert (sea.reference, sea.hypothesis, sea.correct, sea.within) == (3, 3, 2, 1)
    total = total_group([there, sea])
    assert (total.reference, total.hypothesis, total.correct, total.within) == (6, 6, 3, 3)
    (absent,) = word_groups(scored, [("elephant",)])
    assert absent.recall is None and absent.precision is None


def test_words_keep_their_case_when_the_case_counts():
    refs = {"a": ["There"]}
    sensitive = score(refs, refs, {"a": "spk"}, case_sensitive=True)
    assert word_groups(sensitive, [("there",)])[0].reference == 0
    assert word_groups(sensitive, [("There",)])[0].correct == 1


def test_text(scored):
    text = diagnostics_text(scored, word_groups(scored, [("sea", "see")]))
    for part in ("6-10", "sea -> see", "10  w", "1  and", "sea see", "66.7", "ratio: 0.815"):
        assert part in text.replace("reference words:", "ratio:")
    assert "Words of interest" not in diagnostics_text(scored)


def test_read_word_groups(tmp_path):
    path = tmp_path / "words"
    path.write_text("there their\n\nsea\n")
    assert read_word_groups(path) == [("there", "their"), ("sea",)]
    path.write_text("there their\nsea their\n")
    with pytest.raises(UserError, match="their is in more than one line"):
        read_word_groups(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="no word"):
        read_word_groups(path)
    with pytest.raises(UserError, match="no such file"):
        read_word_groups(tmp_path / "nowhere")
