"""Configurations of egs2/stories build models that fit each other, offline and streaming."""

from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin import registry
from tests.transducer.tiny import save_llm

CONF = Path(__file__).resolve().parents[2] / "conf" / "stories"
TOKENS = ["<blank>", "<unk>", *(f"t{i}" for i in range(297)), "<sos/eos>"]
ASR = ("train_ctc", "train_rnnt", "train_ft_weak", "train_ft_lstm", "train_ft_llm", "finetune_mwer")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """ESPnet's model of a configuration and further options."""
    registry.register()
    from espnet2.tasks.asr import ASRTask
    from espnet2.tasks.lm import LMTask

    directory = tmp_path_factory.mktemp("stories")
    (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    (directory / "llm").mkdir()
    llm = save_llm(directory / "llm", tokens=TOKENS)

    def make(name, *options, task=ASRTask):
        if name in ("train_ft_llm", "finetune_mwer") and not options:
            options = ["--decoder_conf", f"predictor_conf.llm={llm}"]
        arguments = ["--config", str(CONF / f"{name}.yaml"), "--output_dir", str(directory)]
        arguments += ["--token_list", str(directory / "tokens.txt"), *options]
        return task.build_model(task.get_parser().parse_args(arguments))

    make.LMTask = LMTask
    return make


def shapes(model, prefix):
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }


def test_all_start_from_the_ctc_model(build):
    ctc = build("train_ctc")
    parameters = sum(p.numel() for p in ctc.parameters())
    assert f"{parameters / 1e6:.1f} M parameters" in (CONF / "train_ctc.yaml").read_text()
    output = tuple(ctc.ctc.ctc_lo.weight.shape)
    for name in ASR[1:]:
        model = build(name)
        assert shapes(model, "encoder.") == shapes(ctc, "encoder.")
        part = "joint_network" if name == "train_rnnt" else "decoder"
        layer = f"{part}.acoustic_output"
        assert shapes(model, layer)[f"{layer}.weight"] == output


def test_training_after_the_swap_fits_what_it_starts_from(build):
    finetuned, weak = build("finetune_mwer"), build("train_ft_weak")
    for part in ("encoder.", "decoder.acoustic_output", "decoder.blank"):
        assert shapes(finetuned, part) == shapes(weak, part)
    keeps = build("finetune_mwer", "--decoder_conf", "predictor=stateless")  # weak_mwer
    assert shapes(keeps, "decoder.") == shapes(weak, "decoder.")
    assert finetuned.mwer_weight == 1 and finetuned.mwer.conf.valid_stats


def test_the_lstm_lm_fits_the_lstm_predictor(build):
    from espnet_llm_plugin.transducer.lstm_lm import predictor_weights

    lm = build("train_lstm_lm", task=build.LMTask)
    given = {name: tuple(w.shape) for name, w in predictor_weights(lm.state_dict()).items()}
    assert given == shapes(build("train_ft_lstm"), "decoder.predictor.")


@pytest.mark.parametrize("milliseconds", [160, 320, 640])
def test_streaming_is_an_option(build, milliseconds):
    options = ["--encoder_conf", f"chunk_size={milliseconds // 10}"]
    model = build("train_ctc", *options, "--encoder_conf", "right_context=4")
    shift = model.frontend.hop_length * 1000 / 16000
    assert model.encoder.algorithmic_latency_ms(shift) == milliseconds + 40
    assert build("train_ctc").encoder.chunk_size is None
    speech = torch.randn(2, 16000)
    frames, lengths = model.encode(speech, torch.tensor([16000, 9000]))
    assert frames.shape[1] == lengths.max() == 26


@pytest.mark.parametrize("name", ["train_llama", "finetune_llm", "train_lstm_lm", *ASR])
def test_one_cosine_over_the_training(name):
    """3,000 utterances, 51,000 or 48,000 sentences: the sizes of the recipe's full corpus."""
    conf = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    examples = {"train_llama": 48000, "finetune_llm": 51000, "train_lstm_lm": 51000}.get(name, 3000)
    steps = conf["max_epoch"] * -(-examples // conf["batch_size"])
    assert conf["scheduler_conf"]["first_cycle_steps"] == pytest.approx(steps, rel=0.01)


def test_one_grid_for_all():
    grid = yaml.safe_load((CONF / "tune.yaml").read_text())
    trained = yaml.safe_load((CONF / "tune_as_trained.yaml").read_text())
    for axis in ("alphas", "betas", "label_bonuses"):
        assert set(trained[axis]) <= set(grid[axis])
    assert (trained["alphas"], trained["betas"]) == ([1.0], [0.0])
    assert 0.0 in grid["alphas"] and 0.0 in grid["lm_weights"]
