"""ESPnet's beam searches with our CTC scorer in the place of ESPnet's."""

import pytest
import torch
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.beam_search import BeamSearch
from espnet.nets.scorers.ctc import CTCPrefixScorer as ESPnetScorer
from espnet.nets.scorers.length_bonus import LengthBonus
from espnet2.asr.ctc import CTC
from espnet2.lm.seq_rnn_lm import SequentialRNNLM

from espnet_llm_plugin.fusion.ctc_partial_scorer import CTCPartialScorer

VOCAB = 14


@pytest.fixture
def models():
    torch.manual_seed(1)
    ctc = CTC(VOCAB, encoder_output_size=6).eval()
    with torch.no_grad():
        ctc.ctc_lo.weight.mul_(8.0)
    return ctc, SequentialRNNLM(VOCAB, unit=8, nlayers=1, rnn_type="lstm").eval()


def search(kind, ctc_scorer, lm, pre_beam, weight=0.5):
    scorers = {"ctc": ctc_scorer, "lm": lm, "bonus": LengthBonus(VOCAB)}
    return kind(
        scorers=scorers,
        weights={"ctc": weight, "lm": 0.5, "bonus": 0.4},
        beam_size=4,
        vocab_size=VOCAB,
        sos=VOCAB - 1,
        eos=VOCAB - 1,
        pre_beam_score_key="full" if pre_beam else None,
    ).eval()


def utterance(frames=25, seed=0):
    return torch.randn(frames, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pre_beam", [True, False])
@pytest.mark.parametrize("kind", [BatchBeamSearch, BeamSearch])
def test_same_hypotheses_and_scores_as_with_espnets(models, kind, pre_beam):
    ctc, lm = models
    lengths = set()
    for seed in range(3):
        x = utterance(seed=seed)
        with torch.no_grad():
            theirs = search(kind, ESPnetScorer(ctc, VOCAB - 1), lm, pre_beam)(x)
            ours = search(kind, CTCPartialScorer(ctc, VOCAB - 1), lm, pre_beam)(x)
        assert [hyp.yseq.tolist() for hyp in ours] == [hyp.yseq.tolist() for hyp in theirs]
        for ours_one, theirs_one in zip(ours, theirs):
            assert float(ours_one.score) == pytest.approx(float(theirs_one.score), abs=1e-4)
            expected = float(theirs_one.scores["ctc"])
            assert float(ours_one.scores["ctc"]) == pytest.approx(expected, abs=1e-4)
        lengths.add(len(ours[0].yseq))
    assert max(lengths) > 5


def test_all_labels_kept_and_no_frame_merged_change_nothing(models):
    ctc, lm = models
    x = utterance()
    options = dict(top_k=VOCAB - 2, compress_threshold=1.0)
    with torch.no_grad():
        plain = search(BatchBeamSearch, CTCPartialScorer(ctc, VOCAB - 1), lm, False)(x)
        scorer = CTCPartialScorer(ctc, VOCAB - 1, **options)
        reduced = search(BatchBeamSearch, scorer, lm, False)(x)
    assert [hyp.yseq.tolist() for hyp in reduced] == [hyp.yseq.tolist() for hyp in plain]


def test_reduced_labels_are_the_only_ones_found(models):
    ctc, lm = models
    x = utterance()
    scorer = CTCPartialScorer(ctc, VOCAB - 1, top_k=3, compress_threshold=0.6)
    with torch.no_grad():
        hyps = search(BatchBeamSearch, scorer, lm, False)(x)
    assert scorer.scorer.lengths[0] < 25
    kept = set(scorer.scorer.labels[0].tolist())
    assert len(kept) == 5
    best = hyps[0].yseq.tolist()[1:-1]
    assert best and set(best) <= kept


def test_a_weight_of_zero_leaves_finite_scores(models):
    ctc, lm = models
    scorer = CTCPartialScorer(ctc, VOCAB - 1, top_k=3)
    with torch.no_grad():
        state = scorer.batch_init_state(utterance())
        scores, _ = scorer.batch_score_partial(None, None, [state], None)
    assert scores.shape == (1, VOCAB)
    assert torch.isfinite(scores).all()
    assert int((scores == -1e10).sum()) == VOCAB - 4


def test_hypotheses_of_different_steps_in_one_batch(models):
    scorer = CTCPartialScorer(models[0], VOCAB - 1)
    with torch.no_grad():
        start = scorer.batch_init_state(utterance())
        _, first = scorer.batch_score_partial(None, None, [start], None)
        _, second = scorer.batch_score_partial(None, None, [start], None)
        chosen = [(first, 3), (second, 5), (first, 7)]
        states = [scorer.select_state(scored, 0, label) for scored, label in chosen]
        together, _ = scorer.batch_score_partial(None, None, states, None)
        for row, state in zip(together, states):
            alone, _ = scorer.batch_score_partial(None, None, [state], None)
            torch.testing.assert_close(row, alone[0])
    assert (together[0] - together[1]).abs().max() > 0.1
