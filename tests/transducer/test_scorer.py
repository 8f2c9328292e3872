"""What searches see of a model: the same numbers as its training lattice."""

import pytest
import torch

from espnet_llm_plugin.transducer.joint import posterior
from espnet_llm_plugin.transducer.scorer import FactorizedScorer, RNNTScorer, build_scorer
from tests.transducer.tiny import DIM, LABELS, VOCAB, batch, factorized, rnnt, save_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


def models(llm):
    yield factorized(predictor="stateless", blank_norm="softmax")
    yield factorized(predictor="lstm", lm_scale=0.6)
    yield factorized(predictor="llm", predictor_conf={"llm": llm})
    yield rnnt()
    yield rnnt(rnn_type="gru", layers=2, acoustic_residual=True)


def lattice_nll(scorer, encoder_out, labels):
    """-log of the sum over alignments of one utterance, cell by cell from the scorer."""
    scorer.begin(encoder_out)
    prefixes = [scorer.root()]
    for label in labels:
        prefixes += scorer.extend([prefixes[-1]], [label])
    alpha = torch.full((len(labels) + 1,), -torch.inf, dtype=torch.double)
    for t in range(len(encoder_out)):
        blank, label_scores, _ = scorer.scores(t, prefixes)
        if t == 0:
            alpha[0] = 0.0
        for u, label in enumerate(labels):
            alpha[u + 1] = torch.logaddexp(alpha[u + 1], alpha[u] + label_scores[u, label])
        alpha = alpha + blank
    return -alpha[-1]


def test_search_and_training_have_the_same_likelihood(llm):
    speech, lengths, text, text_lengths = batch()
    for model in models(llm):
        model.eval()
        scorer = build_scorer(model)
        expected = model.utterance_nll(speech, lengths, text, text_lengths)
        with torch.no_grad():
            encoder_out, frames = model.encode(speech, lengths)
        for i in range(len(speech)):
            labels = (text[i, : text_lengths[i]] - 1).tolist()
            actual = lattice_nll(scorer, encoder_out[i, : frames[i]], labels)
            torch.testing.assert_close(actual.float(), expected[i], atol=1e-4, rtol=1e-5)


def test_scores_are_normalised(llm):
    for model in models(llm):
        scorer = build_scorer(model.eval())
        scorer.begin(torch.randn(3, DIM))
        root = scorer.root()
        prefixes = [root, *scorer.extend([root, root], [2, 0])]
        blank, labels, lm = scorer.scores(1, prefixes)
        assert blank.shape == (3,) and labels.shape == (3, scorer.num_labels)
        total = torch.logaddexp(blank, labels.logsumexp(-1))
        torch.testing.assert_close(total, torch.zeros(3), atol=1e-5, rtol=0)
        assert not labels.requires_grad
        if isinstance(scorer, RNNTScorer):
            assert lm is None and scorer.num_labels == VOCAB - 1
        else:
            assert scorer.num_labels == LABELS
            torch.testing.assert_close(lm.logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)


def test_alpha_may_change_while_prefixes_stay():
    model = factorized(predictor="lstm", lm_scale=0.6, alpha=0.9).eval()
    scorer = FactorizedScorer(model)
    assert scorer.alpha == 0.9
    encoder_out = torch.randn(3, DIM)
    scorer.begin(encoder_out)
    prefix = scorer.extend([scorer.root()], [1])
    for alpha in (0.0, 0.3):
        scorer.alpha = alpha
        fresh = FactorizedScorer(model, alpha=alpha)
        fresh.begin(encoder_out)
        expected = fresh.scores(2, fresh.extend([fresh.root()], [1]))
        for actual, other in zip(scorer.scores(2, prefix), expected):
            torch.testing.assert_close(actual, other)
    # beta's log-probabilities are the predictor's, whatever alpha is
    torch.testing.assert_close(
        scorer.scores(2, prefix)[2], model.decoder.predictor(torch.tensor([[1]]))[:, 1]
    )


def test_prefixes_outlive_an_utterance(llm):
    first, second = torch.randn(3, DIM), torch.randn(4, DIM)
    for model in models(llm):
        scorer = build_scorer(model.eval())
        scorer.begin(first)
        prefixes = scorer.extend([scorer.root()] * 2, [3, 4])
        before = scorer.scores(2, prefixes)[1]
        scorer.begin(second)
        assert (scorer.scores(2, prefixes)[1] - before).abs().max() > 1e-4
        scorer.begin(first)
        torch.testing.assert_close(scorer.scores(2, prefixes)[1], before)


def test_prefixes_are_extended_in_one_call(monkeypatch):
    model = factorized(predictor="lstm").eval()
    scorer = FactorizedScorer(model)
    calls = []
    original = model.decoder.predictor.extend

    def extend(labels, states):
        calls.append(labels.tolist())
        return original(labels, states)

    monkeypatch.setattr(model.decoder.predictor, "extend", extend)
    root = scorer.root()
    (one,) = scorer.extend([root], [1])
    together = scorer.extend([root, one, one], [2, 0, 4])
    assert calls == [[1], [2, 0, 4]]
    assert scorer.extend([], []) == []
    alone = [scorer.extend([parent], [label])[0] for parent, label in ((one, 0), (root, 2))]
    torch.testing.assert_close(together[1].lm, alone[0].lm)
    torch.testing.assert_close(together[0].blank, alone[1].blank)


def test_frame_parts_are_those_of_the_decoder():
    model = factorized(predictor="lstm").eval()
    scorer = FactorizedScorer(model, alpha=0.5)
    encoder_out = torch.randn(3, DIM)
    scorer.begin(encoder_out)
    blank, labels, lm = scorer.scores(2, [scorer.root()])
    with torch.no_grad():
        acoustic, acoustic_blank = model.decoder.acoustic(encoder_out[2])
        z = acoustic_blank + model.decoder.blank.join(
            model.decoder.blank.project(encoder_out[2]),
            model.decoder.blank.predict(torch.tensor(0)),
        )
        expected = posterior(acoustic, lm[0], z, 0.5, "sigmoid")
    torch.testing.assert_close((blank[0], labels[0]), expected)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="not a transducer of this package: Linear"):
        build_scorer(torch.nn.Linear(1, 1))
