#!/usr/bin/env python3
"""CTC prefix scores of a joint search: ours, with and without its reductions, against ESPnet's.

Every implementation gets the same CTC posteriors and follows the same hypotheses for some labels:
scores of all (or the kept, or the pre-selected) labels after each hypothesis, then the forward
variables of the hypotheses with one label more. Each lives in a process of its own, so that its
peak memory is its own, and they take turns, so that all meet the same load.

The posteriors are synthetic: a peak of one or two frames for each label, blank between, noise over
all labels. They say nothing about word error rates; the decoding benchmark has those.
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import Worker, resident_peak

MEGABYTE = 1e6
# (T, N, V) float32 tensors alive at the peak of ESPnet's step over all labels: posteriors of
# labels and blank for each hypothesis (2), forward variables (2), phi, and the terms of psi
# concatenated and on their way through logsumexp. Only decides what is not attempted.
ESPNET_TENSORS = 9


# ---------------------------------------------------------------------------- inputs


def make_inputs(vocab: int, args):
    """Log-posteriors (B, T, V), labels of each step (steps, N), pre-selected ones (steps, N, S)."""
    generator = torch.Generator().manual_seed(args.seed)
    batch, frames = args.batch, args.frames
    logits = 2.0 * torch.randn(batch, frames, vocab, generator=generator)
    # The noise sums up to about log V + 2: peaks from hardly to very sure, whatever V is.
    height = math.log(vocab) + 2.0 + torch.empty(batch, frames).uniform_(0, 9, generator=generator)
    period = 4
    count = -(-frames // period)
    names = torch.randint(1, vocab - 1, (batch, count), generator=generator)
    peaks = names.repeat_interleave(period, 1)[:, :frames].clone()
    width = torch.randint(1, 3, (batch, count), generator=generator)
    width = width.repeat_interleave(period, 1)[:, :frames]
    peaks[torch.arange(frames).expand(batch, -1) % period >= width] = 0
    logits.scatter_(2, peaks[:, :, None], height[:, :, None])
    # Hypotheses: the reference, and others with some of its labels in the wrong place.
    hypotheses = batch * args.beam
    reference = names[:, : args.steps].repeat_interleave(args.beam, 0)  # (N, steps)
    wrong = torch.rand(reference.shape, generator=generator) < 0.2
    wrong[:: args.beam] = False
    other = torch.randint(count, reference.shape, generator=generator)
    other = names.repeat_interleave(args.beam, 0).gather(1, other)
    labels = torch.where(wrong, other, reference).T.contiguous()
    size = int(1.5 * args.beam)
    selected = torch.randint(1, vocab - 1, (args.steps, hypotheses, size), generator=generator)
    selected[:, :, 0] = labels
    return logits.log_softmax(-1), labels, selected


# ---------------------------------------------------------------------------- implementations


class Ours:
    def __init__(self, top_k=None, compress=None, pre_beam=False):
        self.options = dict(top_k=top_k, compress_threshold=compress)
        self.pre_beam = pre_beam

    def start(self, log_probs, args):
        from espnet_llm_plugin.fusion.ctc_prefix_scorer import CTCPrefixScorer

        lengths = torch.full((args.batch,), args.frames)
        self.scorer = CTCPrefixScorer(log_probs, lengths, **self.options)
        every = torch.arange(args.batch).repeat_interleave(args.beam)
        self.state = self.scorer.initial_state().select(every)
        self.rows = torch.arange(len(every))

    def score(self, selected):
        if self.pre_beam:
            return self.scorer.log_probs_of(self.state, selected)
        return self.scorer.next_log_probs(self.state)

    def follow(self, labels):
        self.state = self.scorer.extend(self.state, self.rows, labels)

    def columns(self, labels):
        """(N,) columns of labels in the scores."""
        if self.pre_beam:
            return torch.zeros_like(labels)  # see make_inputs
        return torch.searchsorted(self.scorer.labels[self.state.utterances], labels[:, None])[:, 0]


class ESPnet:
    def __init__(self, pre_beam=False):
        self.pre_beam = pre_beam

    def start(self, log_probs, args):
        from espnet.nets.ctc_prefix_score import CTCPrefixScoreTH

        lengths = torch.full((args.batch,), args.frames)
        vocab = log_probs.size(2)
        self.scorer = CTCPrefixScoreTH(log_probs, lengths, 0, vocab - 1)
        self.prefixes = [[vocab - 1] for _ in range(args.batch * args.beam)]
        self.places = torch.arange(args.beam).repeat(args.batch) * vocab
        self.shape, self.state = (args.batch, args.beam), None

    def score(self, selected):
        ids = selected if self.pre_beam else None
        scores, self.new = self.scorer(self.prefixes, self.state, ids)
        return scores.gather(1, selected) if self.pre_beam else scores

    def follow(self, labels):
        best = (self.places + labels).view(self.shape)
        self.state = self.scorer.index_select_state(self.new, best)
        self.prefixes = [p + [label] for p, label in zip(self.prefixes, labels.tolist())]

    def columns(self, labels):
        return torch.zeros_like(labels) if self.pre_beam else labels


IMPLEMENTATIONS = {
    "espnet": ("ESPnet, all labels", lambda args: ESPnet()),
    "ours": ("ours, all labels", lambda args: Ours()),
    "top_k": ("ours, top-k", lambda args: Ours(top_k=args.top_k)),
    "compress": ("ours, compressed", lambda args: Ours(compress=args.threshold)),
    "both": ("ours, top-k and compressed", lambda args: Ours(args.top_k, args.threshold)),
    "espnet_pre": ("ESPnet, pre-beam", lambda args: ESPnet(pre_beam=True)),
    "ours_pre": ("ours, pre-beam", lambda args: Ours(pre_beam=True)),
}
REFERENCE = ("ESPnet, all labels, float64", lambda args: ESPnet())  # not timed
ALL_LABELS = ("espnet", "ours")


# ---------------------------------------------------------------------------- worker process


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@torch.no_grad()
def decode(implementation, inputs, args, keep=False):
    """(seconds of the start, of the steps, CPU seconds of the steps), and scores if wanted."""
    log_probs, labels, selected = inputs
    kept = []
    begin = time.perf_counter()
    implementation.start(log_probs, args)
    started, cpu = time.perf_counter(), cpu_seconds()
    for label, candidates in zip(labels, selected):
        scores = implementation.score(candidates)
        if keep:
            one = scores.gather(1, implementation.columns(label)[:, None])
            kept.append((scores.clone(), one[:: args.beam]))
        implementation.follow(label)
    return (started - begin, time.perf_counter() - started, cpu_seconds() - cpu), kept


def work(name: str, vocab: int, args) -> None:
    """Serve one-line commands on stdin with one-line JSON answers on stdout."""
    torch.set_num_threads(args.threads)
    small = argparse.Namespace(**{**vars(args), "batch": 1, "frames": 20, "steps": 2})
    make = {**IMPLEMENTATIONS, "reference": REFERENCE}[name][1]
    decode(make(args), make_inputs(50, small), small)  # libraries load, thread pools start
    inputs = make_inputs(vocab, args)
    if name == "reference":
        inputs = (inputs[0].double(), *inputs[1:])
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "memory":
            before = resident_peak(reset=True)
            decode(make(args), inputs, args)
            answer = resident_peak(reset=False) - before
        elif command == "time":
            answer, _ = decode(make(args), inputs, args)
        else:  # save
            _, scores = decode(make(args), inputs, args, keep=True)
            torch.save(scores, rest[0])
            answer = True
        print(json.dumps(answer), flush=True)


def worker_of(name: str, vocab: int, argv: list[str]) -> Worker:
    return Worker([*argv, "--worker", name, "--vocab", str(vocab)])


# ---------------------------------------------------------------------------- comparison


def largest_difference(scores, expected, every: bool) -> float:
    """Over the steps, of the scores of all labels, or of those of the true hypothesis."""
    which = 0 if every else 1
    difference = 0.0
    for ours, theirs in zip(scores, expected):
        # The blank, and what is impossible, is -inf here and -1e10 there.
        one, other = ours[which].double(), theirs[which].double()
        real = other > -1e8
        difference = max(difference, (one - other)[real].abs().max().item())
    return difference


def compare(vocab: int, args, argv: list[str]) -> list[dict]:
    rows, workers = [], {}
    need = 4.0 * ESPNET_TENSORS * args.batch * args.beam * args.frames * vocab
    for name in args.implementations:
        row = {"vocab": vocab, "name": name, "label": IMPLEMENTATIONS[name][0]}
        rows.append(row)
        if name == "espnet" and need > args.memory_limit_gb * 1e9:
            row["skipped"] = f"does not fit (about {need / 1e9:.0f} GB)"
        else:
            workers[name] = worker_of(name, vocab, argv)
    with tempfile.TemporaryDirectory() as folder:
        expected = None
        if 2 * need <= args.memory_limit_gb * 1e9:
            reference = worker_of("reference", vocab, argv)
            reference.ask(f"save {folder}/reference")
            reference.close()
            expected = torch.load(f"{folder}/reference")
        for row in rows:
            if row["name"] not in workers:
                continue
            worker = workers[row["name"]]
            if expected is not None:
                worker.ask(f"save {folder}/scores")
                scores = torch.load(f"{folder}/scores")
                row["true_difference"] = largest_difference(scores, expected, every=False)
                if row["name"] in ALL_LABELS:
                    row["difference"] = largest_difference(scores, expected, every=True)
            row["memory_bytes"] = worker.ask("memory")
            row["times"] = []
    for _ in range(args.repeats):
        for row in rows:
            if row["name"] in workers:
                row["times"].append(workers[row["name"]].ask("time"))
    for worker in workers.values():
        worker.close()
    for row in rows:
        if "times" in row:
            starts, walls, cpus = zip(*row.pop("times"))
            row["start_s"] = statistics.median(starts)
            row["median_s"] = statistics.median(walls) / args.steps
            row["best_s"] = min(walls) / args.steps
            row["cpu_s"] = statistics.median(cpus) / args.steps
    espnet = next((row for row in rows if row["name"] == "espnet"), {})
    for row in rows:
        if "median_s" in espnet and "median_s" in row:
            row["speedup"] = espnet["median_s"] / row["median_s"]
            row["memory_ratio"] = espnet["memory_bytes"] / row["memory_bytes"]
    return rows


COLUMNS = (
    "V",
    "scorer",
    "ms a step",
    "best",
    "CPU ms",
    "start ms",
    "peak MB",
    "faster",
    "smaller",
    "difference: all labels",
    "true labels",
)


def table(rows: list[dict], markdown: bool) -> str:
    lines = [COLUMNS]
    for row in rows:
        if "skipped" in row:
            lines.append((f"{row['vocab']}", row["label"], row["skipped"], *[""] * 8))
            continue
        lines.append(
            (
                f"{row['vocab']}",
                row["label"],
                *(f"{1e3 * row[key]:.2f}" for key in ("median_s", "best_s", "cpu_s", "start_s")),
                f"{row['memory_bytes'] / MEGABYTE:.1f}",
                f"{row['speedup']:.1f}x" if "speedup" in row else "-",
                f"{row['memory_ratio']:.1f}x" if "memory_ratio" in row else "-",
                f"{row['difference']:.0e}" if "difference" in row else "-",
                f"{row['true_difference']:.0e}" if "true_difference" in row else "-",
            )
        )
    if markdown:
        lines.insert(1, tuple("---" for _ in COLUMNS))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in lines if line[3]) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vocab", type=int, nargs="+", default=[500, 10000, 152000], help="labels V")
    add("--batch", type=int, default=1, help="utterances B")
    add("--beam", type=int, default=4, help="hypotheses of an utterance")
    add("--frames", type=int, default=200, help="frames T; 200 are 12 s at 60 ms")
    add("--steps", type=int, default=10, help="labels followed")
    add("--top_k", type=int, default=100, help="labels kept besides blank and eos")
    add("--threshold", type=float, default=0.9, help="of the compression")
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3, help="turns of every implementation")
    add("--memory_limit_gb", type=float, default=8.0, help="ESPnet's beyond it is not attempted")
    add("--seed", type=int, default=0)
    add("--json", help="write every number to this file")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--worker", choices=[*IMPLEMENTATIONS, "reference"], help=argparse.SUPPRESS)
    return parser


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_parser().parse_args(argv)
    if args.steps > args.frames // 4:
        sys.exit(f"--steps {args.steps}: {args.frames} frames have {args.frames // 4} labels")
    if args.worker:
        work(args.worker, args.vocab[0], args)
        return
    load = os.getloadavg()[0]
    rows = []
    for vocab in args.vocab:
        rows += compare(vocab, args, argv)
        print(f"V={vocab} done", file=sys.stderr)
    print(
        f"B={args.batch} beam={args.beam} T={args.frames}, {args.steps} labels, top-k "
        f"{args.top_k}, threshold {args.threshold}, {args.threads} threads, float32, torch "
        f"{torch.__version__}; load average at the start {load:.1f} on {os.cpu_count()} cores\n"
    )
    print(table(rows, args.markdown))
    if args.json:
        report = {"options": vars(args), "load": load, "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
