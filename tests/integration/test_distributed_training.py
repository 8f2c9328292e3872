"""Two processes on the CPU (gloo) by ESPnet's unmodified commands, as every launcher starts them.

ESPnet gives each process its part of every batch: two processes must learn what one learns.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml

from espnet_llm_plugin import registry
from tests.cluster import fake_slurm
from tests.integration import test_transducer_training as training

pytestmark = pytest.mark.integration

noise, train = training.data, training.train
PLUGIN = [sys.executable, "-m", "espnet_llm_plugin", "-m"]
GLOO = ("--dist_backend", "gloo", "--multiprocessing_distributed", "false")

STREAMING = """
encoder: streaming_conformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 2,
  dropout_rate: 0.0, positional_dropout_rate: 0.0, left_context: 32,
  gradient_checkpointing: true}
optim: sgd
optim_conf: {lr: 0.1}
max_epoch: 2
"""
EMFORMER = STREAMING.replace("streaming_conformer", "emformer").replace(
    "positional_dropout_rate: 0.0, ", ""
)
LLM = training.LLM + "model_conf: {ctc_weight: 0.3}\n"
# As the MLS recipe balances languages.
BALANCED = ("--iterator_type", "category", "--batch_type", "catpow", "--batch_bins", "30000")
BALANCED += ("--upsampling_factor", "0.5", "--min_batch_size", "2")
BALANCED += ("--valid_iterator_type", "sequence", "--valid_batch_type", "sorted")


@pytest.fixture(scope="module")
def data(noise):
    """Utterances of one length: the last frames of a shorter one depend on its batch (STFT)."""
    for path in noise.glob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, np.resize(samples, 8 * rate // 10), rate)
    return noise


@pytest.fixture
def task():
    """In the place of ESPnet's task: ``train`` of test_transducer_training fills ``command``."""

    class Task:
        def main(self, cmd):
            self.command = cmd

    return Task()


@pytest.fixture
def command(train, task):
    """Options of asr_train, with a configuration written to an experiment's directory."""

    def make(out, conf, *options):
        train(out, conf, *options)
        return task.command

    return make


def run(command, **kwargs):
    environment = {**kwargs.pop("env", os.environ), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, **kwargs
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def by_torchrun(module, options, directory):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "-m", "espnet_llm_plugin", "-m"]
    run([*torchrun, module, *options, *GLOO])


def by_hosts(module, options, directory):
    """ESPnet's launcher, with a stand-in for ssh that stays on this machine."""
    (directory / "ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    (directory / "ssh").chmod(0o755)
    launch = [*PLUGIN, "espnet2.bin.launch", "--host", "one,two", "--ngpu", "0"]
    launch += ["--envfile", "none", "--log", directory / "launch.log"]
    launch += ["--init_file_prefix", directory / ".dist_init_", "--", *PLUGIN]
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    run([*launch, module, *options], env=environment)


def by_slurm(module, options, directory):
    """As asr_llm.sh on two nodes."""
    environment = fake_slurm.install(directory / "slurm")
    (directory / "slurm.yaml").write_text("train: {timeout_min: 10}\n")
    submit = [sys.executable, "-m", "espnet_llm_plugin.bin.run_jobs", "--kind", "train"]
    submit += ["--conf", directory / "slurm.yaml", "--num_nodes", "2"]
    submit += ["--log", directory / "train.log", "--", *PLUGIN, module, *options]
    submit += ["--ngpu", "0", "--multiprocessing_distributed", "true", "--dist_launcher", "slurm"]
    submit += ["--dist_init_method", f"file://{directory}/.dist_init_@RUN@"]
    run([*submit, "--dist_backend", "gloo"], env=environment)


@pytest.mark.parametrize(
    "launch, conf, options",
    [
        (by_hosts, STREAMING + LLM, BALANCED),
        (by_slurm, EMFORMER + training.RNNT, ()),
    ],
)
def test_two_processes_learn_what_one_learns(data, command, tmp_path, launch, conf, options):
    registry.register()
    from espnet2.tasks.asr import ASRTask

    keys = [line.split()[0] for line in (data / "wav.scp").read_text().splitlines()]
    groups = {"de": keys[:3], "en": keys[3:]}
    (data / "category2utt").write_text(
        "".join(f"{name} {' '.join(utts)}\n" for name, utts in groups.items())
    )
    if LLM in conf:
        options = (*options, "--decoder_conf", f"predictor_conf.llm={data / 'llm'}")
    exp = data / "run"
    one, two = exp / f"{launch.__name__}_one", exp / f"{launch.__name__}_two"
    launch("espnet2.bin.asr_train", command(two, conf, *options), tmp_path)
    ASRTask.main(cmd=command(one, conf, *options))

    initial, _ = ASRTask.build_model_from_file(str(one / "config.yaml"), None, "cpu")
    initial = initial.state_dict()
    expected = training.state(one / "2epoch.pth")
    found = training.state(two / "2epoch.pth")
    assert set(found) == set(expected)
    if LLM in conf:
        predictor = [key for key in found if key.startswith("decoder.predictor.")]
        assert predictor == ["decoder.predictor.identity.fingerprint"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
    moved = [key for key in expected if (found[key] - initial[key]).abs().max() > 1e-3]
    assert any(key.startswith("encoder.") for key in moved)
    assert any(key.startswith(("decoder.", "joint_network.")) for key in moved)
    for epoch in (1, 2):
        for part in ("train", "valid"):
            statistics = [
                torch.load(out / "checkpoint.pth", weights_only=False)["reporter"]["stats"]
                for out in (one, two)
            ]
            losses = [float(stats[epoch][part]["loss"]) for stats in statistics]
            assert math.isfinite(losses[1])
            assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_llm_fine_tuning_with_gradient_checkpointing(data, tmp_path):
    conf = {
        "lm": "causal_llm",
        "lm_conf": {"llm": str(data / "llm"), "gradient_checkpointing": True},
        "max_epoch": 2,
        "batch_type": "sorted",
        "batch_size": 4,
        "optim": "sgd",
        "optim_conf": {"lr": 0.1},
        "num_workers": 0,
        "best_model_criterion": [["valid", "loss", "min"]],
        "token_type": "char",
        "token_list": str(data / "tokens.txt"),
    }
    (tmp_path / "lm.yaml").write_text(yaml.safe_dump(conf))
    lines = (data / "text").read_text().splitlines()
    (tmp_path / "shape").write_text("".join(f"{line.split()[0]} {len(line)}\n" for line in lines))

    def options(out):
        made = ["--config", str(tmp_path / "lm.yaml"), "--output_dir", str(out), "--ngpu", "0"]
        for part in ("train", "valid"):
            made += [f"--{part}_data_path_and_name_and_type", f"{data / 'text'},text,text"]
            made += [f"--{part}_shape_file", str(tmp_path / "shape")]
        return made

    registry.register()
    from espnet2.tasks.lm import LMTask

    by_torchrun("espnet2.bin.lm_train", options(tmp_path / "two"), tmp_path)
    LMTask.main(cmd=options(tmp_path / "one"))
    expected, found = (training.state(tmp_path / name / "2epoch.pth") for name in ("one", "two"))
    first = training.state(tmp_path / "two" / "1epoch.pth")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert any(not torch.equal(found[key], first[key]) for key in found)
