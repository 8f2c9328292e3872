"""Scores of hypotheses under any alpha, and of the LMs: each as if it were alone."""

import numpy as np
import pytest
import torch

from espnet_llm_plugin.transducer import unweighted_scores
from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.loss import factorized_rnnt_loss
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.contracts.search_contract import TableLM
from tests.transducer import tiny

HYPOTHESES = [(1, 2, 3), (1, 2), (), (4, 0, 0, 1), (1, 2, 0)]
ALPHAS = [0.0, 0.4, 1.0]


def tree_of(model, external_lm=None):
    scorer = build_scorer(model)
    return PrefixTree(scorer.prefixes(), scorer.num_labels, external_lm)


def alone(model, encoder_out, labels, alpha):
    """log P of one hypothesis at one alpha by the loss."""
    decoder = model.decoder
    targets = torch.tensor([labels], dtype=torch.long).reshape(1, -1)
    frames, lengths = torch.tensor([len(encoder_out)]), torch.tensor([len(labels)])
    factors = decoder(encoder_out[None], frames, targets, lengths)
    options = dict(lm_scale=alpha, blank_norm=decoder.blank_norm)
    return -float(factorized_rnnt_loss(*factors, targets, frames, lengths, **options))


@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
@pytest.mark.parametrize("lm_scores", [4_000_000, 60])  # all at once, or two at a time
def test_factorized_log_probs(blank_norm, predictor, lm_scores, monkeypatch):
    monkeypatch.setattr(unweighted_scores, "_LM_SCORES", lm_scores)
    model = tiny.factorized(predictor=predictor, blank_norm=blank_norm).eval()
    encoder_out = torch.randn(6, tiny.DIM)
    found = unweighted_scores.factorized_log_probs(
        model.decoder, encoder_out, HYPOTHESES, ALPHAS, tree_of(model)
    )
    with torch.no_grad():
        slow = [[alone(model, encoder_out, hyp, alpha) for hyp in HYPOTHESES] for alpha in ALPHAS]
    np.testing.assert_allclose(found, slow, atol=1e-4)
    assert np.ptp(found, axis=0).max() > 1e-2  # alpha has an effect
    none = unweighted_scores.factorized_log_probs(
        model.decoder, encoder_out, [], ALPHAS, tree_of(model)
    )
    assert none.shape == (3, 0)


def test_factorized_log_probs_are_those_of_a_wide_search():
    model = tiny.factorized(predictor="lstm").eval()
    encoder_out = torch.randn(4, tiny.DIM)
    search = TransducerSearch(build_scorer(model), beam_size=400, max_symbols_per_frame=7)
    state = search.start([Scales(alpha=0.3)])
    state = search.step(state, encoder_out)
    hyps = state.nbest(5)[0]
    labels = [hyp.labels for hyp in hyps]
    calls = state.tree.num_predictor
    found = unweighted_scores.factorized_log_probs(
        model.decoder, encoder_out, labels, [0.3], state.tree
    )
    searched = np.array([hyp.acoustic for hyp in hyps])
    assert (found[0] >= searched - 1e-4).all()  # the search has pruned alignments
    np.testing.assert_allclose(found[0], searched, atol=2e-2)
    assert state.tree.num_predictor == calls  # nothing new to compute


def test_lm_log_probs_of_a_predictor_are_teacher_forced():
    model = tiny.factorized(predictor="lstm").eval()
    found = unweighted_scores.lm_log_probs(tree_of(model), HYPOTHESES)
    with torch.no_grad():
        for labels, score in zip(HYPOTHESES, found):
            rows = model.decoder.predictor(torch.tensor([labels], dtype=torch.long).reshape(1, -1))
            slow = sum(float(rows[0, u, label]) for u, label in enumerate(labels))
            assert score == pytest.approx(slow, abs=1e-4)


def test_external_lm_log_probs():
    model = tiny.rnnt().eval()
    labels = build_scorer(model).num_labels
    lm = TableLM(labels, 3)
    found = unweighted_scores.external_lm_log_probs(tree_of(model, lm), HYPOTHESES)
    slow = [sum(float(lm.row(hyp[:u])[label]) for u, label in enumerate(hyp)) for hyp in HYPOTHESES]
    assert found == pytest.approx(slow, abs=1e-4)
