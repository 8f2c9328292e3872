"""Jobs of the recipes on the GPUs of this machine: which each sees, and how many run at once."""

import os
import subprocess

import pytest

SCRIPT = """
set -euo pipefail
. {root}/egs2/TEMPLATE/asr1/cmd.sh
jobs_per_gpu={jobs_per_gpu}
job() {{
    echo "$1 ${{CUDA_VISIBLE_DEVICES-all}}"
    touch running.$1
    sleep 0.5
    compgen -G "running.*" | wc -l
    rm running.$1
    [ "$1" != "{bad}" ]
}}
run_jobs --kind decode --ngpu {ngpu} {nj} log/job.@JOB@.log job @JOB@
"""


@pytest.fixture
def run(tmp_path, root):
    """Run jobs; returns the process, the GPU of each job, and the most jobs seen at once."""

    def run_jobs(nj, visible=None, machine=(), ngpu=1, jobs_per_gpu=1, bad=""):
        (tmp_path / "bin").mkdir()
        listing = "".join(f"echo {number}\n" for number in machine)
        (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\n" + (listing or "exit 9\n"))
        (tmp_path / "bin/nvidia-smi").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        script = SCRIPT.format(root=root, nj=nj, ngpu=ngpu, jobs_per_gpu=jobs_per_gpu, bad=bad)
        result = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        gpus, most = {}, 0
        for path in (tmp_path / "log").iterdir():
            seen, at_once = path.read_text().splitlines()
            job, gpu = seen.split()
            gpus[int(job)] = gpu
            most = max(most, int(at_once))
        return result, [gpus[job] for job in sorted(gpus)], most

    return run_jobs


@pytest.mark.parametrize(
    ("options", "gpus", "at_once"),
    [
        ({"machine": (0, 1)}, ["0", "1", "0", "1", "0"], 2),
        ({"machine": (0, 1, 2), "visible": "1,MIG-5"}, ["1", "MIG-5", "1", "MIG-5", "1"], 2),
        ({"machine": (0,), "jobs_per_gpu": 3}, ["0"] * 5, 3),
        ({"machine": ()}, ["all"] * 5, 1),
        ({"machine": (0, 1), "ngpu": 0}, ["all"] * 5, 5),
    ],
)
def test_jobs_take_the_gpus_by_turns(run, options, gpus, at_once):
    result, found, most = run(5, **options)
    assert result.returncode == 0, result.stderr
    assert found == gpus
    assert most <= at_once and (most > 1) == (at_once > 1)


def test_no_job_starts_after_one_has_failed(run):
    result, found, _ = run(6, machine=(0, 1), bad=2)
    assert result.returncode == 1
    assert "failed; the end of log/job.2.log" in result.stderr
    assert found == ["0", "1", "0"]
