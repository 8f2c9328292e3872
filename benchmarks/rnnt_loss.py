#!/usr/bin/env python3
"""Factorized transducer loss against the full joint: time, memory and agreement, one table a run.

Every implementation gets the same three tensors that require gradients (acoustic logits, LM
log-probabilities, blank logits), runs forward and backward, and lives in a process of its own, so
that its peak memory is its own. Times are taken in turns, one implementation after the other, so
that all of them meet the same load; the table has the median and the fastest run.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Worker, resident_peak

MEGABYTE = 1e6
# (B, T, U+1, V+1) tensors alive at the peak of the full joint: scores, log-softmax, concatenation,
# the loss's gradient, and gradients on their way back. Only decides what is not attempted.
FULL_JOINT_TENSORS = 5


# ---------------------------------------------------------------------------- implementations


def full_log_probs(acoustic, lm, blank, args):
    """(B, T, U+1, 1+V) log-probabilities, the way ESPnet and NeMo join two networks."""
    scores = acoustic[:, :, None] + args.lm_scale * lm[:, None]
    if args.blank_norm == "softmax":
        return torch.cat([blank[..., None], scores], -1).log_softmax(-1)
    labels = scores.log_softmax(-1) + F.logsigmoid(-blank)[..., None]
    return torch.cat([F.logsigmoid(blank)[..., None], labels], -1)


def run_ours(acoustic, lm, blank, targets, frames, labels, args):
    from espnet_llm_plugin.transducer.loss import factorized_rnnt_loss

    return factorized_rnnt_loss(
        acoustic,
        lm,
        blank,
        targets,
        frames,
        labels,
        lm_scale=args.lm_scale,
        blank_norm=args.blank_norm,
        reduction="sum",
    )


def run_full_joint(acoustic, lm, blank, targets, frames, labels, args):
    from torchaudio.functional import rnnt_loss

    return rnnt_loss(
        full_log_probs(acoustic, lm, blank, args),
        (targets + 1).int(),
        frames.int(),
        labels.int(),
        blank=0,
        reduction="sum",
        fused_log_softmax=False,
    )


def run_espnet_numba(acoustic, lm, blank, targets, frames, labels, args):
    from espnet2.asr.transducer.rnnt_multi_blank.rnnt_multi_blank import rnnt_loss

    # Its own log-softmax on the CPU leaves log-probabilities as they are.
    log_probs = full_log_probs(acoustic, lm, blank, args)
    return rnnt_loss(
        log_probs, (targets + 1).int(), frames.int(), labels.int(), blank=0, reduction="sum"
    )


def run_plain_autograd(acoustic, lm, blank, targets, frames, labels, args):
    """The same matrix product written down plainly, and torchaudio's lattice of two classes."""
    from torchaudio.functional import rnnt_loss

    lm = args.lm_scale * lm
    peak_a, peak_l = acoustic.amax(-1, keepdim=True), lm.amax(-1, keepdim=True)
    total = (acoustic - peak_a).exp() @ (lm - peak_l).exp().transpose(1, 2)
    log_norm = total.log() + peak_a + peak_l.transpose(1, 2)
    index = targets[:, None].expand(-1, acoustic.size(1), -1)
    score = acoustic.gather(2, index) + lm[:, :-1].gather(2, targets[..., None]).transpose(1, 2)
    if args.blank_norm == "softmax":
        blank = blank - log_norm
    label = F.pad(score - log_norm[..., :-1], (0, 1)) + F.logsigmoid(-blank)
    return rnnt_loss(
        torch.stack([label, F.logsigmoid(blank)], -1),
        torch.zeros_like(targets, dtype=torch.int32),
        frames.int(),
        labels.int(),
        blank=1,
        reduction="sum",
        fused_log_softmax=False,
    )


def run_reference(acoustic, lm, blank, targets, frames, labels, args):
    """Float64 and label by label: the direct logsumexp, a few frames at a time. Not timed."""
    from torch.utils.checkpoint import checkpoint

    from espnet_llm_plugin.transducer.lattice import lattice_nll

    def log_norm_of(part, lm):
        return (part[:, :, None] + lm[:, None]).logsumexp(-1)

    acoustic, lm, blank = acoustic.double(), args.lm_scale * lm.double(), blank.double()
    step = max(1, int(4e7 / lm.numel()))
    log_norm = torch.cat(
        [
            checkpoint(log_norm_of, part, lm, use_reentrant=False)
            for part in acoustic.split(step, 1)
        ],
        1,
    )
    index = targets[:, None].expand(-1, acoustic.size(1), -1)
    score = acoustic.gather(2, index) + lm[:, :-1].gather(2, targets[..., None]).transpose(1, 2)
    if args.blank_norm == "softmax":
        blank = blank - log_norm
    label = F.pad(score - log_norm[..., :-1], (0, 1)) + F.logsigmoid(-blank)
    return lattice_nll(F.logsigmoid(blank), label, frames, labels).sum()


class Implementation:
    def __init__(self, run, label, full_joint=False, frozen_lm=False, max_vocab=None):
        self.run, self.label, self.full_joint = run, label, full_joint
        self.frozen_lm, self.max_vocab = frozen_lm, max_vocab


IMPLEMENTATIONS = {
    "ours": Implementation(run_ours, "ours"),
    "ours_frozen_lm": Implementation(run_ours, "ours, LM frozen", frozen_lm=True),
    "full": Implementation(run_full_joint, "full joint, torchaudio", full_joint=True),
    "numba": Implementation(
        # Interpreted on the CPU: half a minute at V = 500 says enough.
        run_espnet_numba,
        "full joint, espnet2 numba",
        full_joint=True,
        max_vocab=1000,
    ),
    "plain": Implementation(run_plain_autograd, "matrix product, plain autograd"),
}
REFERENCE = Implementation(run_reference, "float64")


# ---------------------------------------------------------------------------- worker process


def make_inputs(vocab: int, args, utts=None):
    generator = torch.Generator().manual_seed(args.seed)
    acoustic = args.std * torch.randn(args.batch, args.frames, vocab, generator=generator)
    lm = args.std * torch.randn(args.batch, args.labels + 1, vocab, generator=generator)
    lm -= lm.logsumexp(-1, keepdim=True)
    blank = torch.randn(args.batch, args.frames, args.labels + 1, generator=generator)
    targets = torch.randint(0, vocab, (args.batch, args.labels), generator=generator)
    frames = torch.full((args.batch,), args.frames)
    labels = torch.full((args.batch,), args.labels)
    return [x[:utts].clone() for x in (acoustic, lm, blank, targets, frames, labels)]


def work(implementation: Implementation, vocab: int, args) -> None:
    """Serve one-line commands on stdin with one-line JSON answers on stdout."""
    torch.set_num_threads(args.threads)
    small = argparse.Namespace(**{**vars(args), "batch": 1, "frames": 4, "labels": 2})

    def once(inputs):
        wanted = [x for x in inputs[:3] if x.requires_grad]
        loss = implementation.run(*inputs, args)
        return loss.detach(), torch.autograd.grad(loss, wanted)

    def prepare(which, utts=None):
        inputs = make_inputs(8 if which is small else vocab, which, utts)
        for x in inputs[:1] + inputs[2:3] + ([] if implementation.frozen_lm else inputs[1:2]):
            x.requires_grad_()
        return inputs

    once(prepare(small))  # libraries load, thread pools start
    inputs = prepare(args, 1 if implementation is REFERENCE else None)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "memory":
            before = resident_peak(reset=True)
            result = once(inputs)
            answer = resident_peak(reset=False) - before
            del result
        elif command == "time":
            answer = []
            begin = time.perf_counter()
            while not answer or time.perf_counter() - begin < args.turn_seconds:
                cpu = resource.getrusage(resource.RUSAGE_SELF)
                start = time.perf_counter()
                once(inputs)
                wall = time.perf_counter() - start
                after = resource.getrusage(resource.RUSAGE_SELF)
                used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
                answer.append((wall, used))
            answer = answer[1:] or answer  # the first wakes the threads after the others' turns
        else:  # save: of the first utterance, which no other one influences
            first = [x[:1].detach() for x in inputs]
            for x in first[:3]:
                x.requires_grad_()
            loss = implementation.run(*first, args)
            torch.save((loss.detach(), torch.autograd.grad(loss, first[:3])), rest[0])
            answer = True
        print(json.dumps(answer), flush=True)


def worker_of(name: str, vocab: int, argv: list[str]) -> Worker:
    return Worker([*argv, "--worker", name, "--vocab", str(vocab)])


# ---------------------------------------------------------------------------- the machine's limit


def best_of(function, seconds=1.0) -> float:
    function()
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_machine(threads: int) -> dict[str, float]:
    """What the machine does in a second at its best: float32 multiply-adds, exponentials in the
    cache, bytes copied (read + written) in memory. The first two are those of one thread, times the
    threads, which a busy machine distorts less.
    """
    size = 1024
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    source, copy = torch.randn(1 << 25), torch.empty(1 << 25)
    chunk, out = torch.randn(1 << 18), torch.empty(1 << 18)
    torch.set_num_threads(1)
    multiply_adds = size**3 / best_of(lambda: torch.mm(a, b, out=c))
    exponentials = chunk.numel() / best_of(lambda: torch.exp(chunk, out=out))
    torch.set_num_threads(threads)
    return {
        "multiply_adds": threads * multiply_adds,
        "exponentials": threads * exponentials,
        "copied_bytes": 2 * source.nbytes / best_of(lambda: copy.copy_(source)),
    }


def account(vocab: int, seconds: float, machine: dict[str, float], args) -> dict[str, float]:
    """The least this computation needs at the measured speeds, and the share of it reached."""
    cells = args.batch * args.frames * (args.labels + 1)
    entries = args.batch * (args.frames + args.labels + 1) * vocab
    # The sum, and the gradients of its two factors.
    multiply = 3 * cells * vocab / machine["multiply_adds"]
    # Both factors, forward and again backward (kept, they would be one more tensor as large).
    exponentiate = 2 * entries / machine["exponentials"]
    # Inputs read forward and backward, gradients written.
    move = 3 * 4 * entries / machine["copied_bytes"]
    floor = max(multiply + exponentiate, move)
    return {
        "multiply_s": multiply,
        "exponentiate_s": exponentiate,
        "move_s": move,
        "floor_s": floor,
        "reached": floor / seconds,
    }


# ---------------------------------------------------------------------------- comparison


def relative_errors(path: str, reference: str) -> tuple[float, float]:
    """Of the loss, and the largest of the three gradients (Euclidean norm)."""
    (loss, grads), (exact, exact_grads) = torch.load(path), torch.load(reference)
    of_grads = [
        ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        for ours, theirs in zip(grads, exact_grads)
    ]
    return abs(loss.item() - exact.item()) / abs(exact.item()), max(of_grads)


def full_joint_bytes(vocab: int, args) -> float:
    cells = args.batch * args.frames * (args.labels + 1)
    return 4.0 * FULL_JOINT_TENSORS * cells * (vocab + 1)


def compare(vocab: int, args, argv: list[str]) -> list[dict]:
    rows, workers = [], {}
    for name in args.implementations:
        implementation = IMPLEMENTATIONS[name]
        row = {"vocab": vocab, "name": name, "label": implementation.label}
        rows.append(row)
        need = full_joint_bytes(vocab, args)
        if implementation.full_joint and need > args.memory_limit_gb * 1e9:
            row["skipped"] = f"does not fit (about {need / 1e9:.0f} GB)"
        elif implementation.max_vocab and vocab > implementation.max_vocab:
            row["skipped"] = "not run (interpreted)"
        else:
            workers[name] = worker_of(name, vocab, argv)
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            worker.ask(f"save {folder}/{name}")
        reference = None
        if args.reference:
            reference = f"{folder}/reference"
            exact = worker_of("reference", vocab, argv)
            exact.ask(f"save {reference}")
            exact.close()
        for row in rows:
            if row["name"] not in workers:
                continue
            saved = f"{folder}/{row['name']}"
            if reference:
                row["loss_error"], row["grad_error"] = relative_errors(saved, reference)
            if "full" in workers and row["name"] != "full":
                row["loss_vs_full"], row["grad_vs_full"] = relative_errors(saved, f"{folder}/full")
            row["memory_bytes"] = workers[row["name"]].ask("memory")
            row["times"], row["cpu_times"] = [], []
    for _ in range(args.repeats):
        for row in rows:
            if row["name"] in workers:
                walls, cpus = zip(*workers[row["name"]].ask("time"))
                row["times"] += walls
                row["cpu_times"] += cpus
    for worker in workers.values():
        worker.close()
    for row in rows:
        if "times" in row:
            row["median_s"] = statistics.median(row["times"])
            row["best_s"] = min(row.pop("times"))
            row["cpu_s"] = statistics.median(row.pop("cpu_times"))
    by_name = {row["name"]: row for row in rows}
    full = by_name.get("full", {})
    for row in rows:
        if "median_s" in full and "median_s" in row:
            row["speedup"] = full["median_s"] / row["median_s"]
            row["memory_ratio"] = full["memory_bytes"] / row["memory_bytes"]
    return rows


COLUMNS = (
    "V",
    "implementation",
    "median s",
    "best s",
    "CPU s",
    "peak MB",
    "faster",
    "smaller",
    "loss / grad vs full",
    "loss / grad vs float64",
)


def table(rows: list[dict], markdown: bool) -> str:
    def pair(row, *keys):
        return " / ".join(f"{row[key]:.0e}" for key in keys) if keys[0] in row else "-"

    lines = [COLUMNS]
    for row in rows:
        if "skipped" in row:
            lines.append((f"{row['vocab']}", row["label"], row["skipped"], *[""] * 7))
            continue
        lines.append(
            (
                f"{row['vocab']}",
                row["label"],
                f"{row['median_s']:.4f}",
                f"{row['best_s']:.4f}",
                f"{row['cpu_s']:.4f}",
                f"{row['memory_bytes'] / MEGABYTE:.1f}",
                f"{row['speedup']:.1f}x" if "speedup" in row else "-",
                f"{row['memory_ratio']:.1f}x" if "memory_ratio" in row else "-",
                pair(row, "loss_vs_full", "grad_vs_full"),
                pair(row, "loss_error", "grad_error"),
            )
        )
    if markdown:
        lines.insert(1, tuple("---" for _ in COLUMNS))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in lines if line[3]) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def describe_account(rows: list[dict], machine: dict[str, float]) -> str:
    lines = [
        f"Machine in this run: {2 * machine['multiply_adds'] / 1e9:.0f} GFLOP/s float32 matrix "
        f"product, {machine['exponentials'] / 1e9:.2f} G exp/s, "
        f"{machine['copied_bytes'] / 1e9:.1f} GB/s copy (read + write)."
    ]
    for row in rows:
        if "account" in row:
            part = {key: 1e3 * value for key, value in row["account"].items()}
            lines.append(
                f"V={row['vocab']}: multiply-adds {part['multiply_s']:.1f} ms + exponentials "
                f"{part['exponentiate_s']:.1f} ms (moving the bytes: {part['move_s']:.1f} ms, "
                f"meanwhile) = {part['floor_s']:.1f} ms at least; ours, best run, "
                f"{1e3 * row['best_s']:.1f} ms: {part['reached'] / 10:.0f} % of the limit."
            )
    return "\n".join(lines)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vocab", type=int, nargs="+", default=[500, 5000, 32000, 128000], help="labels V")
    add("--batch", type=int, default=4, help="utterances B")
    add("--frames", type=int, default=200, help="frames T")
    add("--labels", type=int, default=40, help="labels U of each target")
    add("--std", type=float, default=3.0, help="standard deviation of the random logits")
    add("--lm_scale", type=float, default=1.0)
    add("--blank_norm", choices=["sigmoid", "softmax"], default="sigmoid")
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3, help="turns of every implementation")
    add("--turn_seconds", type=float, default=1.0, help="a turn repeats fast runs for this long")
    add("--memory_limit_gb", type=float, default=12.0, help="larger joints are not attempted")
    add("--reference", type=int, default=1, help="0: no comparison with float64 (slow at large V)")
    add("--seed", type=int, default=0)
    add("--json", help="write every number to this file")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--worker", choices=[*IMPLEMENTATIONS, "reference"], help=argparse.SUPPRESS)
    return parser


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_parser().parse_args(argv)
    if args.worker:
        work({**IMPLEMENTATIONS, "reference": REFERENCE}[args.worker], args.vocab[0], args)
        return
    load = os.getloadavg()[0]
    machine, rows = {}, []
    for vocab in args.vocab:
        for speed, value in measure_machine(args.threads).items():  # the best of several moments
            machine[speed] = max(value, machine.get(speed, 0.0))
        rows += compare(vocab, args, argv)
        print(f"V={vocab} done", file=sys.stderr)
    for row in rows:
        if row["name"] == "ours":
            row["account"] = account(row["vocab"], row["best_s"], machine, args)
    print(
        f"B={args.batch} T={args.frames} U={args.labels}, {args.threads} threads, float32, "
        f"blank_norm={args.blank_norm}, lm_scale={args.lm_scale}, forward + backward, "
        f"torch {torch.__version__}; load average at the start {load:.1f} "
        f"on {os.cpu_count()} cores\n"
    )
    print(table(rows, args.markdown))
    print("\n" + describe_account(rows, machine))
    if args.json:
        report = {"options": vars(args), "load": load, "machine": machine, "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
