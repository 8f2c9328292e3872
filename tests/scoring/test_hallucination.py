"""Loops, insertions of the worst utterances and lengths, against plain definitions."""

import itertools
import json
import random

import pytest

from espnet_llm_plugin.bin import score as score_bin
from espnet_llm_plugin.scoring import hallucination as module
from espnet_llm_plugin.scoring.hallucination import (
    Hallucination,
    Loop,
    hallucination,
    has_repeated_ngram,
    longest_loop,
    repeated_in_loops,
)
from espnet_llm_plugin.scoring.wer import score


def scored(pairs):
    refs = {f"u{n}": ref.split() for n, (ref, _) in enumerate(pairs)}
    hyps = {f"u{n}": hyp.split() for n, (_, hyp) in enumerate(pairs)}
    return score(refs, hyps, dict.fromkeys(refs, "spk"))


def repeated_slowly(words):
    """Every stretch that begins with three whole copies of a phrase and goes on with it."""
    repeated = set()
    for start, period in itertools.product(range(len(words)), range(1, module.MAX_PERIOD + 1)):
        phrase = words[start : start + period]
        if words[start : start + 3 * period] != phrase * 3:
            continue
        end = start + 3 * period
        while end < len(words) and words[end] == phrase[(end - start) % period]:
            end += 1
        repeated |= set(range(start + period, end))
    return len(repeated)


@pytest.mark.parametrize("seed", range(5))
def test_loops_are_those_of_the_definition(seed):
    chance = random.Random(seed)
    found = 0
    for _ in range(100):
        phrase = chance.choices("abc", k=chance.randint(1, 9))
        copies = phrase * chance.randint(1, 4)
        words = (
            chance.choices("abc", k=3) + copies[: chance.randint(1, 40)] + chance.choices("ab", k=5)
        )
        assert repeated_in_loops(words) == repeated_slowly(words)
        found += repeated_slowly(words) > 0
    assert 20 < found < 100


@pytest.mark.parametrize(
    "text, repeated",
    [
        ("", 0),
        ("very very good", 0),
        ("very very very good", 2),
        ("on and on and on", 0),  # two and a half
        ("and on and on and on", 4),
        ("a b c d e f g h " * 3, 16),
        ("a b c d e f g h i " * 3, 0),  # nine words
    ],
)
def test_what_a_loop_is(text, repeated):
    assert repeated_in_loops(text.split()) == repeated


@pytest.mark.parametrize(
    "text, phrase, copies",
    [
        ("oh oh oh so it goes so it goes so it goes so it", "so it goes", 11 / 3),
        ("no no no no no no", "no", 6),  # rather than "no no", 3
    ],
)
def test_longest_loop(text, phrase, copies):
    assert longest_loop(text.split()) == Loop(phrase, pytest.approx(copies))


@pytest.mark.parametrize(
    "text, repeats",
    [("a b c x a b c", True), ("a a a a", True), ("a b c x a b d", False), ("", False)],
)
def test_repeated_ngrams(text, repeats):
    assert has_repeated_ngram(text.split()) == repeats


PAIRS = [
    ("one two three four", "one two two two two three four"),  # a new loop
    ("bye bye bye now", "bye bye bye now"),  # a loop in both
    ("la la la", "la la la la la"),  # longer than in the reference
    ("a b c d e f g h i j", "a b c"),  # too short
    ("yes", "yes no"),  # twice as long, but one word only
    ("", "something that nobody said"),
]


def test_all_numbers_of_a_set():
    found = hallucination(scored(PAIRS))
    assert found.utterances == 6 and found.worst == 1
    assert found.loops == pytest.approx(3 / 6)
    assert found.reference_loops == pytest.approx(2 / 6)
    assert found.new_loops == pytest.approx(2 / 6)
    assert found.looped_words == pytest.approx((3 + 2 + 4) / (7 + 4 + 5 + 3 + 2 + 4))
    assert found.repeated_ngrams == pytest.approx(2 / 6)  # two and la
    assert found.reference_repeated_ngrams == 0
    # insertions: 3, 0, 2, 0, 1, 4; errors also 7 deletions
    assert found.worst_insertions == pytest.approx(4 / 10)
    assert found.worst_rate == 4.0  # of an utterance without words
    assert found.worst_errors == pytest.approx(7 / 17)
    assert found.ratio_median == pytest.approx(5 / 3)
    assert found.too_long == pytest.approx(2 / 6)  # the first and the last
    assert found.too_short == pytest.approx(1 / 6)
    assert found.examples == [("u2", "la", 5.0), ("u0", "two", 4.0)]
    assert found.most_inserted == [("u5", 4)]


def test_worst_one_per_cent_of_many():
    pairs = [("a b", "a b x")] * 197 + [("a b", "a b " + "x " * 20)] * 3
    found = hallucination(scored(pairs))
    assert found.worst == 2 and found.worst_insertions == pytest.approx(40 / (197 + 60))
    assert found.worst_rate == 10.0


def test_nothing_wrong():
    found = hallucination(scored([("a b", "a b")]))
    assert found.worst_insertions is None and found.worst_errors is None
    assert found.examples == found.most_inserted == []
    assert found.loops == found.too_long == found.too_short == 0


def test_scoring_writes_the_signs(tmp_path):
    for name, column in (("ref", 0), ("hyp", 1)):
        lines = (f"u{n} {pair[column]}\n" for n, pair in enumerate(PAIRS))
        (tmp_path / name).write_text("".join(lines))
    options = ["--allow_empty_ref", "--resamples", "10", "--output_dir", str(tmp_path / "out")]
    score_bin.main(["--ref", str(tmp_path / "ref"), "--hyp", str(tmp_path / "hyp"), *options])
    table = json.loads((tmp_path / "out" / "scores.json").read_text())
    found = Hallucination.from_dict(table["diagnostics"]["hallucination"])
    assert found == hallucination(scored(PAIRS))
    text = (tmp_path / "out" / "diagnostics.txt").read_text()
    assert "u2 says 5 times: la\n" in text and "references with a loop" in text
