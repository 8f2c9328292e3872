"""Arrays of jobs: as processes by submitit, and through Slurm's commands (imitated)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from espnet_llm_plugin import cluster
from espnet_llm_plugin.bin import run_jobs
from espnet_llm_plugin.errors import UserError
from tests.cluster import fake_slurm

LOCAL = {"cluster": "local", "parameters": {"timeout_min": 5}, "poll_s": 0.1}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    environment = fake_slurm.install(tmp_path / "slurm")
    for name in ("PATH", "FAKE_SLURM"):
        monkeypatch.setenv(name, environment[name])
    return {"cluster": "slurm", "parameters": {"timeout_min": 5}, "poll_s": 0.1}


@pytest.fixture(params=["local", "slurm"])
def where(request):
    return LOCAL if request.param == "local" else request.getfixturevalue("slurm")


@pytest.fixture
def run(tmp_path, where):
    """Run a shell script as an array; returns what was reported."""

    def call(script, nj, append_log=False, **changes):
        lines = []
        options = {**where, "report": lines.append, **changes}
        command = ["sh", "-c", script]
        cluster.run_array(
            command,
            nj,
            "log/x.@JOB@.log",
            append_log=append_log,
            directory=str(tmp_path),
            **options,
        )
        return lines

    return call


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_every_job_has_its_number_its_log_and_the_working_directory(tmp_path, run):
    lines = run("echo @JOB@; pwd >&2; touch made.@JOB@", 3)
    for job in (1, 2, 3):
        assert (tmp_path / f"log/x.{job}.log").read_text() == f"{job}\n{tmp_path}\n"
        assert (tmp_path / f"made.{job}").exists()
    assert lines[0].startswith("x: submitted 3 jobs") and lines[-1] == "x: 3 ended"
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        f"x.{job}.log" for job in (1, 2, 3)
    ]


def test_logs_are_kept_on_request_only(tmp_path, run):
    for append, expected in ((False, 1), (True, 2), (False, 1)):
        run("echo line", 1, append_log=append)
        assert len((tmp_path / "log/x.1.log").read_text().splitlines()) == expected


def test_a_failure_shows_the_end_of_its_log_after_all_have_ended(tmp_path, run):
    script = "[ @JOB@ = 2 ] && { seq 100; exit 3; }; sleep 0.5; touch made.@JOB@"
    with pytest.raises(UserError) as caught:
        run(script, 3)
    message = str(caught.value)
    assert message.startswith("job 2 of 3 of x failed")
    assert message.splitlines()[1:] == [str(n) for n in range(86, 101)]
    assert (tmp_path / "made.1").exists() and (tmp_path / "made.3").exists()


def test_a_silent_failure_shows_the_command(run):
    with pytest.raises(UserError, match="x.1.log is empty; RuntimeError: exit code 3: sh -c"):
        run("exit 3", 1)


def test_a_job_that_dies_without_a_result(run):
    # as when there is too little memory: the process that would leave the result is killed
    with pytest.raises(UserError, match="job 1 of 1 of x failed"):
        run("kill -9 $PPID", 1)


def start(tmp_path, *options):
    """The command line in a process, waiting for two jobs that sleep."""
    (tmp_path / "conf.yaml").write_text("default: {timeout_min: 5}\n")
    script = "sleep 300 & echo $! > pid.@JOB@.tmp; mv pid.@JOB@.tmp pid.@JOB@; wait"
    command = [sys.executable, "-m", "espnet_llm_plugin.bin.run_jobs", "--conf", "conf.yaml"]
    command += [*options, "--nj", "2", "--log", "x.@JOB@.log", "--", "sh", "-c", script]
    process = subprocess.Popen(command, cwd=tmp_path)
    files = [tmp_path / "pid.1", tmp_path / "pid.2"]
    until(lambda: all(file.exists() for file in files))
    pids = [int(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    assert not any(map(ended, pids))
    return process, pids


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_the_jobs(tmp_path, where, number):
    process, pids = start(tmp_path, "--cluster", where["cluster"])
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    until(lambda: all(map(ended, pids)))


def test_jobs_of_a_killed_run_are_cancelled_by_the_next(tmp_path, slurm):
    process, pids = start(tmp_path)
    process.kill()
    process.wait()
    assert not any(map(ended, pids))
    again, others = start(tmp_path)
    until(lambda: all(map(ended, pids)))
    assert not any(map(ended, others))
    again.terminate()
    again.wait(60)
    until(lambda: all(map(ended, others)))
    scripts = sorted(Path(os.environ["FAKE_SLURM"]).glob("*.sbatch"))
    assert "#SBATCH --dependency=afterany:100" in scripts[1].read_text()
    assert "dependency" not in scripts[0].read_text()


def test_a_job_at_its_time_limit_is_requeued_and_goes_on(tmp_path, slurm):
    script = (
        "echo $$ > pid.tmp; mv pid.tmp pid; echo @RUN@; [ -e seen ] || { touch seen; sleep 300; }"
    )
    command = cluster.Command(("sh", "-c", script), str(tmp_path / "log"), str(tmp_path))
    waited = []

    def report(line):
        waited.append(line)
        if len(waited) == 2:  # running
            until((tmp_path / "seen").exists)
            fake_slurm.send("100", signal.SIGUSR2)

    parameters = {"timeout_min": 5, "max_num_timeout": 3}
    slurm |= {"parameters": parameters, "report": report}
    cluster.run_jobs([command], name="x", folder=tmp_path / "submitit", **slurm)
    assert (tmp_path / "log").read_text().split() == ["100_0", "100_1"]
    assert waited[-1] == "x: 1 ended"


def test_nodes_of_a_job_share_a_name_and_stop_together(tmp_path, slurm):
    parameters = cluster.with_resources({}, ngpu=0, num_nodes=2, num_threads=3)
    slurm["parameters"] = parameters
    script = """
    echo @RUN@ $SLURM_NODEID
    [ $SLURM_NODEID = 0 ] && sleep 300
    until [ -s x.1.log ]; do sleep 0.05; done
    exit 5
    """
    with pytest.raises(UserError, match="failed .*x.1.log.node1:\n100_0 1$"):
        cluster.run_array(
            ["sh", "-c", script],
            1,
            "x.@JOB@.log",
            append_log=False,
            directory=str(tmp_path),
            **slurm,
        )
    assert (tmp_path / "x.1.log").read_text() == "100_0 0\n"
    script = next(Path(os.environ["FAKE_SLURM"]).glob("*.sbatch")).read_text()
    for option in ("nodes=2", "ntasks-per-node=1", "cpus-per-task=3", "time=1440"):
        assert f"#SBATCH --{option}\n" in script


def test_resources_of_a_kind_of_job(tmp_path):
    conf = tmp_path / "slurm.yaml"
    conf.write_text("default: {mem_gb: 4, slurm_partition: a}\ntrain: {slurm_partition: b}\n")
    assert cluster.read_parameters(conf, "data") == {"mem_gb": 4, "slurm_partition": "a"}
    train = cluster.read_parameters(conf, "train")
    assert train == {"mem_gb": 4, "slurm_partition": "b"}
    made = cluster.with_resources(train, ngpu=4, num_nodes=1, num_threads=1)
    assert made["gpus_per_node"] == 4 and made["nodes"] == 1
    assert "slurm_srun_args" not in made
    made = cluster.with_resources({"cpus_per_task": 8}, ngpu=0, num_nodes=1, num_threads=2)
    assert made["cpus_per_task"] == 8 and "gpus_per_node" not in made


def test_the_configuration_in_conf_is_accepted(root, slurm, tmp_path):
    for kind in cluster.KINDS:
        parameters = cluster.read_parameters(root / "conf/slurm.yaml", kind)
        parameters = cluster.with_resources(parameters, ngpu=1, num_nodes=2, num_threads=1)
        cluster.make_executor("slurm", tmp_path, "x", parameters)


@pytest.mark.parametrize(
    "text, message",
    [
        ("gpu: {}", r"\['gpu'\]; expected some of default, data, train, decode"),
        ("default: 3", "must map default, data, train, decode"),
        ("- a", "must map default"),
        ("a: [", "is not YAML"),
        ("default: {slurm_partitoin: a}", "submitit refuses .*slurm_partitoin"),
        ("default: {timeout_min: 1-0:00}", "submitit refuses .*timeout_min"),
    ],
)
def test_mistakes_in_the_configuration(tmp_path, text, message, slurm):
    (tmp_path / "slurm.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        command = ["--conf", f"{tmp_path}/slurm.yaml", "--log", f"{tmp_path}/log", "--", "true"]
        run_jobs.main(command)


def test_missing_configuration_slurm_and_submitit(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no .*nowhere.yaml"):
        cluster.read_parameters(tmp_path / "nowhere.yaml", "data")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun.*use --cmd_backend local"):
        cluster.make_executor("slurm", tmp_path, "x", {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'espnet_llm_plugin\[slurm\]'"):
        cluster.make_executor("local", tmp_path, "x", {})


SCRIPT = """
set -euo pipefail
. {root}/egs2/TEMPLATE/asr1/cmd.sh
cmd_backend={backend} slurm_conf={root}/conf/slurm.yaml python={python}
run_jobs --kind decode 2 log/y.@JOB@.log bash -c 'echo @JOB@; exit {code}'
tool() {{ "${{python}}" -m "espnet_llm_plugin.bin.$1" "${{@:2}}"; }}
run_jobs 1 log/tool.log tool split_data --help
"""


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_the_recipes_run_jobs_by_either_backend(tmp_path, root, slurm, backend):
    def run(code):
        script = SCRIPT.format(root=root, backend=backend, python=sys.executable, code=code)
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)

    result = run(0)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"log/y.{job}.log").read_text() for job in (1, 2)] == ["1\n", "2\n"]
    assert "--nj" in (tmp_path / "log/tool.log").read_text()
    (tmp_path / "log/tool.log").unlink()
    result = run("@JOB@")
    assert result.returncode != 0 and "error: " in result.stderr
    assert result.stderr.splitlines()[-1] in ("1", "2")
    assert not (tmp_path / "log/tool.log").exists()
