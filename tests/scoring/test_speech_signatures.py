"""Every signature of a speech LLM on made cases: shown, not shown, not measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from espnet_llm_plugin.scoring.audio_use import AudioUse, CTCAgreement
from espnet_llm_plugin.scoring.bootstrap import Difference
from espnet_llm_plugin.scoring.hallucination import Hallucination
from espnet_llm_plugin.scoring.scored_set import ScoredSet
from espnet_llm_plugin.scoring.signatures import CLEAR, SHOWS, UNKNOWN
from espnet_llm_plugin.scoring.similarity import Alignment
from espnet_llm_plugin.scoring.speech_signatures import SpeechEvidence, findings, greedy_rates
from espnet_llm_plugin.scoring.training_log import Epoch
from tests.scoring.test_signatures import summary

SIGNS = Hallucination(
    utterances=400,
    loops=0.02,
    reference_loops=0.015,
    new_loops=0.005,
    looped_words=0.001,
    repeated_ngrams=0.02,
    reference_repeated_ngrams=0.01,
    worst=4,
    worst_insertions=0.2,
    worst_rate=0.3,
    worst_errors=0.04,
    ratio_low=0.8,
    ratio_median=1.0,
    ratio_high=1.2,
    too_long=0.01,
    too_short=0.02,
    examples=[],
    most_inserted=[],
)
CTC = CTCAgreement(-0.4, 0, 20.0, 15.0, 12.0, 0.01)
AUDIO = AudioUse(
    utterances=100,
    skipped=0,
    nll=1.2,
    other_nll=3.8,
    indifferent=0.0,
    attention=[0.3, 0.6],
    uniform_attention=0.7,
    gates=None,
    alignment=Alignment(0.9, 0.1, 90),
    tokens_per_embedding=0.5,
    crowded=0.0,
    ctc=CTC,
    picture=None,
)
TOTAL = summary(900, 80, 20, 20)
JOINT = Difference(first=15.5, second=15.0, low=0.1, high=0.9, probability=1.0)
HEALTHY = SpeechEvidence(
    total=TOTAL,
    by_length={"1-5": summary(190, 6, 4, 2), "6-10": summary(700, 90, 10, 10)},
    length_ratio=1.0,
    epochs=[Epoch(1, 9.0, 8.0), Epoch(2, 5.0, 6.0)],
    at_edge=[],
    hallucination=SIGNS,
    audio=AUDIO,
    alone=ScoredSet(Path("alone"), TOTAL, {}, 1.0, None),
    joint=JOINT,
    wider=JOINT,
    greedy={"llm": 22.0, "ctc": 23.0, "llm_prefix_rnnt": 21.0},
)


def audio(**changes):
    return {"audio": replace(AUDIO, **changes)}


def signs(**changes):
    return {"hallucination": replace(SIGNS, **changes)}


CASES = {
    "LLM ignores the audio": audio(other_nll=1.45),
    "hypotheses without support in the audio": audio(ctc=replace(CTC, contradicted=0.06)),
    "loops": signs(new_loops=0.02),
    "insertions in few utterances": signs(worst_insertions=0.4, worst_rate=0.6),
    "lengths out of proportion": signs(too_long=0.03, too_short=0.03),
    "deletions grow with length": {
        "by_length": {"1-5": summary(190, 6, 4, 2), "6-10": summary(640, 110, 50, 10)}
    },
    "joint decoding hides the LLM's errors": {"joint": replace(JOINT, first=28.0)},
    "collapse at a large beam": {"wider": replace(JOINT, first=15.0, second=15.3)},
    "prefix good, LLM not": {"greedy": {"llm": 44.0, "ctc": 23.0, "llm_prefix_rnnt": 24.0}},
    "embeddings not aligned": audio(alignment=Alignment(0.3, 0.15, 90)),
    "stride too large": audio(crowded=0.1),
    "overfitting": {"epochs": [Epoch(1, 9.0, 8.0), Epoch(2, 5.0, 8.5)]},
    "tuning ends at the edge of the grid": {"at_edge": ["ctc_weight"]},
}


def verdicts(evidence):
    return {finding.signature: finding.verdict for finding in findings(evidence)}


def of(evidence, signature):
    (found,) = (f for f in findings(evidence) if f.signature == signature)
    return found


def test_a_healthy_system_shows_nothing():
    assert verdicts(HEALTHY) == dict.fromkeys(CASES, CLEAR)


@pytest.mark.parametrize("signature", CASES)
def test_one_case_shows_one_signature(signature):
    found = verdicts(replace(HEALTHY, **CASES[signature]))
    assert found == {**dict.fromkeys(CASES, CLEAR), signature: SHOWS}


def test_what_was_not_measured_is_said():
    bare = SpeechEvidence(TOTAL, {"1-5": TOTAL}, 1.0)
    assert verdicts(bare) == dict.fromkeys(CASES, UNKNOWN)


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({"attention": [0.01, 0.015]}, SHOWS),  # whatever the likelihoods say
        ({"attention": [0.01, 0.03]}, CLEAR),
        ({"attention": None, "gates": [0.001, -0.005]}, SHOWS),
        ({"attention": None, "gates": [0.001, -0.5]}, CLEAR),
        ({"other_nll": None, "attention": None}, UNKNOWN),
        ({"other_nll": 1.51}, CLEAR),
    ],
)
def test_each_reason_that_audio_is_ignored(changes, verdict):
    assert of(replace(HEALTHY, **audio(**changes)), "LLM ignores the audio").verdict == verdict


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({"worst_insertions": 0.9}, CLEAR),  # of very few
        ({"worst_rate": 2.0}, CLEAR),  # short utterances among many insertions
        ({"worst_insertions": None, "worst_rate": 0.0}, CLEAR),
        ({"utterances": 99, "worst_insertions": 0.9, "worst_rate": 2.0}, UNKNOWN),
    ],
)
def test_insertions_in_few_utterances(changes, verdict):
    evidence = replace(HEALTHY, **signs(**changes))
    assert of(evidence, "insertions in few utterances").verdict == verdict


def test_differences_that_may_be_chance_hide_nothing():
    chance = replace(JOINT, first=19.0, low=-0.1)
    name = "joint decoding hides the LLM's errors"
    assert of(replace(HEALTHY, joint=chance), name).verdict == CLEAR
    assert (
        "WER 15.50 alone, 15.00 jointly: -0.50 (95 % -0.90 to -0.10)."
        in of(HEALTHY, name).statement
    )


def test_what_helps_against_short_hypotheses():
    short = replace(HEALTHY, **signs(too_long=0.0, too_short=0.2))
    assert "--penalty" in of(short, "lengths out of proportion").statement
    long = replace(HEALTHY, **signs(too_long=0.2))
    assert "--penalty" not in of(long, "lengths out of proportion").statement


def test_ctc_is_no_witness_without_hypotheses():
    bare = CTCAgreement(-0.4, 0, 20.0)
    none = {**dict.fromkeys(CASES, CLEAR), "hypotheses without support in the audio": UNKNOWN}
    assert verdicts(replace(HEALTHY, **audio(ctc=bare))) == none
    # nor with a CTC that recognises next to nothing
    weak = replace(CTC, greedy_wer=51.0, contradicted=0.5)
    assert verdicts(replace(HEALTHY, **audio(ctc=weak))) == none


@pytest.mark.parametrize(
    "rates, verdict, statement",
    [
        ({"llm": 70.0, "ctc": 23.0, "x_rnnt": 60.0}, CLEAR, "Neither reads the prefix"),
        ({"llm": 70.0, "ctc": 23.0}, SHOWS, "The encoder has the text; adapter or LLM lose it."),
        ({"llm": 20.0, "adapter_ctc": 80.0}, CLEAR, "WER 20.0 by the LLM, 80.0 by adapter_ctc."),
        ({"llm": 80.0, "a_ctc": 49.0, "b_ctc": 55.0}, SHOWS, "49.0 by a_ctc. The prefix has"),
        ({"llm": 80.0}, UNKNOWN, "report_wer_utts"),
        ({"a_ctc": 80.0}, UNKNOWN, "report_wer_utts"),
    ],
)
def test_heads_beside_the_llm(rates, verdict, statement):
    found = of(replace(HEALTHY, greedy=rates), "prefix good, LLM not")
    assert found.verdict == verdict and statement in found.statement


def test_greedy_rates_of_a_training():
    statistics = {"wer_llm": 40.0, "wer_ctc": float("nan"), "cer_llm": 9.0, "loss": 1.0}
    assert greedy_rates(statistics) == {"llm": 40.0}
