"""CTC prefix search: against enumeration of all paths, torch's CTC loss, and greedy decoding."""

import itertools
import math

import numpy as np
import pytest
import torch
from espnet2.asr.ctc import CTC

from espnet_llm_plugin.fusion.ctc_search import CTCSearch
from espnet_llm_plugin.transducer.hypothesis import Scales, SearchError
from tests.contracts.search_contract import Case, SearchContract, TableLM

VOCAB, DIM = 5, 6  # three labels
PLAIN, FUSED = Scales(), Scales(lm_weight=0.6, label_bonus=0.7)


@pytest.fixture(params=range(3))
def case(request):
    torch.manual_seed(request.param)
    ctc = CTC(VOCAB, DIM)
    torch.nn.init.normal_(ctc.ctc_lo.weight, std=1.0)
    return ctc.eval(), torch.randn(5, DIM), TableLM(VOCAB - 2, request.param)


def enumerate_paths(ctc, encoder_out, lm, scales, only=None):
    """label sequence -> (log of the sum over paths, best path and the frames of its labels).

    ``only``: paths whose labels begin at these frames.
    """
    log_probs = ctc.log_softmax(encoder_out[None])[0].detach().double().numpy()
    found = {}
    for path in itertools.product(range(VOCAB - 1), repeat=len(encoder_out)):
        starts = [
            (t, token)
            for t, token in enumerate(path)
            if token != 0 and (t == 0 or path[t - 1] != token)
        ]
        if only is not None and tuple(t for t, _ in starts) != tuple(only):
            continue
        labels = tuple(token - 1 for _, token in starts)
        score = sum(log_probs[t, token] for t, token in enumerate(path))
        score += scales.label_bonus * len(labels)
        for u, label in enumerate(labels):
            score += scales.lm_weight * float(lm.row(labels[:u])[label])
        score += scales.lm_weight * lm.end(labels)
        total, best, frames = found.get(labels, (-math.inf, -math.inf, ()))
        if score > best:
            best, frames = score, tuple(t for t, _ in starts)
        found[labels] = (float(np.logaddexp(total, score)), best, frames)
    return found


class TestPlain(SearchContract):
    """The contract of all searches; the references enumerate CTC's paths."""

    def case(self, seed):
        torch.manual_seed(seed)
        ctc = CTC(VOCAB, DIM)
        torch.nn.init.normal_(ctc.ctc_lo.weight, std=1.0)
        return Case(ctc.eval(), torch.randn(5, DIM), TableLM(VOCAB - 2, seed))

    def search(self, case, beam_size):
        return CTCSearch(case.scorer, beam_size=beam_size, external_lm=case.external_lm)

    def exact(self, case, scales):
        paths = enumerate_paths(case.scorer, case.encoder_out, case.external_lm, scales)
        return {labels: (total, best) for labels, (total, best, _) in paths.items()}

    def greedy(self, case):
        best, labels = case.scorer.log_softmax(case.encoder_out[None])[0][:, :-1].max(-1)
        path = [label for label, _ in itertools.groupby(labels.tolist()) if label != 0]
        return tuple(label - 1 for label in path), float(best.sum())

    def alignment_score(self, case, labels, frames):
        scales = self.scales
        paths = enumerate_paths(case.scorer, case.encoder_out, case.external_lm, scales, frames)
        return paths[labels][1]

    test_at_most_so_many_labels_a_frame = None  # CTC: one


class TestFused(TestPlain):
    scales = FUSED
    test_beam_one_is_greedy = None  # greedy CTC is a search without LM and bonus


@pytest.mark.parametrize("scales", [PLAIN, FUSED], ids=["plain", "fused"])
def test_wide_beam_equals_enumeration(case, scales):
    ctc, encoder_out, lm = case
    exact = enumerate_paths(ctc, encoder_out, lm, scales)
    hyps = CTCSearch(ctc, beam_size=1000, external_lm=lm)(encoder_out, scales, nbest=1000)
    assert {h.labels for h in hyps} == set(exact)
    for hyp in hyps:
        total, _, frames = exact[hyp.labels]
        assert hyp.total == pytest.approx(total, abs=1e-4)
        assert hyp.frames == frames
        parts = hyp.acoustic + hyp.external_lm + hyp.bonus
        assert parts == pytest.approx(hyp.total, abs=1e-5)
        assert hyp.bonus == pytest.approx(scales.label_bonus * len(hyp.labels))


def test_score_is_the_ctc_loss(case):
    ctc, encoder_out, _ = case
    log_probs = ctc.log_softmax(encoder_out[None])[0]
    for hyp in CTCSearch(ctc, beam_size=1000)(encoder_out, nbest=20):
        loss = torch.nn.functional.ctc_loss(
            log_probs[:, None],
            torch.tensor([hyp.labels]) + 1,
            torch.tensor([len(encoder_out)]),
            torch.tensor([len(hyp.labels)]),
            reduction="none",
        )
        assert hyp.total == pytest.approx(-float(loss), abs=1e-4)


def test_beam_of_one_is_the_best_path(case):
    ctc, encoder_out, _ = case
    encoder_out = encoder_out.repeat(1, 1).repeat_interleave(2, dim=0)  # repetitions
    log_probs = ctc.log_softmax(encoder_out[None])[0][:, :-1]
    path = log_probs.argmax(-1).tolist()
    labels = [token - 1 for token, _ in itertools.groupby(path) if token != 0]
    (hyp,) = CTCSearch(ctc, beam_size=1)(encoder_out)
    assert list(hyp.labels) == labels
    assert hyp.total == pytest.approx(float(log_probs.max(-1).values.sum()), abs=1e-4)
    assert [path[f] - 1 for f in hyp.frames] == labels


@pytest.mark.parametrize("beam", [1, 4])
def test_chunks_equal_the_whole(case, beam):
    ctc, encoder_out, _ = case
    search = CTCSearch(ctc, beam_size=beam)
    state = search.start([PLAIN])
    for chunk in encoder_out.split(2):
        state = search.step(state, chunk)
    whole = search(encoder_out, nbest=beam)
    chunked = state.nbest(beam)[0]
    assert [(h.labels, h.frames) for h in chunked] == [(h.labels, h.frames) for h in whole]


@pytest.mark.parametrize("beam", [1, 4])
def test_a_step_leaves_the_state_before_it_as_it_was(case, beam):
    ctc, encoder_out, _ = case
    search = CTCSearch(ctc, beam_size=beam)
    before = search.step(search.start([PLAIN]), encoder_out[:2])
    first = before.nbest(beam)
    after = search.step(before, encoder_out[2:]).nbest(beam)
    assert before.nbest(beam) == first
    assert search.step(before, encoder_out[2:]).nbest(beam) == after


def test_lm_runs_once_per_prefix():
    torch.manual_seed(0)
    ctc = CTC(8, DIM).eval()
    torch.nn.init.normal_(ctc.ctc_lo.weight, std=1.0)
    lm = TableLM(6)
    search = CTCSearch(ctc, beam_size=4, external_lm=lm)
    search(torch.randn(30, DIM), FUSED)
    assert len(lm.extended) == len(set(lm.extended)) > 20


def test_scores_that_are_not_numbers_are_an_error(case):
    ctc, encoder_out, _ = case
    encoder_out[2, 0] = float("nan")
    with pytest.raises(SearchError, match="frame 2"):
        CTCSearch(ctc, beam_size=4)(encoder_out)
