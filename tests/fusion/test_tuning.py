"""The grid: equal to separate searches, cached prefixes, word errors, the choice of a point."""

import jiwer
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.tuning import (
    Point,
    best_point,
    edges,
    heat_map,
    make_grid,
    score_grid,
    search_grid,
    table,
)
from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.contracts.search_contract import TableLM, TableScorer

GRID = make_grid([0.2, 0.5], [0.0, 0.4], [0.0, 0.3], [0.0, 1.0])


@pytest.fixture
def search():
    return TransducerSearch(TableScorer(5, 3), beam_size=4, external_lm=TableLM(5, 3))


@pytest.fixture
def encoder_out():
    return torch.randn(25, 6) * 1.5


def test_grid_is_every_combination_once():
    assert len(GRID) == 16 == len(set(GRID))
    assert make_grid([None], [0.0, 0.0], [0.1], [1.0]) == [Scales(None, 0.0, 0.1, 1.0)]


@pytest.mark.parametrize("side_by_side", [64, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_grid_equals_separate_searches(search, encoder_out, side_by_side, normalize):
    (together,) = search_grid(search, [encoder_out], GRID, normalize, side_by_side)
    assert len({h.labels for h in together}) > 3
    for scales, hyp in zip(GRID, together):
        (alone,) = search(encoder_out, scales, 1, normalize)
        assert (hyp.labels, hyp.frames) == (alone.labels, alone.frames)
        assert hyp.total == pytest.approx(alone.total, abs=1e-4)
        assert hyp.external_lm == pytest.approx(alone.external_lm, abs=1e-4)


def test_no_prefix_is_computed_twice_for_a_grid(search, encoder_out):
    search_grid(search, [encoder_out], GRID, side_by_side=5)
    extended = search.scorer.extended
    assert len(extended) == len(set(extended))
    # weights of 0 come first: then the external LM catches up
    assert set(search.external_lm.extended) <= set(extended)
    assert len(search.external_lm.extended) == len(set(search.external_lm.extended))
    alone = TransducerSearch(TableScorer(5, 3), beam_size=4, external_lm=TableLM(5, 3))
    for scales in GRID:
        alone(encoder_out, scales)
    assert len(alone.scorer.extended) > 2 * len(extended)


@pytest.mark.parametrize("side_by_side", [128, 1])
def test_several_utterances_equal_each_alone(search, side_by_side):
    encoded = [torch.randn(frames, 6) * 1.5 for frames in (12, 5, 9)]
    together = search_grid(search, encoded, GRID, True, side_by_side)
    for one, found in zip(encoded, together):
        (alone,) = search_grid(search, [one], GRID, True)
        assert [h.labels for h in found] == [h.labels for h in alone]
        assert [h.total for h in found] == pytest.approx([h.total for h in alone], abs=1e-4)


def test_word_errors_are_those_of_jiwer():
    references = ["a b c", "d e", "f"]
    hypotheses = [["a b c", "a c x"], ["d e", ""], ["f f", "f"]]
    perfect, other = score_grid([Scales(), Scales(beta=1.0)], references, hypotheses)
    assert (perfect.insertions, perfect.deletions, perfect.substitutions) == (1, 0, 0)
    expected = jiwer.process_words(references, ["a c x", "", "f"])
    assert other.wer == pytest.approx(100 * expected.wer)
    assert other.words == 6
    assert other.deletions == expected.deletions and other.insertions == expected.insertions


def test_empty_reference_counts_insertions():
    (point,) = score_grid([Scales()], ["a b", ""], [["a b"], ["x y"]])
    assert (point.insertions, point.wer) == (2, 100.0)
    with pytest.raises(UserError, match="no words"):
        score_grid([Scales()], ["", " "], [["a"], ["b"]])


def points(wers, betas=(0.0, 0.5, 1.0), bonuses=(0.0, 1.0, 2.0)):
    grid = make_grid([0.5], betas, [0.0], bonuses)
    return [Point(scales, wer, 0, 0, 1, 100) for scales, wer in zip(grid, wers)]


def test_best_point_has_the_lowest_rate_and_good_neighbours():
    #            bonus 0, 1, 2
    found = points([9, 5, 9, 9, 9, 6, 9, 6, 5])
    assert best_point(found).scales == Scales(0.5, 1.0, 0.0, 2.0)
    found = points([9, 4, 9, 9, 9, 6, 9, 6, 5])
    assert best_point(found).scales == Scales(0.5, 0.0, 0.0, 1.0)


def test_optimum_at_an_end_of_the_grid_is_told():
    found = points([9, 9, 9, 9, 9, 9, 9, 9, 5])
    assert edges(best_point(found), found) == ["beta", "label_bonus"]
    found = points([5, 9, 9, 9, 9, 9, 9, 9, 9])  # beta 0 is a natural end
    assert edges(best_point(found), found) == ["label_bonus"]
    found = points([9, 9, 9, 9, 5, 9, 9, 9, 9])
    assert edges(best_point(found), found) == []


def test_table_lists_all_points_best_first():
    lines = table(points([9, 5, 9, 9, 9, 6, 9, 6, 7])).splitlines()
    assert lines[0].split() == ["beta", "label_bonus", "WER", "ins", "del", "sub"]
    assert lines[1].split() == ["0", "1", "5.00", "0", "0", "1"]
    assert len(lines) == 10


def test_heat_map_of_two_axes_at_the_best_of_the_others():
    grid = make_grid([0.1, 0.2], [0.0, 0.5, 1.0], [0.0], [0.0, 2.0])
    found = [Point(scales, 10.0 + i, 0, 0, 1, 100) for i, scales in enumerate(grid)]
    figure = heat_map(found, best_point(found))
    plot = figure.axes[0]
    assert (plot.get_xlabel(), plot.get_ylabel()) == ("beta", "alpha")
    assert [text.get_text() for text in plot.texts] == [
        f"{p.wer:.1f}" for p in found if p.scales.label_bonus == 0.0
    ]
    assert "label_bonus 0" in plot.get_title()
    assert heat_map(points([1, 2, 3], betas=(0.5,)), found[0]) is None
