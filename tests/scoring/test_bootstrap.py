"""Bootstrap intervals."""

import numpy as np
import pytest

from espnet_llm_plugin.scoring import bootstrap
from espnet_llm_plugin.scoring.bootstrap import error_rate_interval, paired_difference


@pytest.fixture
def counts():
    rng = np.random.default_rng(3)
    words = rng.integers(1, 25, size=400)
    return rng.binomial(words, 0.12), rng.binomial(words, 0.08), words


def test_interval_equals_a_loop(counts):
    errors, _, words = counts
    rates = []
    for draw in bootstrap._draws(len(words), 200, seed=5):
        for row in draw:
            wrong = sum(int(errors[n]) for n in row)
            rates.append(100 * wrong / sum(int(words[n]) for n in row))
    assert len(rates) == 200
    low, high = error_rate_interval(errors, words, resamples=200, seed=5)
    assert (low, high) == pytest.approx(tuple(np.percentile(rates, [2.5, 97.5])))


def test_interval_is_that_of_the_normal_approximation(counts):
    """Ratio estimator: variance of (errors - rate * words) over the mean number of words."""
    errors, _, words = counts
    rate = errors.sum() / words.sum()
    deviation = 100 * np.sqrt(np.var(errors - rate * words) / len(words)) / words.mean()
    low, high = error_rate_interval(errors, words)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.04)
    assert (low + high) / 2 == pytest.approx(100 * rate, rel=0.02)


def test_seed_decides(counts):
    errors, _, words = counts
    first = error_rate_interval(errors, words, resamples=300, seed=1)
    assert first == error_rate_interval(errors, words, resamples=300, seed=1)
    assert first != error_rate_interval(errors, words, resamples=300, seed=2)


def test_number_of_resamples_is_kept_over_chunks(counts, monkeypatch):
    monkeypatch.setattr(bootstrap, "_CHUNK", 7 * 400)
    shapes = [draw.shape for draw in bootstrap._draws(400, 24, seed=0)]
    assert shapes == [(7, 400)] * 3 + [(3, 400)]


def test_paired_difference(counts):
    worse, better, words = counts
    pair = paired_difference(worse, better, words)
    assert pair.first == pytest.approx(100 * worse.sum() / words.sum())
    assert pair.second == pytest.approx(100 * better.sum() / words.sum())
    assert pair.low < pair.difference < pair.high
    assert pair.significant and pair.probability > 0.99
    assert pair.relative == pytest.approx(100 * pair.difference / pair.first)
    back = paired_difference(better, worse, words)
    assert (back.low, back.high) == pytest.approx((-pair.high, -pair.low))
    assert back.significant and back.probability < 0.01


def test_pairing_removes_what_both_systems_share(counts):
    """One system, and the same with one error more in ten utterances: surely different."""
    errors, _, words = counts
    more = errors.copy()
    more[::40] += 1
    pair = paired_difference(more, errors, words)
    low, high = error_rate_interval(errors, words)
    assert pair.significant
    assert pair.high - pair.low < 0.2 * (high - low)


def test_a_system_equals_itself(counts):
    errors, _, words = counts
    pair = paired_difference(errors, errors, words, resamples=50)
    assert (pair.low, pair.high, pair.probability) == (0, 0, 0)
    assert not pair.significant


def test_resamples_without_a_word_do_not_divide_by_zero():
    interval = error_rate_interval(np.array([1, 0]), np.array([0, 4]), resamples=50)
    assert np.isfinite(interval).all()
