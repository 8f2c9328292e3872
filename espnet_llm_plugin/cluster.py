"""Arrays of commands as jobs of a cluster, through submitit.

The job of a command starts it as a child process, so that what runs on the cluster is what runs
without one. Slurm stops a job in three ways:

* cancelled, or preempted: SIGTERM. The command is stopped and no result is left, so that a job that
  Slurm itself requeues (``PreemptMode=REQUEUE``) is still waited for.
* about to reach its time limit: SIGUSR2. submitit requeues the job (at most ``max_num_timeout``
  times), which starts the command again: training and decoding continue where they were.
* failed on one of several nodes: the job is stopped on the others.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import yaml

from espnet_llm_plugin import slurm
from espnet_llm_plugin.errors import UserError

KINDS = ("data", "train", "decode")
TAIL = 15  # lines of a log that an error shows
JOB, RUN = "@JOB@", "@RUN@"
# Seconds that a stopped command has to end before it is killed. submitit kills a local job after 1.
PATIENCE_S = 0.5
DAY_MIN = 24 * 60


def _submitit():
    try:
        import submitit
    except ImportError:
        raise UserError(
            "jobs are submitted by submitit, which is not installed: run "
            "`pip install 'espnet_llm_plugin[slurm]'`, or use --cmd_backend local"
        ) from None
    return submitit


def read_parameters(path: str, kind: str) -> dict[str, Any]:
    """What ``conf/slurm.yaml`` asks for jobs of one kind.

    Args:
        path: YAML file with a mapping ``default`` and, over it, one of each of :data:`KINDS`.
            Keys are those of submitit's ``AutoExecutor``, and ``max_num_timeout``.
        kind: ``data``, ``train`` or ``decode``.

    Raises:
        UserError: There is no such file, or it is not of that form.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no {path} to configure the jobs by; copy conf/slurm.yaml")
    try:
        conf = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    sections = ("default", *KINDS)
    if not isinstance(conf, dict) or not all(isinstance(conf.get(s) or {}, dict) for s in sections):
        raise UserError(f"{path} must map {', '.join(sections)} to options of the jobs")
    if unknown := set(conf) - set(sections):
        raise UserError(f"{path} has {sorted(unknown)}; expected some of {', '.join(sections)}")
    return {**(conf.get("default") or {}), **(conf.get(kind) or {})}


def with_resources(
    parameters: dict[str, Any], *, ngpu: int, num_nodes: int, num_threads: int
) -> dict[str, Any]:
    """Add what a job of this size needs to the options of its kind.

    Args:
        ngpu: GPUs on each node.
        num_nodes: Nodes, each with one process that starts as many as it has GPUs.
        num_threads: CPUs on each node, at least.
    """
    parameters = {"timeout_min": DAY_MIN, **parameters}
    cpus = max(num_threads, parameters.get("cpus_per_task", 1))
    parameters |= {"nodes": num_nodes, "tasks_per_node": 1, "cpus_per_task": cpus}
    if ngpu:
        parameters["gpus_per_node"] = ngpu
    if num_nodes > 1:  # the others would wait for a process that has failed
        srun_args = [*parameters.get("slurm_srun_args", []), "--kill-on-bad-exit=1"]
        parameters["slurm_srun_args"] = srun_args
    return parameters


@dataclass(frozen=True)
class Command:
    """A command line that a job runs.

    Attributes:
        argv: Its words. ``@RUN@`` becomes a name that every start of the job has anew, the same on
            all nodes of the job.
        log: Gets the output; that of node n > 0 goes to ``<log>.node<n>``.
        directory: Working directory.
    """

    argv: tuple[str, ...]
    log: str
    directory: str

    def __call__(self) -> None:
        """Run the command.

        Raises:
            RuntimeError: It failed.
            SystemExit: It was stopped by SIGTERM.
        """
        environment = _submitit().JobEnvironment()
        run = f"{environment.job_id}_{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        with open(self.log_of(environment.node), "ab") as stream:
            child = subprocess.Popen(
                [word.replace(RUN, run) for word in self.argv],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # The warning of the time limit is for us: the command goes on until it is requeued.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        signal.signal(signal.SIGTERM, lambda *_: _kill_group(child, signal.SIGTERM))
        try:
            code = child.wait()
        finally:
            _stop(child)
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            sys.exit(128 + signal.SIGTERM)
        if code:
            raise RuntimeError(f"exit code {code}: {shlex.join(self.argv)}")

    def log_of(self, node: int) -> str:
        """Where the output of one node of the job is."""
        return self.log if node == 0 else f"{self.log}.node{node}"

    def checkpoint(self):
        """What submitit starts when the job is requeued: the same command."""
        return _submitit().helpers.DelayedSubmission(self)


def _kill_group(child: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _stop(child: subprocess.Popen) -> None:
    """End a command, and what it started, whether or not it still runs itself."""
    _kill_group(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE_S)
    _kill_group(child, signal.SIGKILL)
    child.wait()


class _Signals:
    """The first SIGINT, SIGTERM or SIGHUP ends this process by an exception."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.held = self.ending = False
        self.received = None

    def handle(self, number, frame):
        self.received = number
        self.end_if_received()

    def end_if_received(self):
        if self.received and not (self.held or self.ending):
            self.ending = True
            sys.exit(128 + self.received)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Not while jobs are being submitted: nobody would know their numbers."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self.end_if_received()

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def make_executor(cluster: str, folder: Path, name: str, parameters: dict[str, Any]):
    """A submitit executor.

    Raises:
        UserError: There is no such cluster here, or a parameter is unknown to submitit.
    """
    submitit = _submitit()
    parameters = dict(parameters)
    timeouts = parameters.pop("max_num_timeout", 10)
    try:
        executor = submitit.AutoExecutor(
            str(folder), cluster=cluster, slurm_max_num_timeout=timeouts
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot submit jobs to `{cluster}`: {error}. On a machine without sbatch and srun, "
            "use --cmd_backend local"
        ) from None
    try:
        executor.update_parameters(name=name, **parameters)
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"submitit refuses the options of the jobs: {error}") from None
    return executor


def run_array(
    argv: Sequence[str], nj: int, log: str, *, append_log: bool, directory: str, **options: Any
) -> None:
    """:func:`run_jobs` for ``nj`` copies of one command; see there for ``options``.

    Args:
        argv: Words of the command. ``@JOB@`` in them and in ``log`` becomes 1 ... ``nj``.
        log: Log file of a job.
        append_log: Keep what the logs hold already.
        directory: Working directory.
    """
    log = str(Path(directory) / log)
    commands = [
        Command(
            tuple(word.replace(JOB, str(n)) for word in argv), log.replace(JOB, str(n)), directory
        )
        for n in range(1, nj + 1)
    ]
    for command in commands:
        path = Path(command.log)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append_log:
            path.unlink(missing_ok=True)
    name = Path(log).name.replace(f".{JOB}", "").removesuffix(".log")
    run_jobs(commands, name=name, folder=Path(log).parent / f".{name}.submitit", **options)


def run_jobs(
    commands: Sequence[Command],
    *,
    cluster: str,
    parameters: dict[str, Any],
    name: str,
    folder: Path,
    poll_s: float = 2.0,
    report: Callable[[str], None] = print,
) -> None:
    """Submit commands as one array of jobs and wait until all have ended.

    SIGINT, SIGTERM or SIGHUP, or any error here, cancels the jobs. Jobs of a process that was
    killed outright are cancelled by its successor with the same ``folder``.

    Args:
        commands: One a job.
        cluster: ``slurm``, or ``local``: processes of this machine.
        parameters: Of submitit's ``AutoExecutor``; see :func:`read_parameters`.
        name: Of the jobs, in the queue and in messages.
        folder: For submitit's files, on a disk that all nodes share. Removed after success.
        poll_s: Seconds between looks at the jobs.
        report: Gets a line whenever the number of waiting, running or ended jobs has changed.

    Raises:
        UserError: The jobs cannot be submitted; or some failed, with the end of the first one's
            log.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    executor = make_executor(cluster, folder, name, parameters)
    record = folder / "submitted"
    if cluster == "slurm" and (left := _left_by_a_killed_run(record)):
        slurm.cancel(left)
        report(f"{name}: cancelled job {', '.join(left)} of an earlier run that was killed")
        # The new jobs write the same files: not before the old ones have ended.
        executor.update_parameters(slurm_dependency=f"afterany:{':'.join(left)}")
    jobs: list = []
    with _Signals() as signals:
        try:
            with signals.hold():
                jobs = _submit(executor, commands)
                ids = list(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))
                record.write_text("".join(f"{job_id}\n" for job_id in ids))
            report(f"{name}: submitted {len(jobs)} jobs as {', '.join(ids)}")
            phases_of = (
                slurm.Phases(jobs, folder)
                if cluster == "slurm"
                else lambda: ["ended" if job.done() else "running" for job in jobs]
            )
            _wait(jobs, phases_of, name, poll_s, report)
        except BaseException:
            signals.ending = True  # a second Ctrl-C must not leave half of the jobs
            if jobs and cluster == "slurm":
                slurm.cancel(ids)
            else:
                for job in jobs:
                    job.cancel(check=False)
            record.unlink(missing_ok=True)
            raise
    record.unlink()
    _check_results(jobs, commands, name, cluster)
    shutil.rmtree(folder, ignore_errors=True)


def _submit(executor, commands: Sequence[Command]) -> list:
    try:
        return executor.submit_array(commands)
    except RuntimeError as error:  # what sbatch says, among other lines
        raise UserError(f"the jobs were refused: {str(error).strip()}") from None


def _wait(
    jobs: list,
    phases_of: Callable[[], list[str]],
    name: str,
    poll_s: float,
    report: Callable[[str], None],
) -> None:
    seen = None
    while seen is None or seen["ended"] < len(jobs):
        phases = Counter(phases_of())
        if phases != seen:
            names = ("waiting", "running", "ended")
            report(f"{name}: " + ", ".join(f"{phases[p]} {p}" for p in names if phases[p]))
        if phases["ended"] < len(jobs):
            time.sleep(poll_s)
        seen = phases


def _check_results(jobs: list, commands: Sequence[Command], name: str, cluster: str) -> None:
    """Raise a UserError about the first task that failed."""
    tasks = [
        (number, node, job.task(node))
        for number, job in enumerate(jobs, 1)
        for node in range(job.num_tasks)
    ]
    # Tasks that say why they failed come before those that were stopped because of them.
    for number, node, task in sorted(tasks, key=lambda t: not t[2].paths.result_pickle.exists()):
        if task.paths.result_pickle.exists():
            state, error = "FAILED", task.exception()
            if error is None:
                continue
        else:
            state = slurm.final_state(task.job_id) if cluster == "slurm" else task.state
            error = _tail(task.paths.stderr)
        log = commands[number - 1].log_of(node)
        tail = _tail(log)
        end = f"the end of {log}:\n{tail}" if tail else f"{log} is empty; {_last_line(error)}"
        raise UserError(
            f"job {number} of {len(jobs)} of {name} failed ({task.job_id}, {state}); {end}"
        )


def _last_line(error) -> str:
    """What went wrong, of submitit's message: its trace is between dashes."""
    parts = str(error).split(22 * "-")
    return (parts[1] if len(parts) > 1 else parts[0]).strip().rpartition("\n")[2]


def _tail(path) -> str:
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, TAIL)).rstrip()


def _left_by_a_killed_run(record: Path) -> list[str]:
    """Those of the recorded jobs that are in the queue still."""
    if not record.exists():
        return []
    active = {job_id.split("_")[0] for job_id in slurm.queue() or ()}
    return sorted(active & set(record.read_text().split()))
