"""``use_amp`` through ESPnet's trainer, which has bfloat16 on GPUs only: here on the CPU."""

import pytest
import torch

from tests.integration import test_transducer_training as training

pytestmark = pytest.mark.integration

data, train, task = training.data, training.train, training.task

CONF = """
encoder: streaming_conformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 2,
  dropout_rate: 0.0, left_context: 32, gradient_checkpointing: true}
"""


def losses(out):
    stats = torch.load(out / "checkpoint.pth", weights_only=False)["reporter"]["stats"]
    return [float(stats[epoch][part]["loss"]) for epoch in (1, 2) for part in ("train", "valid")]


def test_bfloat16_with_gradient_checkpointing(data, train, monkeypatch):
    from espnet2.train import trainer

    conf = CONF + training.LLM + "model_conf: {ctc_weight: 0.3}\n"
    options = ("--max_epoch", "2", "--decoder_conf", f"predictor_conf.llm={data / 'llm'}")
    exact = train(data / "run" / "float32", conf, *options)
    entered = []

    def autocast(enabled, **_):
        entered.append(enabled)
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    monkeypatch.setattr(trainer, "autocast", autocast)
    rough = train(data / "run" / "bfloat16", conf, *options, "--use_amp", "true")
    assert entered == [True] * 12  # three batches to train on and three to validate an epoch
    assert losses(rough) != losses(exact)
    assert losses(rough) == pytest.approx(losses(exact), rel=0.05)
    state = training.state(rough / "2epoch.pth")
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())
