"""asr_llm.sh with its jobs on Slurm (imitated), training on two nodes (gloo)."""

import os
import re
import shutil
import subprocess

import pytest

from tests.cluster import fake_slurm
from tests.integration import test_transducer_training as training

pytestmark = pytest.mark.integration

data = training.data
CONF = training.ENCODER.replace("token_type: char", "") + training.FACTORIZED + "max_epoch: 1\n"


def sbatch_options(path):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", path.read_text(), re.MULTILINE))


def test_formatting_statistics_training_and_decoding(data, tmp_path, root):
    for name in ("train", "dev", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in ("wav.scp", "text"):
            shutil.copy(data / file, tmp_path / "data" / name)
        keys = [line.split()[0] for line in (data / "wav.scp").read_text().splitlines()]
        (tmp_path / "data" / name / "utt2spk").write_text("".join(f"{k} {k}\n" for k in keys))
    (tmp_path / "train.yaml").write_text(CONF)
    (tmp_path / "decode.yaml").write_text("beam_size: 2\n")
    (tmp_path / "slurm.yaml").write_text(
        "default: {timeout_min: 10}\ntrain: {slurm_partition: gpu, cpus_per_task: 3}\n"
    )
    options = {
        "stage": 3,
        "token_type": "char",
        "audio_format": "wav",
        "nj": 2,
        "inference_nj": 2,
        "train_set": "train",
        "valid_set": "dev",
        "test_sets": "test",
        "asr_config": "train.yaml",
        "asr_tag": "ft",
        "inference_config": "decode.yaml",
        "inference_tag": "decode",
        "feats_normalize": "utterance_mvn",
        "cmd_backend": "slurm",
        "slurm_conf": "slurm.yaml",
        "num_nodes": 2,
    }
    command = [str(root / "egs2/TEMPLATE/asr1/asr_llm.sh")]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**fake_slurm.install(tmp_path / "slurm"), "OMP_NUM_THREADS": "1"}

    def run():
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    exp = tmp_path / "exp/asr_ft"
    assert (exp / "decode/test/score_wer/result.txt").is_file()
    assert ":0/2]" in (exp / "train.log").read_text()  # ESPnet's rank and number of processes
    assert "1epoch results" in (exp / "train.log").read_text()
    assert (exp / "train.log.node1").is_file()
    assert "12 " in (tmp_path / "dump/raw/logdir/format_train.log").read_text()

    submitted = sorted((tmp_path / "slurm/jobs").glob("*.sbatch"))
    found = [(o["job-name"], o.get("array"), o["nodes"]) for o in map(sbatch_options, submitted)]
    assert found == [
        ("format_train", None, "1"),
        ("format_dev", None, "1"),
        ("format_test", None, "1"),
        ("stats", "0-1%2", "1"),
        ("train", None, "2"),
        ("asr_inference", "0-1%2", "1"),
        ("evaluate_nll", None, "1"),
    ]
    assert [sbatch_options(path)["cpus-per-task"] for path in submitted[2:5]] == ["2", "1", "3"]
    partitions = [sbatch_options(path).get("partition") for path in submitted]
    assert partitions == [None] * 4 + ["gpu"] + [None] * 2
    left = [path for path, _, _ in os.walk(tmp_path) if path.endswith(".submitit")]
    assert left == []

    # What is finished is not submitted again.
    command[command.index("--stage") + 1] = "10"
    assert run().returncode == 0
    assert sorted((tmp_path / "slurm/jobs").glob("*.sbatch")) == submitted


@pytest.mark.parametrize(
    "options, message",
    [
        (("--cmd_backend", "sge"), "--cmd_backend is 'sge'; expected local or slurm"),
        (("--num_nodes", "2"), "--num_nodes 2 needs --cmd_backend slurm"),
    ],
)
def test_wrong_options_are_refused(root, tmp_path, options, message):
    script = str(root / "egs2/TEMPLATE/asr1/asr_llm.sh")
    result = subprocess.run([script, *options], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr
