"""Slots of CTC and transducer drafts, against enumeration of paths and the search's own scores."""

import itertools

import pytest
import torch

from espnet_llm_plugin.fusion.prior import Prior
from espnet_llm_plugin.fusion.slots import ctc_slots, transducer_slots
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.contracts.search_contract import OneByOne

VOCAB = 5


def collapse(path):
    return tuple(k for k, _ in itertools.groupby(path) if k != 0)


def best_once(rows, token):
    """Best path over the frames that collapses to one label, or to nothing."""
    wanted = () if token is None else (token,)
    return max(
        sum(float(row[k]) for row, k in zip(rows, path))
        for path in itertools.product(range(VOCAB), repeat=len(rows))
        if collapse(path) == wanted
    )


@pytest.mark.parametrize("seed", range(8))
def test_ctc_scores_are_those_of_the_best_paths(seed):
    torch.manual_seed(seed)
    # a few frames in a row look alike
    log_probs = (2 * torch.randn(4, VOCAB)).repeat_interleave(2, 0) + 0.3 * torch.randn(8, VOCAB)
    log_probs[:, -1] = -20  # sos/eos
    log_probs = log_probs.log_softmax(-1)
    slots = ctc_slots(log_probs, alternatives=10, margin=1e9)
    best = log_probs[:, :-1].argmax(-1).tolist()
    runs = [(k, len(list(group))) for k, group in itertools.groupby(best)]
    assert len(slots) == len(runs)
    begin = 0
    for number, (slot, (token, length)) in enumerate(zip(slots, runs)):
        rows = log_probs[begin : begin + length]
        begin += length
        assert slot.alternatives[0] == (() if token == 0 else (token,))
        for labels, score in zip(slot.alternatives, slot.scores):
            expected = best_once(rows, labels[0] if labels else None)
            assert score == pytest.approx(expected, abs=1e-5)
        beside = [runs[n][0] for n in (number - 1, number + 1) if 0 <= n < len(runs)]
        others = {1, 2, 3, 0} - {token} - {k for k in beside if k != 0}
        assert {labels[0] if labels else 0 for labels in slot.alternatives[1:]} == others
    draft = tuple(label for slot in slots for label in slot.alternatives[0])
    assert draft == collapse(best)
    assert sum(slot.scores[0] for slot in slots) == pytest.approx(
        float(log_probs[:, :-1].amax(-1).sum()), abs=1e-4
    )


def test_ctc_limits_and_prior():
    torch.manual_seed(0)
    log_probs = torch.randn(6, VOCAB).log_softmax(-1)
    for slot in ctc_slots(log_probs, alternatives=1, margin=1e9):
        assert len(slot.alternatives) <= 2
    for slot in ctc_slots(log_probs, margin=0.5):
        assert min(slot.scores) >= slot.scores[0] - 0.5
    prior = Prior("label", torch.tensor([0.0, -5.0, -1.0, -2.0, -9.0]))
    plain = ctc_slots(log_probs, margin=1e9)
    weighed = ctc_slots(log_probs, margin=1e9, prior=prior, prior_weight=0.5)
    for a, b in zip(plain, weighed):
        scores = dict(zip(b.alternatives, b.scores))
        for labels, score in zip(a.alternatives, a.scores):
            expected = score - 0.5 * prior.of(labels)
            assert scores[labels] == pytest.approx(expected, abs=1e-5)
    assert ctc_slots(log_probs[:0]) == []


@pytest.mark.parametrize("kind", ["transducer", "factorized"])
def test_transducer_alternatives_are_those_of_the_emitting_cells(kind, tmp_path):
    from espnet_llm_plugin.inference.loading import load_asr
    from tests.inference.tiny_asr import make_asr

    files = make_asr(tmp_path / kind, kind)
    asr = load_asr(files.config, files.model)
    scorer = build_scorer(asr.model)
    torch.manual_seed(1)
    encoder_out = torch.randn(9, 16)
    (hyp,) = TransducerSearch(scorer, beam_size=1)(encoder_out)
    assert len(hyp.labels) > 2
    slots = transducer_slots(
        scorer,
        encoder_out,
        hyp.labels,
        hyp.frames,
        alternatives=99,
        margin=1e9,
        alpha=scorer.alpha,
        forbidden=[scorer.num_labels] if kind == "transducer" else [],
    )
    assert [slot.alternatives[0] for slot in slots] == [(label + 1,) for label in hyp.labels]
    one = OneByOne(scorer, encoder_out)
    for n, slot in enumerate(slots):
        blank, rows = one.scores(hyp.frames[n], hyp.labels[:n])
        assert len(slot.alternatives) == 7
        for labels, score in zip(slot.alternatives, slot.scores):
            expected = rows[labels[0] - 1] if labels else blank
            assert score == pytest.approx(float(expected), abs=1e-4)
    assert transducer_slots(scorer, encoder_out, (), ()) == []
