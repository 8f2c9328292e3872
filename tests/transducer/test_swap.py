"""The weak-to-strong LM swap, in memory and through ESPnet's --init_param."""

import pytest
import torch
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.predictors import StatelessPredictor
from espnet_llm_plugin.transducer.swap import swap_predictor
from tests.transducer.tiny import PREDICTOR_CONF, TOKENS, batch, factorized, rnnt, save_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


def losses(model):
    with torch.no_grad():
        return model.utterance_nll(*batch())


@pytest.mark.parametrize("predictor", list(PREDICTOR_CONF))
def test_same_predictor_changes_nothing(tmp_path, predictor):
    model = factorized(predictor=predictor).eval()
    before = losses(model)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    old = swap_predictor(model, predictor, PREDICTOR_CONF[predictor], tmp_path / "model.pth")
    assert model.decoder.predictor is not old and not model.decoder.predictor.training
    assert torch.equal(losses(model), before)


def test_same_llm_changes_nothing(llm):
    model = factorized(predictor="llm", predictor_conf={"llm": llm}).eval()
    before = losses(model)
    swap_predictor(model, "llm", {"llm": llm})
    assert torch.equal(losses(model), before)


def test_everything_else_stays(llm):
    model = factorized(predictor="stateless").eval()
    before, weak = losses(model), {k: v.clone() for k, v in model.state_dict().items()}
    old = swap_predictor(model, "llm", {"llm": llm})
    assert isinstance(old, StatelessPredictor)
    state = model.state_dict()
    kept = [name for name in weak if not name.startswith("decoder.predictor.")]
    assert set(state) == {*kept, "decoder.predictor.identity.fingerprint"}
    assert all(torch.equal(state[name], weak[name]) for name in kept)
    assert (losses(model) - before).abs().min() > 1e-3
    model.decoder.predictor = old  # and back
    assert torch.equal(losses(model), before)


def test_decoder_alone_may_be_swapped(llm):
    model = factorized(predictor="stateless").eval()
    swap_predictor(model.decoder, "llm", {"llm": llm})
    other = factorized(predictor="stateless").eval()
    swap_predictor(other, "llm", {"llm": llm})
    assert torch.equal(losses(model), losses(other))


def test_swap_in_a_training_configuration(llm, tmp_path):
    """decoder_conf predictor: llm with --init_param weak.pth:::decoder.predictor."""
    weak = factorized(predictor="stateless", seed=1).eval()
    torch.save(weak.state_dict(), tmp_path / "weak.pth")
    strong = factorized(predictor="llm", predictor_conf={"llm": llm}, seed=2).eval()
    load_pretrained_model(f"{tmp_path}/weak.pth:::decoder.predictor", strong, False)
    swap_predictor(weak, "llm", {"llm": llm})
    assert torch.equal(losses(strong), losses(weak))


def test_pretrained_predictor_by_init_param(tmp_path):
    """--init_param other.pth:decoder.predictor:decoder.predictor takes the predictor alone."""
    source = factorized(predictor="lstm", seed=1)
    torch.save(source.state_dict(), tmp_path / "other.pth")
    model = factorized(predictor="lstm", seed=2)
    rest = {k: v.clone() for k, v in model.state_dict().items() if ".predictor." not in k}
    init = f"{tmp_path}/other.pth:decoder.predictor:decoder.predictor"
    load_pretrained_model(init, model, False)
    labels = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.decoder.predictor(labels), source.decoder.predictor(labels))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in rest.items())


def test_refusals(llm, tmp_path):
    model = factorized(predictor="stateless")
    with pytest.raises(UserError, match="only a factorized_transducer has .* got TransducerModel"):
        swap_predictor(rnnt(), "llm", {"llm": llm})
    with pytest.raises(UserError, match="unknown predictor 'gru'"):
        swap_predictor(model, "gru")
    with pytest.raises(UserError, match="predictor 'lstm' has weights of its own to load"):
        swap_predictor(model, "lstm", PREDICTOR_CONF["lstm"])
    with pytest.raises(UserError, match="no checkpoint .*nowhere.pth"):
        swap_predictor(model, "lstm", PREDICTOR_CONF["lstm"], tmp_path / "nowhere.pth")
    torch.save(model.state_dict(), tmp_path / "weak.pth")
    with pytest.raises(UserError, match="weak.pth has no weights for predictor 'lstm'"):
        swap_predictor(model, "lstm", PREDICTOR_CONF["lstm"], tmp_path / "weak.pth")
    other = save_llm(tmp_path, tokens=[*TOKENS[:2], "A", *TOKENS[3:]])
    with pytest.raises(UserError, match="token 2 is 'A' against 'a'"):
        swap_predictor(model, "llm", {"llm": other})
    assert isinstance(model.decoder.predictor, StatelessPredictor)  # still the old one
