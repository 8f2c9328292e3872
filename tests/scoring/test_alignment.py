"""Alignment by sclite's rules, against slow references."""

import random

import pytest
from rapidfuzz.distance import Levenshtein

from espnet_llm_plugin.scoring.alignment import Counts, align, count, pairs


def slow_align(ref, hyp):
    """The same rules cell by cell, over the whole table (no common ending cut off)."""
    cost = {(0, 0): 0}
    move = {}
    for r in range(len(ref) + 1):
        for h in range(len(hyp) + 1):
            choices = []  # in order of preference
            if r and h:
                kind = "C" if ref[r - 1] == hyp[h - 1] else "S"
                choices.append((cost[r - 1, h - 1] + 4 * (kind == "S"), kind, (r - 1, h - 1)))
            if h:
                choices.append((cost[r, h - 1] + 3, "I", (r, h - 1)))
            if r:
                choices.append((cost[r - 1, h] + 3, "D", (r - 1, h)))
            if choices:
                best = min(choices, key=lambda choice: choice[0])  # the first among equals
                cost[r, h] = best[0]
                move[r, h] = best[1:]
    steps, cell = "", (len(ref), len(hyp))
    while cell != (0, 0):
        kind, cell = move[cell]
        steps = kind + steps
    return steps


def random_pair(rng, vocabulary, longest):
    return tuple([rng.choice(vocabulary) for _ in range(rng.randint(0, longest))] for _ in range(2))


@pytest.mark.parametrize("vocabulary", ["a", "ab", "abc", "abcdefgh"])
def test_equals_slow_reference(vocabulary):
    rng = random.Random(1)
    for _ in range(300):
        ref, hyp = random_pair(rng, vocabulary, 14)
        assert align(ref, hyp) == slow_align(ref, hyp), (ref, hyp)


def test_cost_is_minimal_and_errors_never_below_levenshtein():
    rng = random.Random(2)
    more = 0
    for _ in range(500):
        ref, hyp = random_pair(rng, "abcd", 20)
        counts = count(align(ref, hyp))
        gaps = counts.deletions + counts.insertions
        weighted = Levenshtein.distance(ref, hyp, weights=(3, 3, 4))
        assert 4 * counts.substitutions + 3 * gaps == weighted
        assert counts.errors >= Levenshtein.distance(ref, hyp)
        more += counts.errors > Levenshtein.distance(ref, hyp)
    assert more > 0  # the two measures do differ


def test_steps_use_every_token_once():
    rng = random.Random(3)
    for _ in range(100):
        ref, hyp = random_pair(rng, "abc", 15)
        steps = align(ref, hyp)
        table = pairs(steps, ref, hyp)
        assert [left for _, left, _ in table if left] == ref
        assert [right for _, _, right in table if right] == hyp
        assert all((left == right) == (kind == "C") for kind, left, right in table)


@pytest.mark.parametrize(
    ("ref", "hyp", "steps"),
    [
        ("", "", ""),
        ("ab", "", "DD"),
        ("", "ab", "II"),
        ("abc", "abc", "CCC"),
        ("ab", "ba", "DCI"),  # two substitutions cost 8, two gaps 6; the insertion wins from behind
        ("abcd", "xbyd", "SCSC"),
    ],
)
def test_known_alignments(ref, hyp, steps):
    assert align(ref, hyp) == steps


def test_more_errors_than_levenshtein_where_that_costs_less():
    # Five substitutions would cost 20, three deletions and three insertions cost 18.
    assert Levenshtein.distance("dbbcc", "ccaab") == 5
    assert count(align("dbbcc", "ccaab")) == Counts(2, 0, 3, 3)


def test_counts():
    counts = Counts(5, 1, 2, 3)
    assert (counts.words, counts.errors) == (8, 6)
    assert count("CCSDIIC") == Counts(3, 1, 1, 2)
