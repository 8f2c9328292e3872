"""What searches see of a model: the same numbers as its training lattice."""

import numpy as np
import pytest
import torch

from espnet_llm_plugin.transducer.factorized_scorer import FactorizedScorer
from espnet_llm_plugin.transducer.joint import posterior
from espnet_llm_plugin.transducer.llm_predictor import LLMPredictor
from espnet_llm_plugin.transducer.predictors import LSTMPredictor
from espnet_llm_plugin.transducer.prefix_tree import ROOT
from espnet_llm_plugin.transducer.rnnt_scorer import RNNTPool, RNNTScorer, rnn_step
from espnet_llm_plugin.transducer.scorer import build_scorer
from tests.contracts.search_contract import OneByOne
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


def cells_of(scorer, pool, encoder_out, at, alpha=None):
    """Cells of (utterance, frame, node, last label) entries."""
    utterance, frame, nodes, last = (np.array(column) for column in zip(*at))
    alpha = torch.full((len(at),), scorer.alpha if alpha is None else alpha)
    frames = scorer.frames(encoder_out)
    where = torch.from_numpy(utterance), torch.from_numpy(frame)
    return scorer.cells(frames, *where, pool, nodes, last, alpha)


def pool_with(scorer, *prefixes):
    """A pool with nodes 1, 2, ... for (parent, label) pairs, computed one by one."""
    pool = scorer.prefixes()
    for node, (parent, label) in enumerate(prefixes, 1):
        pool.compute(np.array([node]), np.array([parent]), np.array([label]))
    return pool


def lattice_nll(scorer, encoder_out, labels):
    """-log of the sum over alignments of one utterance, cell by cell from the scorer."""
    one = OneByOne(scorer, encoder_out)
    alpha = torch.full((len(labels) + 1,), -torch.inf, dtype=torch.double)
    for t in range(len(encoder_out)):
        rows = [one.scores(t, labels[:u]) for u in range(len(labels) + 1)]
        if t == 0:
            alpha[0] = 0.0
        for u, label in enumerate(labels):
            alpha[u + 1] = torch.logaddexp(alpha[u + 1], alpha[u] + rows[u][1][label])
        alpha = alpha + torch.tensor([blank for blank, _ in rows])
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


def test_scores_are_normalised_and_below_the_ceiling(llm):
    for model in models(llm):
        scorer = build_scorer(model.eval())
        pool = pool_with(scorer, (ROOT, 2), (ROOT, 0))
        at = [(1, 2, ROOT, -1), (0, 1, 1, 2), (1, 0, 2, 0)]
        cells = cells_of(scorer, pool, torch.randn(2, 3, DIM), at)
        labels = cells.labels(torch.arange(3))
        assert cells.blank.shape == (3,) and labels.shape == (3, scorer.num_labels)
        total = torch.logaddexp(cells.blank, labels.logsumexp(-1))
        torch.testing.assert_close(total, torch.zeros(3), atol=1e-5, rtol=0)
        assert (labels.amax(1) <= cells.ceiling + 1e-6).all()
        torch.testing.assert_close(cells.labels(torch.tensor([2, 0])), labels[[2, 0]])
        lm = pool.lm(np.array([ROOT, 2]))
        torch.testing.assert_close(lm.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
        assert not (labels.requires_grad or lm.requires_grad)
        expected = VOCAB - 1 if isinstance(scorer, RNNTScorer) else LABELS
        assert scorer.num_labels == expected


def test_every_cell_is_that_of_its_utterance_frame_and_prefix(llm):
    encoder_out = torch.randn(2, 4, DIM)
    for model in models(llm):
        scorer = build_scorer(model.eval())
        pool = pool_with(scorer, (ROOT, 3), (1, 0))
        at = [(0, 1, 2, 0), (1, 3, 1, 3), (1, 1, ROOT, -1), (0, 1, 1, 3)]
        together = cells_of(scorer, pool, encoder_out, at)
        for i, entry in enumerate(at):
            alone = cells_of(scorer, pool, encoder_out[entry[0]][None], [(0, *entry[1:])])
            torch.testing.assert_close(together.blank[i], alone.blank[0])
            torch.testing.assert_close(
                together.labels(torch.tensor([i])), alone.labels(torch.tensor([0]))
            )


def test_alpha_belongs_to_a_cell():
    model = factorized(predictor="lstm", lm_scale=0.6, alpha=0.9).eval()
    scorer = FactorizedScorer(model)
    assert scorer.alpha == 0.9 and FactorizedScorer(model, alpha=0.2).alpha == 0.2
    pool = pool_with(scorer, (ROOT, 1))
    encoder_out = torch.randn(1, 3, DIM)
    frames = scorer.frames(encoder_out)
    alphas = torch.tensor([0.0, 0.3, 0.9])
    at = torch.zeros(3, dtype=torch.long), torch.full((3,), 2)
    node = np.array([1, 1, 1])
    labels = scorer.cells(frames, *at, pool, node, node, alphas).labels(torch.arange(3))
    for alpha, row in zip(alphas.tolist(), labels):
        alone = cells_of(scorer, pool, encoder_out, [(0, 2, 1, 1)], alpha)
        torch.testing.assert_close(alone.labels(torch.tensor([0]))[0], row)
    assert (labels[0] - labels[2]).abs().max() > 1e-3
    # beta's log-probabilities are the predictor's, whatever alpha is
    with torch.no_grad():
        expected = model.decoder.predictor(torch.tensor([[1]]))[:, 1]
    torch.testing.assert_close(pool.lm(np.array([1])), expected)


def test_prefixes_are_computed_in_one_call_and_reused(monkeypatch):
    model = factorized(predictor="lstm").eval()
    scorer = FactorizedScorer(model)
    calls = []
    original = model.decoder.predictor.extend

    def extend(labels, states):
        calls.append(labels.tolist())
        return original(labels, states)

    monkeypatch.setattr(model.decoder.predictor, "extend", extend)
    pool = pool_with(scorer, (ROOT, 1))
    pool.compute(np.array([2, 3, 4]), np.array([ROOT, 1, 1]), np.array([2, 0, 4]))
    assert calls == [[1], [2, 0, 4]]
    alone = pool_with(scorer, (ROOT, 1), (1, 0))
    torch.testing.assert_close(pool.lm(np.array([3])), alone.lm(np.array([2])))


def test_freed_numbers_serve_other_prefixes(llm):
    for model in models(llm):
        scorer = build_scorer(model.eval())
        pool = pool_with(scorer, (ROOT, 1), (1, 2))
        pool.free([2])
        pool.compute(np.array([2]), np.array([ROOT]), np.array([3]))
        fresh = pool_with(scorer, (ROOT, 3))
        torch.testing.assert_close(pool.lm(np.array([2])), fresh.lm(np.array([1])))


def test_a_large_vocabulary_is_not_tabulated(monkeypatch):
    model = factorized(predictor="stateless").eval()
    encoder_out, at = torch.randn(1, 2, DIM), [(0, 0, ROOT, -1), (0, 1, 1, 3)]
    tabulated = FactorizedScorer(model)
    expected = cells_of(tabulated, pool_with(tabulated, (ROOT, 3)), encoder_out, at).blank
    monkeypatch.setattr("espnet_llm_plugin.transducer.factorized_scorer.MAX_TABLE", 0)
    scorer = FactorizedScorer(model)
    actual = cells_of(scorer, pool_with(scorer, (ROOT, 3)), encoder_out, at).blank
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_one_step_equals_espnets_decoder(rnn_type):
    decoder = rnnt(rnn_type=rnn_type, layers=3).decoder.eval()
    embedded = torch.randn(2, 4, decoder.dunits)
    hidden = cell = torch.zeros(2, 3, decoder.dunits)
    with torch.no_grad():
        expected, (last, _) = decoder.rnn_forward(embedded, decoder.init_state(2))
        for t in range(4):
            output, hidden, cell = rnn_step(decoder.decoder, embedded[:, t], hidden, cell)
            torch.testing.assert_close(output, expected[:, t])
    torch.testing.assert_close(hidden.transpose(0, 1), last)


def test_internal_lm_of_an_rnnt_is_its_joint_without_the_encoder():
    model = rnnt(layers=2).eval()
    scorer = build_scorer(model)
    pool = pool_with(scorer, (ROOT, 1), (1, 3))
    tokens = torch.tensor([[0, 2, 4]])
    with torch.no_grad():
        hidden = model.joint_network.lin_dec(model.decoder(tokens)[0, -1])
        logits = model.joint_network.lin_out(model.joint_network.joint_activation(hidden))
    torch.testing.assert_close(pool.lm(np.array([2]))[0], logits[1:].log_softmax(-1))


def test_frame_parts_are_those_of_the_decoder():
    model = factorized(predictor="lstm").eval()
    scorer = FactorizedScorer(model, alpha=0.5)
    encoder_out = torch.randn(1, 3, DIM)
    pool = scorer.prefixes()
    cells = cells_of(scorer, pool, encoder_out, [(0, 2, ROOT, -1)])
    with torch.no_grad():
        acoustic, acoustic_blank = model.decoder.acoustic(encoder_out[0, 2])
        z = acoustic_blank + model.decoder.blank.join(
            model.decoder.blank.project(encoder_out[0, 2]),
            model.decoder.blank.predict(torch.tensor(0)),
        )
        expected = posterior(acoustic, pool.lm(np.array([ROOT]))[0], z, 0.5, "sigmoid")
    actual = cells.blank[0], cells.labels(torch.tensor([0]))[0]
    torch.testing.assert_close(actual, expected)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="not a transducer of this package: Linear"):
        build_scorer(torch.nn.Linear(1, 1))


def test_memory_of_a_prefix(llm):
    for model in models(llm):
        pool = build_scorer(model.eval()).prefixes()
        rows = sum(rows[0].nbytes for rows in pool._rows._rows.values())
        if isinstance(pool, RNNTPool):
            states = 0  # in its rows
            assert rows == 4 * (model.joint_network.lin_dec.out_features + 2 * pool_width(model))
        else:
            assert rows == 4 * LABELS
            states = predictor_bytes(model.decoder.predictor)
        assert pool.bytes_per_prefix == rows + states


def pool_width(model):
    return model.decoder.dlayers * model.decoder.dunits


def predictor_bytes(predictor):
    """Of the state of one prefix: a token's keys and values, an LSTM's hidden and cell state."""
    if isinstance(predictor, LLMPredictor):
        config = predictor.llm.config
        width = config.num_key_value_heads * config.head_dim
        return 4 * 2 * config.num_hidden_layers * width
    if isinstance(predictor, LSTMPredictor):
        lstm = predictor.lstm
        return 4 * lstm.num_layers * (lstm.hidden_size + (lstm.proj_size or lstm.hidden_size))
    return 0
