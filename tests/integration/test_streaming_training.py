"""Streaming encoders trained by ESPnet's unmodified command, then run on a stream of samples."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from espnet_llm_plugin import registry
from espnet_llm_plugin.encoder.streaming_frontend import StreamingFrontend
from tests.inference.tiny_asr import TOKENS, make_audio

pytestmark = pytest.mark.integration

LENGTHS = {"a": 0.61, "b": 0.5, "c": 0.77, "d": 0.4}  # seconds
MODEL = """
frontend_conf: {n_fft: 512, win_length: 400, hop_length: 160, n_mels: 20}
normalize: global_mvn
normalize_conf: {stats_file: stats.npz}
specaug: specaug
specaug_conf: {apply_time_warp: true, time_warp_window: 5, apply_freq_mask: true,
  apply_time_mask: true, time_mask_width_range: [0, 10]}
token_type: char
model: factorized_transducer
model_conf: {ctc_weight: 0.3}
decoder: factorized_transducer
decoder_conf: {predictor: stateless, predictor_conf: {embed_dim: 8}, joint_dim: 8,
  blank_embed_dim: 4}
batch_type: sorted
batch_size: 2
max_epoch: 3
optim: adam
optim_conf: {lr: 0.01}
best_model_criterion: [[valid, loss, min]]
num_workers: 0
num_att_plot: 0
use_matplotlib: false
log_interval: 1
"""
ENCODERS = {
    "emformer": """
encoder: emformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 2,
  left_context: 32, dynamic_chunk_sizes: [8, 16, 32], full_context_probability: 0.3}
""",
    "streaming_conformer": """
encoder: streaming_conformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 2,
  left_context: 32, right_context: 8, gradient_checkpointing: true}
""",
}


def make_data(directory):
    make_audio(directory, LENGTHS)
    (directory / "text").write_text("a ab\nb dc\nc abba\nd c\n")
    shapes = "".join(f"{utt} {int(16000 * seconds)}\n" for utt, seconds in LENGTHS.items())
    (directory / "shape").write_text(shapes)
    (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    np.savez(
        directory / "stats.npz", count=9, sum=np.full(20, -45.0), sum_square=np.full(20, 400.0)
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_and_streaming(tmp_path, monkeypatch, encoder):
    make_data(tmp_path)
    (tmp_path / "train.yaml").write_text(MODEL + ENCODERS[encoder])
    command = [sys.executable, "-m", "espnet_llm_plugin", "-m", "espnet2.bin.asr_train"]
    command += ["--config", "train.yaml", "--output_dir", "exp", "--ngpu", "0"]
    command += ["--token_list", "tokens.txt"]
    for part in ("train", "valid"):
        for triple in ("wav.scp,speech,sound", "text,text,text"):
            command += [f"--{part}_data_path_and_name_and_type", triple]
        command += [f"--{part}_shape_file", "shape"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    ahead = 40 if encoder == "emformer" else 80
    assert f"(chunk 160 + right context {ahead} + analysis window 7.5625)" in result.stderr

    registry.register()
    from espnet2.tasks.asr import ASRTask

    monkeypatch.chdir(tmp_path)  # the path of the statistics is relative
    initial, _ = ASRTask.build_model_from_file("exp/config.yaml", None, "cpu")
    model, _ = ASRTask.build_model_from_file("exp/config.yaml", "exp/valid.loss.ave.pth", "cpu")
    model.eval()
    before = dict(initial.encoder.named_parameters())
    for name, parameter in model.encoder.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"

    speech = 0.1 * torch.randn(12345, generator=torch.Generator().manual_seed(0))
    for chunk_size in (8, 16, 32, 64):
        model.encoder.set_chunk_size(chunk_size)
        with torch.no_grad():
            expected, _ = model.encode(speech[None], torch.tensor([len(speech)]))
        frontend = StreamingFrontend(model.frontend, model.normalize)
        features, state = frontend.initial_state(), model.encoder.initial_state()
        outputs = []
        for samples in speech.split(700):
            frames, features = frontend.infer(samples, features)
            encoded, state = model.encoder.infer(frames[None], state)
            outputs.append(encoded.frames)
        encoded, state = model.encoder.infer(frontend.finish(features)[None], state)
        outputs += [encoded.frames, model.encoder.finish(state).frames]
        torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-3, atol=1e-4)
