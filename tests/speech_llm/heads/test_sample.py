"""Utterances that are chosen by their names, and means that ESPnet takes."""

import math
import random
import statistics

import pytest
from espnet2.train.reporter import Reporter

from espnet_llm_plugin.speech_llm.heads.sample import RunningValue, UtteranceSample, name_hash

LENGTHS = {f"speaker{i % 40}-{i:04d}": 1 + i for i in range(2000)}  # by utterance
SIZE = 100


def one_pass(sample, names, batch_size):
    """Names in the sample at the end, and how many were looked at."""
    looked_at = 0
    for start in range(0, len(names), batch_size):
        batch = names[start : start + batch_size]
        chosen = sample.choose(batch)
        sample.results |= {key: batch[row] for key, row in chosen.items()}
        looked_at += len(chosen)
        assert len(sample.results) <= sample.size
    return set(sample.results.values()), looked_at


def test_the_lowest_hashes_whatever_the_order():
    """Sorted by length as in ESPnet's validation, or not; every epoch; after a restart."""
    expected = set(sorted(LENGTHS, key=name_hash)[:SIZE])
    by_length = sorted(LENGTHS, key=LENGTHS.get)
    shuffled = random.Random(0).sample(by_length, len(by_length))
    for order, batch_size in ((by_length, 1), (by_length, 32), (by_length[::-1], 7), (shuffled, 9)):
        sample = UtteranceSample(SIZE)
        found, looked_at = one_pass(sample, order, batch_size)
        assert found == expected
        assert SIZE < looked_at < 1.3 * SIZE * (1 + math.log(len(LENGTHS) / SIZE))
        for _ in range(2):
            sample.restart()
            assert one_pass(sample, order, batch_size) == (expected, SIZE)


def test_the_sample_is_as_long_as_the_set():
    """Its mean length is that of the set up to three standard errors; of the shortest it is 50."""
    chosen = one_pass(UtteranceSample(SIZE), list(LENGTHS), 20)[0]
    mean = statistics.fmean(LENGTHS[name] for name in chosen)
    error = statistics.pstdev(LENGTHS.values()) / math.sqrt(SIZE)
    assert abs(mean - statistics.fmean(LENGTHS.values())) < 3 * error


def test_fewer_utterances_than_wanted():
    sample = UtteranceSample(10)
    for _ in range(2):
        assert one_pass(sample, ["a", "b", "c"], 2) == ({"a", "b", "c"}, 3)
        sample.restart()


def test_a_repeated_utterance_is_looked_at_once():
    sample = UtteranceSample(2)
    assert len(sample.choose(["a"])) == 1
    sample.results[name_hash("a")] = "a"
    assert list(sample.choose(["a", "b"]).values()) == [1]


def test_hashes_are_the_same_everywhere():
    assert name_hash("utt1") == 15978203138509392857


def test_the_mean_of_running_values_is_the_last_estimate():
    """As ESPnet's reporter takes it, whatever the weights; batches with NaN do not count."""
    generator = random.Random(2)
    estimates = [math.nan, *(100 * generator.random() for _ in range(30)), math.nan, 40.0, 37.5]
    weights = [generator.randint(1, 500) for _ in estimates]
    reporter, value = Reporter(), RunningValue()
    with reporter.observe("valid", epoch=1) as sub:
        for estimate, weight in zip(estimates, weights):
            sub.register({"wer": value(estimate, weight)}, weight)
            sub.next()
    assert reporter.get_value("valid", "wer", 1) == pytest.approx(37.5)
