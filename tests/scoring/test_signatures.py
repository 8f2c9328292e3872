"""Every signature on made cases: shown, not shown, not measured."""

from dataclasses import replace

import pytest

from espnet_llm_plugin.scoring import signatures
from espnet_llm_plugin.scoring.alignment import Counts
from espnet_llm_plugin.scoring.bootstrap import Difference
from espnet_llm_plugin.scoring.nbest import NBestStatistics
from espnet_llm_plugin.scoring.signatures import CLEAR, SHOWS, UNKNOWN, Evidence, findings
from espnet_llm_plugin.scoring.training_log import Epoch
from espnet_llm_plugin.scoring.wer import Summary


def summary(correct, substitutions, deletions, insertions):
    return Summary(10, 5, Counts(correct, substitutions, deletions, insertions))


LISTS = NBestStatistics(10, 100, 4.0, [20.0, 18.0, 15.0], 2.0, 0.2)
BETTER = Difference(first=20.0, second=15.0, low=3.0, high=7.0, probability=1.0)
EQUAL = Difference(first=20.0, second=19.8, low=-0.5, high=0.9, probability=0.6)
WORSE = Difference(first=20.0, second=25.0, low=-7.0, high=-3.0, probability=0.0)

HEALTHY = Evidence(
    total=summary(900, 80, 20, 20),
    by_length={"1-5": summary(190, 6, 4, 2), "6-10": summary(700, 90, 10, 10)},
    length_ratio=1.0,
    nll_per_label=0.5,
    blank_at_labels=0.1,
    blank_elsewhere=0.95,
    word_perplexity=20.0,
    weak_word_perplexity=90.0,
    native_word_perplexity=19.0,
    nbest=LISTS,
    epochs=[Epoch(1, 9.0, 8.0), Epoch(2, 5.0, 6.0)],
    tuned=BETTER,
    at_edge=[],
)
CASES = {
    "half-trained transducer": {"nll_per_label": 1.4},
    "imbalance of blank and labels": {
        "total": summary(900, 60, 40, 10),
        "length_ratio": 0.96,
    },
    "emissions spread over frames": {"blank_at_labels": 0.4},
    "deletions grow with length": {
        "by_length": {"1-5": summary(190, 6, 4, 2), "6-10": summary(640, 110, 50, 10)}
    },
    "strong LM does not help": {"tuned": EQUAL},
    "vocabulary adaptation mismatch": {"word_perplexity": 25.0},
    "predictor overfits": {"epochs": [Epoch(1, 9.0, 8.0), Epoch(2, 5.0, 8.5)]},
    "MWER has nothing to learn from": {"nbest": replace(LISTS, oracle=[20.0, 19.5])},
    "tuning ends at the edge of the grid": {"at_edge": ["beta"]},
}


def verdicts(evidence):
    return {finding.signature: finding.verdict for finding in findings(evidence)}


def statement(evidence, signature):
    (text,) = (f.statement for f in findings(evidence) if f.signature == signature)
    return text


def test_a_healthy_system_shows_nothing():
    assert verdicts(HEALTHY) == dict.fromkeys(CASES, CLEAR)


@pytest.mark.parametrize("signature", CASES)
def test_one_case_shows_one_signature(signature):
    found = verdicts(replace(HEALTHY, **CASES[signature]))
    assert found == {**dict.fromkeys(CASES, CLEAR), signature: SHOWS}


def test_what_was_not_measured_is_said():
    bare = Evidence(summary(90, 5, 5, 5), {"1-5": summary(90, 5, 5, 5)}, 1.0)
    expected = {**dict.fromkeys(CASES, UNKNOWN), "imbalance of blank and labels": CLEAR}
    assert verdicts(bare) == expected
    single = replace(HEALTHY, nbest=replace(LISTS, oracle=[20.0]))
    assert verdicts(single)["MWER has nothing to learn from"] == UNKNOWN
    assert "--nbest" in statement(single, "MWER has nothing to learn from")


def test_insertions_are_an_imbalance_too():
    name = "imbalance of blank and labels"
    many = replace(HEALTHY, total=summary(900, 80, 20, 60), length_ratio=1.04)
    assert verdicts(many)[name] == SHOWS
    assert "smaller label bonus" in statement(many, name)
    both = replace(HEALTHY, total=summary(860, 80, 60, 40), length_ratio=0.96)
    assert verdicts(both)[name] == CLEAR  # deletions are not twice the insertions
    few = replace(HEALTHY, total=summary(900, 81, 19, 0), length_ratio=0.96)
    assert verdicts(few)[name] == CLEAR


@pytest.mark.parametrize(
    "change", [{"effective": 1.1}, {"without_variance": 0.6}, {"oracle": [20.0, 19.2]}]
)
def test_each_reason_that_mwer_has_nothing_to_learn_from(change):
    found = verdicts(replace(HEALTHY, nbest=replace(LISTS, **change)))
    assert found["MWER has nothing to learn from"] == SHOWS


def test_falling_losses_do_not_overfit():
    name = "predictor overfits"
    rising = [Epoch(1, 9.0, 8.0), Epoch(2, 9.5, 8.9)]  # training diverges: another disease
    assert verdicts(replace(HEALTHY, epochs=rising))[name] == CLEAR
    a_little = [Epoch(1, 9.0, 8.0), Epoch(2, 5.0, 8.3)]
    assert verdicts(replace(HEALTHY, epochs=a_little))[name] == CLEAR


@pytest.mark.parametrize(
    "tuned, untuned, words",
    [
        (BETTER, BETTER, "Untuned the strong LM has 15.00: the swap helps as it is."),
        (BETTER, EQUAL, "Untuned the strong LM has 19.80: all of the gain is tuning."),
        (EQUAL, WORSE, "Untuned the strong LM has 25.00. "),
    ],
)
def test_what_is_said_of_the_swap(tuned, untuned, words):
    evidence = replace(HEALTHY, tuned=tuned, untuned=untuned)
    assert words in statement(evidence, "strong LM does not help") + " "


def test_what_is_said_of_training_after_the_swap():
    evidence = replace(HEALTHY, untuned=EQUAL, trained=replace(BETTER, first=15.0, second=14.0))
    words = "Trained further with it 14.00: +1.00 (95 % +3.00 to +7.00)."
    assert words in statement(evidence, "strong LM does not help")
    assert [rate for _, rate in signatures.swap_rates(evidence)] == [20.0, 19.8, 15.0, 14.0]
    assert [rate for _, rate in signatures.swap_rates(HEALTHY)] == [20.0, 15.0]


def test_gain_per_nat():
    assert signatures.gain_per_nat(HEALTHY) == pytest.approx(5.0 / 1.5040774)  # log(90 / 20)
    assert signatures.gain_per_nat(replace(HEALTHY, weak_word_perplexity=15.0)) is None
    assert "3.32 % WER for a nat" in statement(HEALTHY, "strong LM does not help")


def test_short_buckets_are_not_compared():
    lengths = {**CASES["deletions grow with length"]["by_length"], "31-": summary(99, 0, 0, 0)}
    found = verdicts(replace(HEALTHY, by_length=lengths))
    assert found["deletions grow with length"] == SHOWS
