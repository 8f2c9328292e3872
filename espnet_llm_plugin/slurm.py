"""What Slurm says about jobs, without its accounting (``sacct``), which not every cluster has."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Optional, Sequence

RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT")


def queue() -> Optional[dict[str, str]]:
    """States of the user's jobs that have not ended, by id (``<array>_<task>`` in an array).

    Returns:
        None if Slurm does not answer; it may do so later.
    """
    command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i %T"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return None
    return dict(line.split() for line in result.stdout.splitlines())


def final_state(job_id: str) -> str:
    """State of a job that ended some minutes ago at most, e.g. ``OUT_OF_MEMORY``."""
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"\bJobState=(\S+)", result.stdout)
    return found[1] if found else "unknown state"


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs and whole arrays."""
    subprocess.run(["scancel", *ids], check=False)


class Phases:
    """How far submitit's jobs are, by the files of their results and by the queue.

    Calling it returns ``waiting``, ``running`` or ``ended`` for each job.

    Args:
        jobs: As submitit returned them.
        folder: Where they leave their results.
    """

    LOOKS_A_QUERY = 5  # the queue is Slurm's work, files are not

    def __init__(self, jobs: list, folder: Path):
        self.jobs, self.folder = jobs, folder
        self.looks = 0
        self.queue: dict[str, str] = {}
        self.missing: Counter = Counter()

    def __call__(self) -> list[str]:
        if self.looks % self.LOOKS_A_QUERY == 0 and (found := queue()) is not None:
            self.queue = found
            # Once may be between the end of a job and the arrival of its result on our disk.
            self.missing.update(job.job_id for job in self.jobs if job.job_id not in found)
            for job_id in found:
                self.missing[job_id] = 0
        self.looks += 1
        results = set(os.listdir(self.folder))
        return [self._phase(job, results) for job in self.jobs]

    def _phase(self, job, results: set[str]) -> str:
        files = (job.task(node).paths.result_pickle for node in range(job.num_tasks))
        if self.missing[job.job_id] > 1 or all(file.name in results for file in files):
            return "ended"
        return "running" if self.queue.get(job.job_id, "RUNNING") in RUNNING else "waiting"
