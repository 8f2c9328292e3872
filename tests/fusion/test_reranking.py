"""Re-ranked lists: equal to a slow choice at every point, and which points are searched."""

import itertools
import math
import random

import jiwer
import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.reranking import (
    Candidate,
    Reranker,
    first_points,
    next_points,
    word_errors,
)
from espnet_llm_plugin.fusion.tuning import Point, make_grid
from espnet_llm_plugin.transducer.hypothesis import Scales

ALPHAS = [0.2, 1.0]
GRID = make_grid(ALPHAS, [-0.3, 0.0, 0.5], [0.0, 0.4], [-1.0, 0.0, 2.0])
REFERENCES = {"a": "one two three", "b": "two", "c": "three one", "d": "one"}


def random_lists(seed):
    """Of every utterance but the last."""
    generator = random.Random(seed)
    lists = {}
    for utt in list(REFERENCES)[:-1]:
        texts = {
            " ".join(generator.choices(["one", "two", "three"], k=generator.randrange(5)))
            for _ in range(6)
        }
        lists[utt] = [
            Candidate(
                labels=tuple(generator.randrange(9) for _ in range(2 * len(text.split()))),
                text=text,
                acoustic=(-10 * generator.random(), -10 * generator.random()),
                lm=-8 * generator.random(),
                external_lm=-8 * generator.random(),
            )
            for text in sorted(texts)
        ]
    return lists


def slow_point(lists, scales, normalize):
    """One utterance and hypothesis after the other."""
    texts = []
    for utt in REFERENCES:
        best, text = -math.inf, ""
        for one in lists.get(utt, []):
            score = one.acoustic[ALPHAS.index(scales.alpha)]
            score += scales.beta * one.lm + scales.lm_weight * one.external_lm
            score += scales.label_bonus * len(one.labels)
            score /= len(one.labels) + 1 if normalize else 1
            if score > best:
                best, text = score, one.text
        texts.append(text)
    words = jiwer.process_words(list(REFERENCES.values()), texts)
    errors = words.insertions, words.deletions, words.substitutions
    return Point(scales, 100 * words.wer, *errors, 7)


@pytest.mark.parametrize("normalize", [False, True])
def test_points_equal_a_slow_choice(normalize):
    lists = random_lists(0)
    reranker = Reranker(REFERENCES, ALPHAS, normalize)
    for utt, candidates in lists.items():
        reranker.add(utt, candidates[:2])
        reranker.add(utt, candidates)  # known ones are passed over
    points = reranker.points(GRID)
    assert len({point.wer for point in points}) > 2
    for scales, point in zip(GRID, points):
        slow = slow_point(lists, scales, normalize)
        assert point.wer == pytest.approx(slow.wer)
        assert (point.scales, point.insertions, point.deletions, point.substitutions) == (
            *(slow.scales, slow.insertions, slow.deletions),
            slow.substitutions,
        )
    assert reranker.known("d") == set() and len(reranker.known("a")) == len(lists["a"])


def test_word_errors_of_empty_texts():
    assert word_errors("", "a b") == (2, 0, 0)
    assert word_errors("a b", "") == (0, 2, 0)
    assert word_errors("a b", "a c d") == (1, 0, 1)
    with pytest.raises(UserError, match="no words"):
        Reranker({"a": ""}, [None])


def test_first_points_are_both_ends_and_the_middle():
    assert first_points(GRID) == [
        Scales(1.0, -0.3, 0.0, -1.0),
        Scales(1.0, 0.0, 0.0, 0.0),  # of two values the first
        Scales(0.2, 0.5, 0.4, 2.0),
    ]
    rnnt = make_grid([None], [0.0], [0.0], [1.0])
    assert first_points(rnnt) == rnnt


def test_next_points_are_the_best_promises():
    def point(bonus, wer):
        return Point(Scales(label_bonus=bonus), wer, 0, 0, 0, 10)

    reranked = [point(n, wer) for n, wer in enumerate([5.0, 9.0, 7.0, 6.0, 8.0])]
    # the first is searched already and did not keep its promise
    searched = {Scales(label_bonus=0): point(0, 8.0)}
    chosen = next_points(reranked, searched, 2)
    assert [scales.label_bonus for scales in chosen] == [3, 2]
    assert next_points(reranked, {Scales(label_bonus=0): point(0, 5.5)}, 2) == []
    everything = next_points(reranked, {}, 9)
    assert [scales.label_bonus for scales in everything] == [0, 3, 2, 4, 1]


def test_internal_lm_weight_is_beta_of_a_model_without_predictor_lm():
    from espnet_llm_plugin.fusion.tuning import edges, heat_map, table, used_axes

    grid = make_grid([None], [0.0, -0.2, -0.4], [0.0], [0.0, 1.0])
    points = [Point(scales, 9 + n, 0, 0, 0, 10) for n, scales in enumerate(grid)]
    assert used_axes(points, has_lm=False) == ["beta", "label_bonus"]
    listed = [point.as_dict(["beta", "label_bonus"]) for point in points]
    assert [row["ilm_weight"] for row in listed] == [0.0, 0.0, 0.2, 0.2, 0.4, 0.4]
    assert math.copysign(1, listed[0]["ilm_weight"]) == 1
    assert [Point.from_dict(row) for row in listed] == points
    assert edges(points[0], points) == ["label_bonus"]  # 0 is the weight's end
    assert edges(points[5], points) == ["ilm_weight", "label_bonus"]
    assert table(points).split()[:2] == ["ilm_weight", "label_bonus"]
    assert heat_map(points, points[0]).axes[0].get_ylabel() == "ilm_weight"
    other = make_grid([0.5], [0.0, 0.4], [0.0], [0.0])
    points = [Point(scales, 1.0, 0, 0, 0, 10) for scales in other]
    assert points[1].as_dict(["alpha", "beta"])["beta"] == 0.4


def test_reranked_points_are_marked_and_come_last():
    from espnet_llm_plugin.fusion.tuning import heat_map, table

    grid = make_grid([0.1, 0.2], [0.0, 0.4], [0.0], [0.0])
    points = [Point(scales, 10.0 + n, 1, 2, 3, 10) for n, scales in enumerate(grid)]
    reranked = {grid[0], grid[3]}
    rows = [line.split() for line in table(points, reranked).splitlines()[1:]]
    assert [row[2] for row in rows] == ["11.00", "12.00", "~10.00", "~13.00"]
    figure = heat_map(points, points[1], reranked)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["~10.0", "11.0", "12.0", "~13.0"]
    assert [text.get_weight() for text in figure.axes[0].texts].count("bold") == 1


def test_scores_do_not_depend_on_the_order_of_the_grid():
    reranker = Reranker(REFERENCES, ALPHAS)
    for utt, candidates in random_lists(1).items():
        reranker.add(utt, candidates)
    forth = reranker.points(GRID)
    assert list(itertools.chain(reranker.points(GRID[::-1])))[::-1] == forth
