"""LM swap and MWER through ESPnet's unmodified training command: each ablation is an option."""

import pytest
import torch
import yaml

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer import mwer as mwer_module
from espnet_llm_plugin.transducer.mwer import MWER
from espnet_llm_plugin.transducer.nbest import nbest
from tests.integration import test_transducer_training as training

pytestmark = pytest.mark.integration

data, task, train, loads = training.data, training.task, training.train, training.loads
state = training.state

MWER_OPTIONS = """
  mwer_weight: 1.0
  mwer_conf: {nbest: 3, beam_size: 4, rnnt_weight: 0.1, valid_stats: true}
"""
WEAK = training.FACTORIZED.replace("model_conf: {ctc_weight: 0.3}", "model_conf:" + MWER_OPTIONS)
LLM = training.LLM + "model_conf:" + MWER_OPTIONS
RNNT = training.RNNT.replace(
    "model_conf: {ctc_weight: 0.3, acoustic_residual: true}",
    "model_conf:" + MWER_OPTIONS + "  acoustic_residual: true\n",
)
WITHOUT_MWER = ("--model_conf", "mwer_weight=0.0")
CONTROL_STATS = {"loss_mwer", *MWER.STATS}


def statistics(out, epoch=1, part="train"):
    """What the trainer's reporter has of an epoch."""
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=False)  # has more than tensors
    return checkpoint["reporter"]["stats"][epoch][part]


@pytest.fixture
def searches(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mwer_module, "nbest", lambda *args: calls.append(args[0].training) or nbest(*args)
    )
    return calls


@pytest.fixture
def weak(data, train):
    """A trained model with the weak LM."""
    out = data / "run" / "weak"
    if not (out / "valid.loss.ave.pth").exists():
        train(out, WEAK, "--max_epoch", "1", *WITHOUT_MWER)
    return out / "valid.loss.ave.pth"


def test_swap_and_mwer_are_options_of_their_own(data, train, weak, searches):
    exp = data / "run"
    llm = ("--decoder_conf", f"predictor_conf.llm={data / 'llm'}")
    no_predictor = ("--init_param", f"{weak}:::decoder.predictor")
    everything = ("--init_param", str(weak))
    runs = {
        "swap_mwer": (LLM, *llm, *no_predictor),
        "swap_control": (LLM, *llm, *no_predictor, *WITHOUT_MWER),
        "mwer": (WEAK, *everything),
        "control": (WEAK, *everything, *WITHOUT_MWER),
    }
    outs, searched = {}, {}
    for name, (conf, *options) in runs.items():
        searches.clear()
        outs[name] = train(exp / name, conf, "--max_epoch", "1", *options)
        searched[name] = list(searches)
    final = {name: state(out / "1epoch.pth") for name, out in outs.items()}

    for name, out in outs.items():
        with_mwer, swapped = not name.endswith("control"), name.startswith("swap")
        # of 12 utterances in batches of 4, one is too short for its transcript: 3 batches each
        assert searched[name] == [True] * 3 * with_mwer + [False] * 3
        assert set(statistics(out, part="valid")) >= CONTROL_STATS
        assert (set(statistics(out)) >= CONTROL_STATS) == with_mwer
        keys = {key for key in final[name] if key.startswith("decoder.predictor.")}
        fingerprint = "decoder.predictor.identity.fingerprint"
        assert (keys == {fingerprint}) == swapped and (fingerprint in keys) == swapped
    # the four differ: every option has its effect on what is learnt
    layers = [final[name]["decoder.acoustic_output.weight"] for name in runs]
    start = state(weak)["decoder.acoustic_output.weight"]
    for i, layer in enumerate(layers):
        assert all(not torch.equal(layer, other) for other in [start, *layers[:i]])


def test_mwer_of_a_frozen_encoder(data, train, weak, searches):
    options = ("--max_epoch", "1", "--init_param", str(weak), "--freeze_param", "encoder")
    out = train(data / "run" / "frozen_mwer", WEAK, *options)
    assert True in searches and set(statistics(out)) >= CONTROL_STATS
    before, after = state(weak), state(out / "1epoch.pth")
    moved = {key.split(".")[0] for key in before if not torch.equal(after[key], before[key])}
    assert "decoder" in moved and "encoder" not in moved


def test_a_run_without_search_is_plain_continued_training(data, train, weak, searches):
    """``mwer_weight: 0`` leaves not a trace of the MWER options."""
    exp, init = data / "run", ("--max_epoch", "1", "--init_param", str(weak))
    plain = training.FACTORIZED.replace("model_conf: {ctc_weight: 0.3}", "")
    one = train(exp / "plain", plain, *init)
    options = ("--model_conf", "mwer_weight=0.0", "--model_conf", "mwer_conf.valid_stats=false")
    two = train(exp / "off", WEAK, *init, *options)
    assert not searches
    for key, value in state(one / "1epoch.pth").items():
        torch.testing.assert_close(value, state(two / "1epoch.pth")[key], rtol=0, atol=0)
    assert set(statistics(one)) == set(statistics(two))


def test_lists_are_kept_over_epochs_but_not_over_a_restart(data, train, weak, searches):
    out = data / "run" / "refresh"
    options = ("--model_conf", "mwer_conf.refresh=100", "--model_conf", "mwer_conf.nbest=2")
    options += ("--accum_grad", "2", "--init_param", str(weak))
    train(out, WEAK, "--max_epoch", "2", *options)
    assert searches.count(True) == 3  # the first epoch's batches
    searches.clear()
    train(out, WEAK, "--max_epoch", "4", "--resume", "true", *options)
    assert searches.count(True) == 3
    for epoch in range(1, 5):
        values = statistics(out, epoch)
        assert set(values) >= CONTROL_STATS


def test_rnnt_with_mwer(data, train, searches):
    exp = data / "run"
    options = ("--max_epoch", "1", "--model_conf", "acoustic_residual=false")
    plain = train(exp / "rnnt", RNNT, *options, *WITHOUT_MWER)
    init = ("--init_param", str(plain / "valid.loss.ave.pth"))
    out = train(exp / "rnnt_mwer", RNNT, *options, *init, "--use_amp", "true")
    assert set(statistics(out)) >= CONTROL_STATS and searches.count(True) == 3
    decoded = training.decode(data, out, exp, "{search_type: tsd, max_sym_exp: 3}")
    assert len(decoded) == 12


def test_collecting_statistics_neither_searches_nor_loads_the_llm(data, train, searches, loads):
    llm = ("--decoder_conf", f"predictor_conf.llm={data / 'llm'}")
    train(data / "run" / "collect", LLM, "--collect_stats", "true", *llm)
    assert not searches and not loads


def test_wrong_options_are_refused_before_training(data, train):
    with pytest.raises(UserError, match="model_conf.mwer_conf: beam_size must .* got 2"):
        train(data / "run" / "wrong", WEAK, "--model_conf", "mwer_conf.beam_size=2")


CONFIGURATIONS = [
    *("finetune_mwer", "finetune_mwer_weak", "finetune_mwer_rnnt"),
    *("finetune_mwer_emformer", "finetune_mwer_streaming_conformer"),
]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_configurations_train_by_mwer_and_choose_the_best_by_it(name, root):
    conf = yaml.safe_load((root / "conf" / "transducer" / f"{name}.yaml").read_text())
    options = conf["model_conf"]
    assert options["mwer_weight"] > 0
    made = MWER(options["mwer_conf"], ["<blank>", "a", "<sos/eos>"], 1.0).conf
    assert made.valid_stats and made.nbest == 4
    assert ["valid", "mwer_expected_errors", "min"] in conf["best_model_criterion"]
    assert "mwer_expected_errors" in MWER.STATS


@pytest.mark.parametrize(
    "name, initial",
    [
        ("finetune_mwer", "train_ft_stateless"),
        ("finetune_mwer", "train_ft_llm"),
        ("finetune_mwer_weak", "train_ft_stateless"),
        ("finetune_mwer_rnnt", "train_rnnt"),
        ("finetune_mwer_emformer", "train_ft_emformer"),
        ("finetune_mwer_streaming_conformer", "train_ft_streaming_conformer"),
    ],
)
def test_the_configurations_have_the_modules_of_their_initial_models(name, initial, root):
    scales = {"lm_scale", "beta", "label_bonus"}

    def modules(name):
        conf = yaml.safe_load((root / "conf" / "transducer" / f"{name}.yaml").read_text())
        keys = ("frontend_conf", "encoder", "encoder_conf", "decoder", "joint_net_conf", "model")
        found = {key: conf.get(key) for key in keys}
        # the predictor is not among the initial values
        options = set(conf["decoder_conf"]) - scales - {"predictor", "predictor_conf"}
        found["decoder_conf"] = {key: conf["decoder_conf"][key] for key in options}
        options = conf["model_conf"]
        return found, options["ctc_weight"] > 0, options.get("acoustic_residual")

    assert modules(name) == modules(initial)
