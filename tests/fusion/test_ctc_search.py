"""CTC prefix search: against enumeration of all paths, torch's CTC loss, and greedy decoding."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from espnet2.asr.ctc import CTC

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_search import CTCSearch
from espnet_llm_plugin.fusion.delayed import Fusion
from espnet_llm_plugin.transducer.hypothesis import Scales, SearchError
from tests.contracts.search_contract import Case, SearchContract, TableLM
from tests.fusion.simple_ctc_search import simple_search

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


# ------------------------------------------------------------- against a search of dictionaries


class FixedPrior(NamedTuple):
    mode: str
    log_prior: torch.Tensor


def peaky(seed, vocab=9, frames=24):
    """Posteriors as a trained model's: blanks, and now and then one or a few likely labels."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(frames, vocab)) * 2.0
    logits[:, 0] += np.where(random.random(frames) < 0.6, 7.0, -1.0)
    logits[:, -1] -= 20.0  # never emitted
    return torch.from_numpy(logits).float().log_softmax(-1)


class Identity:
    """A CTC module whose encoder outputs are log-probs."""

    def __init__(self, vocab):
        self.ctc_lo = torch.nn.Linear(1, vocab)

    def log_softmax(self, encoder_out):
        return encoder_out


def compare(hyps, expected):
    """The same prefixes with the same scores, but for ties at the edge of the beam."""
    found = {hyp.labels: hyp.total for hyp in hyps}
    assert set(found) == set(expected)
    for labels, total in expected.items():
        assert found[labels] == pytest.approx(total, abs=1e-5), labels


OPTIONS = {
    "plain": (Scales(), {}),
    "bonus": (Scales(label_bonus=0.8), dict(bonus=0.8)),
    "lm": (Scales(lm_weight=0.5, label_bonus=0.5), dict(lm_weight=0.5, bonus=0.5)),
    "negative_lm": (Scales(lm_weight=-0.3), dict(lm_weight=-0.3)),
    "prior": (
        Scales(lm_weight=0.5, prior_weight=0.3),
        dict(lm_weight=0.5, prior_weight=0.3),
    ),
}


@pytest.mark.parametrize("recombination", ["sum", "max"])
@pytest.mark.parametrize("beam", [1, 2, 5, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_simple_search(name, beam, recombination):
    """The exact skipping of frames and labels leaves out nothing."""
    scales, options = OPTIONS[name]
    if beam == 1 and name == "plain":
        pytest.skip("the best path, not a prefix search")
    prior = None
    if name == "prior":
        prior = FixedPrior("label", torch.randn(9, generator=torch.Generator().manual_seed(3)))
        options = {**options, "prior": prior.log_prior[1:-1].double().numpy()}
    for seed in range(5):
        log_probs, lm = peaky(seed), TableLM(7, seed)
        with_lm = lm if scales.lm_weight else None
        search = CTCSearch(
            Identity(9),
            beam_size=beam,
            external_lm=with_lm,
            fusion=Fusion(prior, end=with_lm is not None),
            recombination=recombination,
        )
        hyps = search(log_probs, scales, nbest=beam)
        combine = np.logaddexp if recombination == "sum" else np.maximum
        expected = simple_search(log_probs.numpy(), beam, lm=with_lm, combine=combine, **options)
        compare(hyps, expected)
        for hyp in hyps:
            parts = hyp.acoustic + hyp.external_lm + hyp.bonus + hyp.prior
            assert parts == pytest.approx(hyp.total, abs=1e-6)


def test_prior_of_frames_is_subtracted_from_every_frame():
    log_prior = torch.randn(9, generator=torch.Generator().manual_seed(3))
    search = CTCSearch(
        Identity(9), beam_size=6, fusion=Fusion(FixedPrior("frame", log_prior), False)
    )
    for seed in range(4):
        log_probs = peaky(seed)
        hyps = search(log_probs, Scales(prior_weight=0.4), nbest=6)
        compare(hyps, simple_search((log_probs - 0.4 * log_prior).numpy(), 6))


def test_batch_equals_each_alone():
    """Of different lengths, with different settings side by side."""
    settings = [Scales(), Scales(lm_weight=0.7, label_bonus=1.0), Scales(lm_weight=0.2)]
    lengths = [24, 0, 9, 1, 17]
    utterances = [peaky(seed, frames=max(n, 1)) for seed, n in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=-1.0)
    for beam in (2, 6):
        search = CTCSearch(Identity(9), beam_size=beam, external_lm=TableLM(7))
        state = search.start(settings, utterances=len(lengths))
        lists = search.step(state, padded, torch.tensor(lengths)).nbest(beam)
        for i, (one, length) in enumerate(zip(utterances, lengths)):
            for g, scales in enumerate(settings):
                alone = search(one[:length], scales, nbest=beam)
                together = lists[i * len(settings) + g]
                assert [h.labels for h in together] == [h.labels for h in alone]
                assert [h.frames for h in together] == [h.frames for h in alone]
                assert [h.total for h in together] == pytest.approx([h.total for h in alone])


def test_batches_of_best_paths_in_chunks():
    lengths = [24, 5, 17]
    utterances = [peaky(seed, frames=n) for seed, n in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=-1.0)
    search = CTCSearch(Identity(9), beam_size=1)
    state = search.start([Scales()], utterances=3)
    for first in range(0, 24, 7):
        count = (torch.tensor(lengths) - first).clamp(0, 7)
        state = search.step(state, padded[:, first : first + 7], count)
    for one, (hyp,) in zip(utterances, state.nbest(1)):
        (alone,) = search(one)
        assert (hyp.labels, hyp.frames) == (alone.labels, alone.frames)
        assert hyp.total == pytest.approx(alone.total)


def test_few_labels_of_a_frame_are_enough_where_they_hold_the_probability():
    log_probs = peaky(1, vocab=40, frames=40)
    every = CTCSearch(Identity(40), beam_size=4)(log_probs)[0]
    few = CTCSearch(Identity(40), beam_size=4, top_labels=3)(log_probs)[0]
    assert few.labels == every.labels
    one = CTCSearch(Identity(40), beam_size=4, top_labels=1)(log_probs, nbest=4)
    best = set((log_probs[:, 1:-1].argmax(-1)).tolist())
    assert all(set(hyp.labels) <= best for hyp in one)


def test_lm_is_not_asked_where_no_label_can_survive():
    """A frame that is blank for certain costs nothing."""
    log_probs = peaky(0, frames=40)
    silence = torch.full((200, 9), -30.0)
    silence[:, 0] = -1e-6
    calls = []
    for frames in (log_probs, torch.cat([log_probs, silence])):
        lm = TableLM(7)
        CTCSearch(Identity(9), beam_size=4, external_lm=lm)(frames, Scales(lm_weight=0.5))
        calls.append(len(lm.extended))
    # The end of the sentence asks once more, for the hypotheses that are left.
    assert calls[0] == calls[1] > 0


def test_memory_is_bounded():
    torch.manual_seed(0)
    log_probs = torch.randn(200, 9).log_softmax(-1)
    scales = Scales(lm_weight=0.3)
    plain = CTCSearch(Identity(9), beam_size=4, external_lm=TableLM(7))
    small = CTCSearch(Identity(9), beam_size=4, external_lm=TableLM(7), max_bytes=2_000)
    state = small.step(small.start([scales]), log_probs)
    assert state.nbest(4)[0] == plain(log_probs, scales, nbest=4)
    whole = plain.step(plain.start([scales]), log_probs).tree
    assert len(state.tree) < len(whole) / 2


@pytest.mark.parametrize("options", [dict(recombination="mean"), dict(top_labels=0)])
def test_bad_options_are_refused(options):
    with pytest.raises(UserError):
        CTCSearch(Identity(9), **options)
