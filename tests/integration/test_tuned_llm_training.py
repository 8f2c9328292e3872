"""LoRA, checkpointing and two stages through ESPnet's trainer: averaged, resumed, merged."""

import pytest
import torch

from espnet_llm_plugin.bin import export_llm
from espnet_llm_plugin.llm.backbone import load_causal_lm
from tests.integration.test_speech_llm_training import COMMON, data, state, task, training

__all__ = ["data", "task"]  # fixtures

pytestmark = pytest.mark.integration

# Without anything random but the order of the batches, which depends on the epoch alone. Two
# updates an epoch.
CONF = """
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 1,
  input_layer: conv2d, dropout_rate: 0.0, positional_dropout_rate: 0.0,
  attention_dropout_rate: 0.0}
model: speech_llm
model_conf: {ctc_weight: 0.3}
decoder: speech_llm
decoder_conf:
  tuning: lora
  lora_conf: {r: 2, targets: all-linear}
  gradient_checkpointing: true
  adapter_conf: {stack: 2}
optim: adamw_groups
optim_conf: {groups: {decoder.llm: {lr_factor: 0.5, freeze_updates: 2}}}
scheduler: cosineannealingwarmuprestarts
scheduler_conf: {first_cycle_steps: 6, warmup_steps: 1, max_lr: 0.02, min_lr: 0.001}
"""


def lora(states):
    return {name: value for name, value in states.items() if "lora_" in name}


def test_two_stages_with_lora_resumed_and_merged(data, task, tmp_path, monkeypatch):
    kept = "".join(line + "\n" for line in COMMON.splitlines() if not line.startswith("optim"))
    monkeypatch.setattr("tests.integration.test_speech_llm_training.COMMON", kept)
    llm = data / "llm"

    def train(name, epochs, *options):
        conf = ("--max_epoch", str(epochs), *options)
        task.main(cmd=training(data, tmp_path / name, CONF, *conf, llm=llm))

    def checkpoint(name):
        path = tmp_path / name / "checkpoint.pth"
        return torch.load(path, map_location="cpu", weights_only=False)

    train("whole", 3)
    train("parts", 1)
    first = checkpoint("parts")["model"]
    assert lora(first) and all(
        (value.abs().max() == 0) == ("lora_B" in name) for name, value in lora(first).items()
    )
    train("parts", 3, "--resume", "true")
    whole, parts = checkpoint("whole"), checkpoint("parts")

    # 1. LoRA stayed as it was for two updates, then learnt; resuming changes nothing
    for name, value in lora(whole["model"]).items():
        assert not torch.equal(value, first[name]), name
    assert whole["model"].keys() == parts["model"].keys()
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], value, atol=1e-6, rtol=1e-4, msg=name)
    groups = [
        [(g["pattern"], g["updates"], g["lr"]) for g in part["optimizers"][0]["param_groups"]]
        for part in (whole, parts)
    ]
    assert groups[0] == groups[1] and {updates for _, updates, _ in groups[0]} == {6}
    assert len({lr for _, _, lr in groups[0]}) == 1  # of the scheduler, before the factors

    # 2. The average of two epochs, as decoding loads it, and its LLM merged
    exp = tmp_path / "whole"
    averaged = exp / "valid.loss.ave_2best.pth"
    model, _ = task.build_model_from_file(str(exp / "config.yaml"), str(averaged), "cpu")
    for name, value in lora(state(averaged)).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value)
    out = tmp_path / "merged"
    options = [f"--asr_train_config={exp}/config.yaml", f"--asr_model_file={averaged}"]
    assert export_llm.main([*options, f"--output_dir={out}"]) == 0
    ids = torch.tensor([[3, 4, 5, 6, 3, 4]])
    with torch.no_grad():
        expected = model.eval().decoder.llm.model("cpu")(input_ids=ids).logits
        found = load_causal_lm(out)(input_ids=ids).logits
        before = load_causal_lm(llm)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (before - expected).abs().max() > 1e-3
