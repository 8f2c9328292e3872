"""A speech LLM on two processes (gloo) by ESPnet's trainer learns what it learns on one."""

import numpy as np
import pytest
import soundfile
import torch

from tests.integration.test_distributed_training import by_torchrun
from tests.integration.test_speech_llm_training import COMMON, state, task, training
from tests.integration.test_speech_llm_training import data as noise

__all__ = ["noise", "task"]  # fixtures

pytestmark = pytest.mark.integration

# Nothing random. Every parameter must have its gradient, auxiliary heads included.
CONF = """
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 1,
  input_layer: conv2d, dropout_rate: 0.0, positional_dropout_rate: 0.0,
  attention_dropout_rate: 0.0}
model: speech_llm
model_conf: {ctc_weight: 0.3, report_wer_utts: 3,
  auxiliary: [{loss: rnnt, tap: llm_prefix}]}
decoder: speech_llm
decoder_conf:
  tuning: lora
  lora_conf: {r: 2}
  gradient_checkpointing: true
  adapter_conf: {stack: 2}
optim: sgd
optim_conf: {lr: 0.1}
"""


@pytest.fixture(scope="module")
def data(noise):
    """Utterances of one length: the last frames of a shorter one depend on its batch (STFT)."""
    for path in noise.glob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, np.resize(samples, 8 * rate // 10), rate)
    return noise


def losses(out, part):
    stats = torch.load(out / "checkpoint.pth", weights_only=False)["reporter"]["stats"]
    return [float(stats[epoch][part]["loss"]) for epoch in (1, 2)]


def statistics(out, part):
    return torch.load(out / "checkpoint.pth", weights_only=False)["reporter"]["stats"][2][part]


def test_two_processes_learn_what_one_learns(data, task, tmp_path, monkeypatch):
    kept = "".join(line + "\n" for line in COMMON.splitlines() if not line.startswith("optim"))
    monkeypatch.setattr("tests.integration.test_speech_llm_training.COMMON", kept)
    one, two = tmp_path / "one", tmp_path / "two"

    def options(out):
        return training(data, out, CONF, "--max_epoch", "2", llm=data / "llm")

    by_torchrun("espnet2.bin.asr_train", options(two), tmp_path)
    task.main(cmd=options(one))
    expected, found = state(one / "2epoch.pth"), state(two / "2epoch.pth")
    first = state(two / "1epoch.pth")
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
    moved = [key for key in found if (found[key] - first[key]).abs().max() > 1e-4]
    parts = ("encoder.", "decoder.adapter.", "decoder.llm.", "ctc.", "auxiliary.")
    for part in parts:
        assert any(key.startswith(part) for key in moved), part
    for part in ("train", "valid"):
        assert losses(two, part) == pytest.approx(losses(one, part), rel=1e-3)
    for out in (one, two):
        found = statistics(out, "valid")
        for name in ("wer_llm", "wer_ctc", "wer_llm_prefix_rnnt", "llm_prefix_rnnt_per_label"):
            assert np.isfinite(found[name])
        assert "wer_llm" not in statistics(out, "train")
