#!/usr/bin/env python3
"""Auxiliary transducer head of a speech LLM: time and memory of its joints, one table.

A step is forward and backward of the whole head (output layers, predictor, loss) on outputs of the
LLM that require gradients. The reference is the dense joint written out, with torchaudio's loss.
Every row lives in a process of its own, so that its peak memory is its own; times are taken in
turns.
"""

import argparse
import json
import sys

import torch
from measuring import compare, serve

# (B, T, U+1, V) tensors alive at the peak of the joint written out, as measured: logits and the
# loss's gradient. Only decides what is not attempted.
FULL_TENSORS = 2
ROWS = {
    "full": "dense joint written out, torchaudio's loss",
    "dense": "dense joint, ours",
    "factorized": "factorized joint, ours",
}


class Labels:
    """A vocabulary of which only the size matters: the texts are labels already."""

    def __init__(self, size: int):
        self.size = size

    def targets(self, text: torch.Tensor, lengths: torch.Tensor):
        return text, lengths


def make_step(kind: str, vocab: int, args):
    """A function that does one step and returns the loss per label."""
    from espnet_llm_plugin.speech_llm.heads.rnnt import RNNTHead

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    sizes = dict(predictor_dim=args.predictor_dim, joint_dim=args.joint_dim)
    joint = "factorized" if kind == "factorized" else "dense"
    head = RNNTHead(Labels(vocab), args.width, joint=joint, **sizes)
    hs = torch.randn(args.batch, args.frames, args.width, requires_grad=True)
    hlens = torch.full((args.batch,), args.frames)
    text = torch.randint(1, vocab, (args.batch, args.labels))
    lengths = torch.full((args.batch,), args.labels)

    def written_out() -> torch.Tensor:
        from torchaudio.functional import rnnt_loss

        joint = head.joint
        by_frame, by_label = joint.frame_linear(hs), joint.history_linear(head.predictor(text))
        logits = joint.output(torch.tanh(by_frame[:, :, None] + by_label[:, None]))
        targets, sizes = text.int(), (hlens.int(), lengths.int())
        return rnnt_loss(logits, targets, *sizes, blank=0, reduction="sum") / text.numel()

    def ours() -> torch.Tensor:
        return head.loss(hs, hlens, text, lengths).reduced(by_length=True)

    parameters = [hs, *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(args.train_steps):
        optimizer.zero_grad()
        ours().backward()
        optimizer.step()

    def step() -> float:
        loss = written_out() if kind == "full" else ours()
        torch.autograd.grad(loss, parameters)
        return loss.item()

    return step


def full_bytes(vocab: int, args) -> float:
    """Of the tensors of the joint written out."""
    cells = args.batch * args.frames * (args.labels + 1)
    return 4.0 * FULL_TENSORS * cells * vocab


def make_rows(args) -> list[dict]:
    rows = []
    for vocab in args.vocab:
        for kind in args.rows:
            row = {"vocab": vocab, "kind": kind}
            need = full_bytes(vocab, args)
            if kind == "full" and need > args.memory_limit_gb * 1e9:
                row["skipped"] = f"does not fit (about {need / 1e9:.1f} GB)"
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| V | joint | s | best s | peak MB | nats per label |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row['vocab']:,}", ROWS[row["kind"]]]
        if "skipped" in row:
            cells += [row["skipped"], "", "", ""]
        else:
            cells += [f"{row['median_s']:.3f}", f"{row['best_s']:.3f}"]
            cells += [f"{row['memory_bytes'] / 1e6:.0f}", f"{row['result']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[500, 5000, 151937])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=100, help="of the prefix")
    parser.add_argument("--labels", type=int, default=30)
    parser.add_argument("--width", type=int, default=896, help="of the LLM")
    parser.add_argument("--predictor_dim", type=int, default=256)
    parser.add_argument("--joint_dim", type=int, default=512)
    parser.add_argument(
        "--train_steps",
        type=int,
        default=0,
        help="optimiser steps beforehand: alignments that are known shorten the backward pass",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_limit_gb", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows there too")
    parser.add_argument("--worker", choices=ROWS, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    if args.worker:
        serve(make_step(args.worker, args.vocab[0], args), "cpu")
        return
    rows = make_rows(args)
    # a vocabulary at a time: its rows take turns
    for vocab in args.vocab:
        some = [row for row in rows if row["vocab"] == vocab]
        compare(
            some,
            lambda row: [*argv, "--worker", row["kind"], "--vocab", str(row["vocab"])],
            args.repeats,
        )
    print(
        f"B = {args.batch}, T = {args.frames}, U = {args.labels}, width {args.width}, predictor "
        f"{args.predictor_dim}, joint {args.joint_dim}, after {args.train_steps} optimiser steps, "
        f"{args.threads} thread(s)\n"
    )
    print(table(rows))
    if args.json:
        with open(args.json, "w") as stream:
            json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
