"""Slurm's commands for tests, on this machine: jobs start at once, and nodes are processes.

:func:`install` puts them into a directory for PATH. What they imitate: arrays, ``srun`` with one
task a node and its environment, states, ``scontrol requeue``, and ``scancel``, which sends SIGTERM
to every process of a job.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
ACTIVE = ("RUNNING", "REQUEUED")


def install(directory: Path) -> dict[str, str]:
    """Make the commands in ``directory``; returns an environment that finds them."""
    directory.mkdir()
    for name in COMMANDS:
        script = directory / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        script.chmod(0o755)
    (directory / "jobs").mkdir()
    path = f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "FAKE_SLURM": str(directory / "jobs")}


def state_file(job: str) -> Path:
    """Holds the state of a job; its process is in the file beside it."""
    return Path(os.environ["FAKE_SLURM"]) / f"{job}.state"


def write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def jobs_of(ids) -> list[str]:
    """The given jobs, and those of the given arrays."""
    known = [path.stem for path in sorted(Path(os.environ["FAKE_SLURM"]).glob("*.state"))]
    return [job for job in known if job in ids or job.split("_")[0] in ids]


def sbatch(script):
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    number = str(100 + len(list(Path(os.environ["FAKE_SLURM"]).glob("*.sbatch"))))
    copy = Path(os.environ["FAKE_SLURM"]) / f"{number}.sbatch"
    copy.write_text(text)
    environment = {"SLURM_JOB_NUM_NODES": options["nodes"]}
    tasks = [""]
    if "array" in options:
        last = int(re.fullmatch(r"0-(\d+)%\d+", options["array"])[1])
        tasks = [f"_{task}" for task in range(last + 1)]
        environment["SLURM_ARRAY_JOB_ID"] = number
    for task in tasks:
        write(state_file(number + task), "RUNNING")
        environment |= {"SLURM_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task[1:]}
        process = subprocess.Popen(
            [sys.executable, __file__, "supervise", number + task, str(copy)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        write(state_file(number + task).with_suffix(".pid"), str(process.pid))
    print(f"Submitted batch job {number}")


def supervise(job, script):
    """The daemon of a job: starts it again as long as it is requeued."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for count in range(5):
        if count:
            os.environ["SLURM_RESTART_COUNT"] = str(count)
        write(state_file(job), "RUNNING")
        code = subprocess.run(
            ["bash", script], check=False, preexec_fn=lambda: signal.signal(signal.SIGTERM, 0)
        ).returncode
        state = state_file(job).read_text()
        if state != "REQUEUED":
            write(
                state_file(job),
                state if state == "CANCELLED" else "FAILED" if code else "COMPLETED",
            )
            return


def srun(*arguments):
    arguments = list(arguments)
    options = {}
    while arguments[0].startswith("--"):
        name = arguments.pop(0)
        options[name] = None if name == "--unbuffered" or "=" in name else arguments.pop(0)
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    array = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_ARRAY_TASK_ID"]
    names = {"%j": os.environ["SLURM_JOB_ID"], "%A": array[0], "%a": array[1]}
    tasks = []
    for rank in range(nodes):
        paths = {}
        for stream in ("--output", "--error"):
            path = options[stream]
            for short, value in {**names, "%t": str(rank)}.items():
                path = path.replace(short, value or "")
            paths[stream] = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        step = {"SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": 0}
        step |= {"SLURM_NTASKS": nodes, "SLURM_STEP_NUM_NODES": nodes}
        step |= {"SLURM_STEP_NODELIST": "localhost"}
        environment = {**os.environ, **{name: str(value) for name, value in step.items()}}
        if array[0] is None:
            environment.pop("SLURM_ARRAY_TASK_ID")
        tasks.append(
            subprocess.Popen(
                arguments, env=environment, stdout=paths["--output"], stderr=paths["--error"]
            )
        )
    while any(task.poll() is None for task in tasks):
        if "--kill-on-bad-exit=1" in options and any(task.poll() for task in tasks):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.02)
    sys.exit(max(abs(task.returncode) for task in tasks))


def squeue(*arguments):
    assert arguments[-2:] == ("--format", "%i %T") and "--array" in arguments
    for path in sorted(Path(os.environ["FAKE_SLURM"]).glob("*.state")):
        if path.read_text() in ACTIVE:
            print(path.stem, path.read_text())


def scancel(*ids):
    for job in jobs_of(ids):
        if state_file(job).read_text() in ACTIVE:
            write(state_file(job), "CANCELLED")
            send(job, signal.SIGTERM)


def scontrol(verb, *arguments):
    job = arguments[-1]
    if verb == "requeue":
        write(state_file(job), "REQUEUED")
    else:
        print(f"JobId={job} JobState={state_file(job).read_text()} Reason=None")


def send(job, number):
    """A signal to all processes of a job, as Slurm does."""
    supervisor = psutil.Process(int(state_file(job).with_suffix(".pid").read_text()))
    for process in supervisor.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended with its parent
            if process.name() != "bash" and __file__ not in process.cmdline():
                process.send_signal(number)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
