#!/usr/bin/env python3
"""MWER training step against the plain loss and against N copies: time and memory, one table.

A step is forward and backward of everything after the encoder: output layers, predictor, blank
joiner or joint network, loss. The encoder output is given, and so are the N-best lists (the search
is not part of the step): transcripts with a few labels replaced or deleted at random. Every
implementation lives in a process of its own, so that its peak memory is its own; times are taken in
turns.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rnnt_loss import MEGABYTE, resident_peak

SYSTEMS = {
    "ft": "factorized, weak LM trained",
    "ft_frozen": "factorized, LM frozen",
    "rnnt": "RNN-T",
}
STEPS = {"plain": "plain loss", "ours": "MWER, ours", "copies": "MWER, N + 1 copies"}
# (B, T, U+1, V) tensors alive at the peak of the RNN-T. Only decides what is not attempted.
JOINT_TENSORS = 3


class Data(NamedTuple):
    batch: object  # Lattice
    nbest: object  # NBest


def make_data(args, encoder_out: torch.Tensor) -> Data:
    """Transcripts and hypotheses that share most of their labels."""
    from espnet_llm_plugin.transducer.base_model import Lattice
    from espnet_llm_plugin.transducer.nbest_scores import NBest

    draw = random.Random(args.seed)
    rows = [
        [draw.randint(1, args.vocab - 2) for _ in range(args.labels)] for _ in range(args.batch)
    ]
    tokens = torch.ones(args.batch, args.nbest, args.labels, dtype=torch.long)
    lengths = torch.zeros(args.batch, args.nbest, dtype=torch.long)
    for b, row in enumerate(rows):
        for n in range(args.nbest):
            hyp = list(row)
            for u in draw.sample(range(args.labels), round(args.edits * args.labels)):
                hyp[u] = draw.choice([draw.randint(1, args.vocab - 2), None])
            hyp = [token for token in hyp if token is not None]
            tokens[b, n, : len(hyp)] = torch.tensor(hyp)
            lengths[b, n] = len(hyp)
    full = torch.full((args.batch,), args.frames), torch.full((args.batch,), args.labels)
    errors = torch.tensor([[draw.randint(0, 5) for _ in range(args.nbest)] for _ in rows]).float()
    return Data(
        Lattice(encoder_out, full[0], torch.tensor(rows), full[1]),
        NBest(tokens, lengths, torch.ones_like(lengths, dtype=torch.bool), errors),
    )


def make_model(system: str, args) -> torch.nn.Module:
    from espnet2.asr.ctc import CTC
    from espnet2.asr.decoder.transducer_decoder import TransducerDecoder
    from espnet2.asr.encoder.abs_encoder import AbsEncoder
    from espnet2.asr_transducer.joint_network import JointNetwork

    from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
    from espnet_llm_plugin.transducer.model import FactorizedTransducerModel, TransducerModel

    class NoEncoder(AbsEncoder):
        def output_size(self):
            return args.dim

        def forward(self, xs_pad, ilens, prev_states=None):
            return xs_pad, ilens, None

    torch.manual_seed(args.seed)
    tokens = ["<blank>", *(f"\u2581{i}" for i in range(args.vocab - 2)), "<sos/eos>"]
    common = dict.fromkeys(("frontend", "specaug", "normalize", "preencoder", "postencoder"))
    common |= dict(vocab_size=args.vocab, token_list=tokens, encoder=NoEncoder())
    common |= dict(ctc=CTC(args.vocab, args.dim))
    if system == "rnnt":
        decoder = TransducerDecoder(args.vocab, num_layers=1, hidden_size=args.dim, embed_pad=0)
        joint = JointNetwork(args.vocab, args.dim, args.dim, joint_space_size=args.dim)
        return TransducerModel(**common, decoder=decoder, joint_network=joint)
    decoder = FactorizedTransducerDecoder(args.vocab, args.dim, joint_dim=args.dim)
    decoder.predictor.requires_grad_(system == "ft")
    return FactorizedTransducerModel(**common, decoder=decoder)


def step(model: torch.nn.Module, which: str, data: Data) -> torch.Tensor:
    """Loss of one training step."""
    from espnet_llm_plugin.transducer.base_model import Lattice
    from espnet_llm_plugin.transducer.mwer import mwer_loss

    batch, nbest = data
    if which == "plain":
        return model.lattice_nll(batch)[0].mean()
    if which == "ours":
        scores = model.nbest_scores(batch, nbest)
        nll, hypotheses = scores.nll, scores.hypotheses
    else:  # an utterance of the batch for each hypothesis, as the loss of one sequence needs it
        tokens = torch.cat([batch.text.unsqueeze(1), nbest.tokens], dim=1)
        lengths = torch.cat([batch.text_lengths.unsqueeze(1), nbest.lengths], dim=1)
        copies = tokens.shape[1]
        copied = Lattice(
            batch.encoder_out.repeat_interleave(copies, 0),
            batch.frame_lengths.repeat_interleave(copies),
            tokens.flatten(0, 1),
            lengths.flatten(),
        )
        both = model.lattice_nll(copied)[0].unflatten(0, lengths.shape)
        nll, hypotheses = both[:, 0], -both[:, 1:]
    return mwer_loss(hypotheses, nbest.errors)[0].mean() + 0.1 * nll.mean()


def work(args) -> None:
    """Serve one-word commands on stdin with one-line JSON answers on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # ESPnet prints when it is imported
    torch.set_num_threads(args.threads)
    system, which = args.worker

    def prepare(args):
        model = make_model(system, args)
        generator = torch.Generator().manual_seed(args.seed)
        encoder_out = torch.randn(args.batch, args.frames, args.dim, generator=generator)
        return model, make_data(args, encoder_out.requires_grad_())

    def once(model, data):
        wanted = [p for p in model.parameters() if p.requires_grad]
        loss = step(model, which, data)
        grads = torch.autograd.grad(loss, [data.batch.encoder_out, *wanted], allow_unused=True)
        return loss.item(), grads

    small = dict(batch=1, frames=4, labels=3, vocab=10)
    once(*prepare(argparse.Namespace(**{**vars(args), **small})))  # libraries load
    model, data = prepare(args)
    for line in sys.stdin:
        if line.strip() == "memory":
            before = resident_peak(reset=True)
            result = once(model, data)
            answer = {"bytes": resident_peak(reset=False) - before, "loss": result[0]}
            answer["gradient"] = result[1][0].double().norm().item()
            del result
        else:
            answer = []
            begin = time.perf_counter()
            while not answer or time.perf_counter() - begin < args.turn_seconds:
                start = time.perf_counter()
                once(model, data)
                answer.append(time.perf_counter() - start)
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    def __init__(self, system: str, which: str, argv: list[str]):
        command = [sys.executable, __file__, *argv, "--worker", system, which]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker died with code {self.process.wait()} on {command!r}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(system: str, args, argv: list[str]) -> list[dict]:
    """One row for each step of a system."""
    rows, workers = [], []
    for which, label in STEPS.items():
        row = {"system": system, "step": which, "label": label}
        rows.append(row)
        joint = 4.0 * args.batch * args.frames * (args.labels + 1) * args.vocab * JOINT_TENSORS
        if which == "copies":
            joint *= args.nbest + 1
        if system == "rnnt" and joint > args.memory_limit_gb * 1e9:
            row["skipped"] = f"does not fit (about {joint / 1e9:.0f} GB)"
            continue
        worker = Worker(system, which, argv)
        row |= worker.ask("memory")
        row["times"] = []
        workers.append((row, worker))
    for _ in range(args.repeats):
        for row, worker in workers:
            row["times"] += worker.ask("time")
    for row, worker in workers:
        worker.close()
        row["median_s"] = statistics.median(row["times"])
        row["best_s"] = min(row.pop("times"))
    return rows


COLUMNS = ("system", "step", "median s", "best s", "peak MB", "time", "memory", "loss", "|grad|")


def table(rows: list[dict], markdown: bool) -> str:
    lines = [COLUMNS]
    plain = {row["system"]: row for row in rows if row["step"] == "plain" and "bytes" in row}
    for row in rows:
        start = SYSTEMS[row["system"]], row["label"]
        if "skipped" in row:
            lines.append((*start, row["skipped"], *[""] * 6))
            continue
        base = plain.get(row["system"])
        lines.append(
            (
                *start,
                f"{row['median_s']:.3f}",
                f"{row['best_s']:.3f}",
                f"{row['bytes'] / MEGABYTE:.0f}",
                f"{row['best_s'] / base['best_s']:.2f}x" if base else "-",
                f"{row['bytes'] / base['bytes']:.2f}x" if base else "-",
                f"{row['loss']:.4f}",
                f"{row['gradient']:.5f}",
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
    add("--systems", nargs="+", choices=SYSTEMS, default=["ft", "ft_frozen"])
    add("--batch", type=int, default=4, help="utterances B")
    add("--frames", type=int, default=200, help="frames T")
    add("--labels", type=int, default=40, help="labels U of a transcript")
    add("--vocab", type=int, default=5000, help="tokens V")
    add("--nbest", type=int, default=4, help="hypotheses N")
    add("--edits", type=float, default=0.1, help="share of a hypothesis's labels that are wrong")
    add("--dim", type=int, default=512, help="width of encoder and joiner")
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3, help="turns of every step")
    add("--turn_seconds", type=float, default=2.0, help="a turn repeats fast steps for this long")
    add("--memory_limit_gb", type=float, default=6.0, help="larger joints are not attempted")
    add("--seed", type=int, default=0)
    add("--json", help="write every number to this file")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_parser().parse_args(argv)
    if args.worker:
        work(args)
        return
    load = os.getloadavg()[0]
    rows = [row for system in args.systems for row in compare(system, args, argv)]
    print(
        f"B={args.batch} T={args.frames} U={args.labels} V={args.vocab} N={args.nbest} "
        f"D={args.dim}, {args.threads} threads, float32, forward + backward after the encoder, "
        f"torch {torch.__version__}; load average at the start {load:.1f} on {os.cpu_count()} cores"
        "\n"
    )
    print(table(rows, args.markdown))
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
