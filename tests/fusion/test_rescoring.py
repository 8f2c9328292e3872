"""Grids of weights on stored scores, against sums written out."""

import itertools
import random

import jiwer
import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.rescoring import Candidate, RescoringScales, grid_points, ranked
from espnet_llm_plugin.fusion.tuning import best_point, edges, heat_map, table

REFERENCES = {"a": "one two three", "b": "four", "c": ""}


@pytest.fixture
def lists():
    rng = random.Random(0)
    words = ["one", "two", "three", "four"]
    return {
        utt: [
            Candidate(
                " ".join(rng.choices(words, k=rng.randrange(5))),
                *(-10 * rng.random() for _ in range(4)),
                length=rng.randrange(5),
            )
            for _ in range(6)
        ]
        for utt in REFERENCES
    }


GRID = [
    RescoringScales(*weights)
    for weights in itertools.product((0, 0.5, 1), (0, 0.3), (0, 0.2), (-1, 0, 2))
]


def test_every_point_is_that_of_a_sum_written_out(lists):
    points = grid_points(lists, REFERENCES, GRID)
    for scales, point in zip(GRID, points):
        errors = 0
        for utt, reference in REFERENCES.items():
            totals = [
                c.score
                + scales.lm_weight * c.lm
                - scales.prior_weight * c.prior
                - scales.ilm_weight * c.ilm
                + scales.length_bonus * c.length
                for c in lists[utt]
            ]
            best = lists[utt][totals.index(max(totals))]
            assert lists[utt][ranked(lists[utt], scales)[0]] is best
            assert best.total(scales) == pytest.approx(max(totals))
            if reference:
                found = jiwer.process_words(reference, best.text)
                errors += found.insertions + found.deletions + found.substitutions
            else:
                errors += len(best.text.split())
        assert point.wer == pytest.approx(100 * errors / 4)
        assert point.insertions + point.deletions + point.substitutions == errors


def test_weights_of_zero_keep_the_order(lists):
    for candidates in lists.values():
        candidates.sort(key=lambda candidate: -candidate.score)
        assert ranked(candidates, RescoringScales()) == list(range(6))
    same = [Candidate("x", -1.0), Candidate("y", -1.0)]
    assert ranked(same, RescoringScales(1.0)) == [0, 1]


def test_table_and_picture(lists):
    points = grid_points(lists, REFERENCES, GRID)
    best = best_point(points)
    assert best.wer == min(point.wer for point in points)
    assert table(points).split("\n")[0].split()[:4] == list(RescoringScales.AXES)
    assert heat_map(points, best) is not None
    assert f"{best.scales.ilm_weight:g}" == table(points).split("\n")[1].split()[2]
    at_zero = best_point(points, [RescoringScales()])
    assert edges(at_zero, points) == []  # a bonus of 0 is inside of -1..2, other weights end there
    only = [point for point in points if point.scales.length_bonus >= 0]
    assert edges(at_zero, only) == ["length_bonus"]


def test_sets_without_anything_to_learn_are_refused(lists):
    alike = {utt: [Candidate("x y", -1.0), Candidate("y x", -2.0)] for utt in REFERENCES}
    with pytest.raises(UserError, match="all hypotheses have equally many word errors"):
        grid_points(alike, REFERENCES, GRID)
    with pytest.raises(UserError, match="1 of 3 utterances.*no n-best list, e.g. b"):
        grid_points({**lists, "b": []}, REFERENCES, GRID)
    with pytest.raises(UserError, match="no words"):
        grid_points(lists, {"a": ""}, GRID)
