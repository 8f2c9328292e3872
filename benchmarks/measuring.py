"""Time and memory of benchmark rows, each in a process of its own, in turns."""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Optional, Sequence

import torch


def resident_peak(reset: bool) -> float:
    """Bytes of resident memory: now, after resetting the peak, or the peak since then (Linux)."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory of earlier runs must not hide new needs
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024.0 * int(fields["VmRSS" if reset else "VmHWM"].split()[0])


def peak_memory(run: Callable[[], object], device: str) -> float:
    """Bytes that a run needs on top of what is there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = resident_peak(reset=True)
    run()
    return resident_peak(reset=False) - before


def seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of a run: by the clock, and of all processors together."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, used = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - used


def serve(run: Callable[[], object], device: str) -> None:
    """In a worker: answer ``time``, ``memory`` and ``result`` from stdin, one JSON line each."""
    result = run()  # libraries load, thread pools start
    for line in sys.stdin:
        command = line.strip()
        if command == "memory":
            answer = peak_memory(run, device)
        elif command == "time":
            answer = seconds(run, device)
        else:
            answer = result
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that serves one row: this script with other options."""

    def __init__(self, options: Sequence[str]):
        command = [sys.executable, sys.argv[0], *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str):
        """The answer to a command."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker died with code {self.process.wait()} on {command!r}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(rows: Sequence[dict], options: Callable[[dict], Sequence[str]], repeats: int) -> None:
    """Measure rows side by side: adds ``median_s``, ``best_s``, ``best_cpu_s`` (of all processors
    together), ``memory_bytes`` and ``result``.

    Args:
        rows: Get the figures; those with ``skipped`` are left out.
        options: Of the worker of a row.
        repeats: Timed runs of each, in turns, so that all meet the same load.
    """
    workers: list[tuple[dict, Optional[Worker]]] = []
    for row in rows:
        if "skipped" not in row:
            workers.append((row, Worker(options(row))))
    for row, worker in workers:
        row["memory_bytes"] = worker.ask("memory")
        row["result"] = worker.ask("result")
        row["times"] = []
    for _ in range(repeats):
        for row, worker in workers:
            row["times"].append(worker.ask("time"))
    for row, worker in workers:
        worker.close()
        times, used = zip(*row.pop("times"))
        row["median_s"], row["best_s"] = statistics.median(times), min(times)
        row["best_cpu_s"] = min(used)
