"""Weights of CTC + attention decoder + LM - internal LM, in ESPnet's names."""

import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.joint_sum import (
    JointCandidate,
    JointWeights,
    first_points,
    joint_grid,
)
from espnet_llm_plugin.fusion.rescoring import grid_points
from espnet_llm_plugin.fusion.tuning import Point

GRID = joint_grid([0.3, 0.1, 0.5], [0.2, 0.4], [0.0, 0.0], [-1.0, 0.0, 2.0])


def test_grid_is_every_combination_once():
    assert len(GRID) == 18 == len(set(GRID))


def test_the_first_points_are_the_middle_and_that_of_the_least_lm():
    middle, quiet = first_points(GRID)
    assert middle == JointWeights(0.3, 0.4, 0.0, 0.0) in GRID
    assert quiet == JointWeights(0.3, 0.2, 0.0, 0.0) in GRID
    assert first_points(GRID[:1]) == GRID[:1]


def test_factors_are_those_of_the_parts():
    weights = JointWeights(0.25, 0.5, 0.125, 2.0)
    parts = {"decoder": 1.0, "ctc": 10.0, "lm": 100.0, "ilm": 1000.0, "length_bonus": 10000.0}
    candidate = JointCandidate("a", **parts)
    found = [w * p for w, p in zip(weights.vector(), candidate.parts())]
    assert found == [0.75, 2.5, 50.0, -125.0, 20000.0]
    assert found == [weights.by_scorer()[name] * part for name, part in parts.items()]


def test_no_scorer_is_left_out_of_the_search():
    search = JointWeights(0.0).in_search()
    assert set(search) == set(JointWeights().by_scorer()) and all(search.values())
    assert search["decoder"] == 1.0 and 0 < max(map(abs, (search["ctc"], search["ilm"]))) < 1e-20
    assert abs(-1e10 * search["ilm"]) < 1e-15  # ESPnet's log 0


@pytest.mark.parametrize("weight", [1.0, -0.1])
def test_weights_of_ctc(weight):
    with pytest.raises(UserError, match="expected a number from 0 to below 1"):
        JointWeights(ctc_weight=weight)


def test_lists_are_weighed_anew():
    lists = {
        "utt": [
            JointCandidate("a b", decoder=-1.0, ctc=-1.0, lm=-9.0, length_bonus=3.0),
            JointCandidate("a", decoder=-1.5, ctc=-1.5, lm=-2.0, length_bonus=2.0),
            JointCandidate("c", decoder=-9.0, ctc=-9.0, lm=-9.0, length_bonus=2.0),
        ]
    }
    grid = [JointWeights(0.5), JointWeights(0.5, 0.4), JointWeights(0.5, 0.4, 0.0, 4.0)]
    points = grid_points(lists, {"utt": "a b"}, grid)
    assert [point.wer for point in points] == [0.0, 50.0, 0.0]
    assert [point.scales for point in points] == grid
    axes = JointWeights.AXES
    assert Point.from_dict(points[2].as_dict(axes)) == points[2]
