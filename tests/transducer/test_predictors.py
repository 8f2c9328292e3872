import copy
import pickle

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import backbone
from espnet_llm_plugin.transducer.llm_predictor import LLMPredictor
from espnet_llm_plugin.transducer.predictors import (
    LSTMPredictor,
    StatelessPredictor,
    build_predictor,
)
from tests.contracts.predictor_contract import PredictorContract
from tests.transducer.tiny import LABELS, TOKENS, save_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def loads(monkeypatch):
    """The LLM directories whose weights were loaded during the test."""
    loaded = []
    original = backbone.load_causal_lm

    def load(name, **kwargs):
        loaded.append(str(name))
        return original(name, **kwargs)

    monkeypatch.setattr(backbone, "load_causal_lm", load)
    return loaded


class TestStateless(PredictorContract):
    @pytest.fixture
    def predictor(self):
        return StatelessPredictor(LABELS, embed_dim=6)

    def test_sees_one_label(self, predictor):
        scores = predictor(torch.tensor([[0, 3, 2], [4, 1, 2]]))
        torch.testing.assert_close(scores[0, 3], scores[1, 3])


class TestLSTM(PredictorContract):
    @pytest.fixture(params=[dict(num_layers=1), dict(num_layers=2, proj_dim=3, dropout=0.5)])
    def predictor(self, request):
        return LSTMPredictor(LABELS, embed_dim=5, hidden_dim=7, **request.param)

    def test_sees_the_whole_history(self, predictor):
        scores = predictor(torch.tensor([[0, 3, 2], [4, 1, 2]]))
        assert (scores[0, 3] - scores[1, 3]).abs().max() > 1e-4


class TestLLM(PredictorContract):
    tolerance = 1e-4

    @pytest.fixture
    def predictor(self, llm):
        return LLMPredictor(LABELS, llm=llm)

    def test_is_the_llm_renormalised_over_labels(self, predictor, llm):
        from transformers import AutoModelForCausalLM

        labels = torch.tensor([[0, 4, 2]])
        logits = AutoModelForCausalLM.from_pretrained(llm)(torch.tensor([[6, 1, 5, 3]])).logits
        probs = logits.softmax(-1)[0, :, 1:-1]
        expected = (probs / probs.sum(-1, keepdim=True)).log()
        torch.testing.assert_close(predictor(labels)[0], expected, atol=1e-5, rtol=1e-5)

    def test_computes_each_prefix_once(self, predictor):
        _, root = predictor.start(torch.device("cpu"))
        _, states = predictor.extend(torch.tensor([1, 2]), [root, root])
        predictor.extend(torch.tensor([1, 2, 3]), [states[0], states[1], root])
        assert predictor._prefix_lm.num_token_forwards == 6
        assert predictor._prefix_lm.num_forwards == 3

    def test_dtype(self, llm):
        half = LLMPredictor(LABELS, llm=llm, dtype="bfloat16")
        labels = torch.tensor([[0, 4, 2]])
        scores = half(labels)
        assert half.llm.model().dtype == torch.bfloat16 and scores.dtype == torch.float32
        exact = LLMPredictor(LABELS, llm=llm)(labels)
        assert 1e-6 < (scores - exact).abs().max() < 0.2


class TestLLMBeyondItsContext(PredictorContract):
    """Teacher-forced and stepwise scores are cut in the same places."""

    tolerance = 1e-4

    @pytest.fixture(scope="class")
    def short(self, tmp_path_factory):
        return save_llm(tmp_path_factory.mktemp("llm"), max_position_embeddings=4)

    @pytest.fixture
    def predictor(self, short):
        return LLMPredictor(LABELS, llm=short)

    def test_far_labels_are_not_seen_and_near_ones_are(self, predictor):
        scores = predictor(torch.tensor([[0, 3, 2, 1, 4, 2], [4, 3, 2, 1, 4, 2]]))
        near = (scores[0] - scores[1]).abs().amax(1) > 1e-4
        assert near.tolist() == [False, True, True, True, False, False, False]


def test_llm_is_loaded_at_first_use_and_never_saved(llm, loads):
    predictor = LLMPredictor(LABELS, llm=llm)
    assert list(predictor.parameters()) == []
    assert list(predictor.state_dict()) == ["identity.fingerprint"]
    copied = copy.deepcopy(predictor)
    pickled = pickle.dumps(predictor)
    assert loads == []
    labels = torch.tensor([[1, 2]])
    scores = predictor(labels)
    predictor.start(torch.device("cpu"))
    torch.testing.assert_close(copied(labels), scores)
    assert len(loads) == 1  # a copy shares the LLM
    assert not scores.requires_grad
    torch.testing.assert_close(pickle.loads(pickled)(labels), scores)
    assert len(pickled) < 100_000 and len(pickle.dumps(predictor)) < 100_000


def test_another_llm_is_refused(llm, tmp_path):
    other = LLMPredictor(LABELS, llm=save_llm(tmp_path, seed=1))
    predictor = LLMPredictor(LABELS, llm=llm)
    predictor.load_state_dict(predictor.state_dict())
    for strict in (True, False):
        with pytest.raises(UserError, match="not the one recorded in the checkpoint"):
            predictor.load_state_dict(other.state_dict(), strict=strict)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_fingerprint_survives_averaging(llm, count):
    predictor = LLMPredictor(LABELS, llm=llm)
    (state,) = predictor.state_dict().values()
    total = state.clone()
    # as espnet2.main_funcs.average_nbest_models does: sum, then divide unless integer
    for _ in range(count - 1):
        total = total + state
    assert not str(total.dtype).startswith("torch.int")
    predictor.load_state_dict({"identity.fingerprint": total / count})


def test_llm_of_another_size(llm):
    with pytest.raises(UserError, match=r"has 7 tokens, but the token list has 9"):
        LLMPredictor(LABELS + 2, llm=llm)


def test_llm_of_another_token_list(llm):
    predictor = LLMPredictor(LABELS, llm=llm)
    predictor.check_token_list(TOKENS)
    with pytest.raises(UserError, match="another token list"):
        predictor.check_token_list([*TOKENS[:3], "B", *TOKENS[4:]])


def test_missing_llm(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        build_predictor("llm", LABELS, llm=str(tmp_path / "nowhere"))


def test_unknown_predictor_names_the_valid_ones():
    with pytest.raises(UserError, match="'gru'; choose one of: stateless, lstm, llm"):
        build_predictor("gru", LABELS)


def test_unknown_option_names_the_valid_ones():
    with pytest.raises(UserError, match="'layers'; valid options: embed_dim, hidden_dim, num_la"):
        build_predictor("lstm", LABELS, layers=2)


def test_wrong_number_of_tokens():
    predictor = StatelessPredictor(LABELS, embed_dim=2)
    with pytest.raises(UserError, match="5 labels, but the token list has 8 tokens: expected 7"):
        predictor.check_token_list([*TOKENS, "x"])


def test_a_frozen_predictor_has_no_dropout():
    predictor = LSTMPredictor(LABELS, embed_dim=5, hidden_dim=7, dropout=0.5)
    labels = torch.tensor([[0, 1, 2]])
    predictor.train()
    assert (predictor(labels) - predictor(labels)).abs().max() > 0
    predictor.requires_grad_(False)
    predictor.train()
    torch.testing.assert_close(predictor(labels), predictor(labels), atol=0, rtol=0)
