#!/usr/bin/env python3
"""Joint search of CTC and a decoder: with and without smaller vocabulary and fewer frames.

The decoder is simulated, so that time and memory are those of the joint search: it prefers the
right token, at some positions a wrong one, with noise over all V tokens. The CTC posteriors have a
peak of one or two frames for each token, at other positions a wrong one, and noise. So both are
needed for a low error rate (TER, per cent of the tokens), which shows what a reduction costs.

* decoder alone: the floor, whatever the CTC;
* all labels: the prefix scorer of the package, without reductions;
* ESPnet: its `CTCPrefixScoreTH` over all labels in the same search, one utterance at a time, as
  ESPnet decodes; left out beyond --memory_limit_gb (it takes minutes there);
* top-k, compressed, both: see `espnet_llm_plugin.fusion.ctc_prefix_scorer`.

    python benchmarks/joint_ctc_decode.py --vocabs 500 10000 152000
"""

import argparse
import json
import math
from pathlib import Path
from typing import Callable, Optional

import torch
from measuring import compare, serve
from rapidfuzz.distance import Levenshtein

from espnet_llm_plugin.errors import run_cli

ROWS = {
    "decoder": "decoder alone",
    "none": "all labels",
    "top_k": "top-k",
    "compress": "compressed",
    "both": "top-k and compressed",
    "espnet": "ESPnet's scorer",
}
# Frames of a token: a peak of one or two, then blanks.
PERIOD = 4
# Decoder and CTC err at so many positions, and the decoder's noise repeats after so many.
ERRORS, NOISE_ROWS = 0.25, 8
# (T, N, V) float32 tensors alive in ESPnet's step; only decides what is not attempted.
ESPNET_TENSORS = 9


class Task:
    """References, what the decoder and the CTC hear, and posteriors.

    Args:
        args: Sizes.

    Attributes:
        reference: Token ids (B, U).
        heard: What the decoder prefers at each position (B, U).
        log_probs: Posteriors (B, T, V).
    """

    def __init__(self, args: argparse.Namespace):
        generator = torch.Generator().manual_seed(args.seed)
        vocab, shape = args.vocab, (args.batch, args.frames // PERIOD)

        def tokens() -> torch.Tensor:
            return torch.randint(1, vocab - 1, shape, generator=generator)

        def misheard(share: float) -> torch.Tensor:
            wrong = torch.rand(shape, generator=generator) < share
            return torch.where(wrong, tokens(), self.reference)

        self.reference = tokens()
        self.heard = misheard(ERRORS)
        peaks = misheard(ERRORS)
        # 1. Noise of which the sum is about log V + 2, and surer or less sure peaks.
        logits = torch.randn((args.batch, args.frames, vocab), generator=generator)
        height = torch.empty(args.batch, args.frames).uniform_(0, 8, generator=generator)
        height += math.log(vocab) + 1.0
        frames = torch.arange(args.frames)
        width = torch.randint(1, 3, shape, generator=generator).repeat_interleave(PERIOD, 1)
        label = peaks.repeat_interleave(PERIOD, 1)
        length = label.size(1)
        label = torch.where(frames[:length] % PERIOD < width, label, 0)
        label = torch.nn.functional.pad(label, (0, args.frames - length))
        logits.scatter_(2, label[:, :, None], height[:, :, None])
        # 2. The right token is heard a little where another one is louder.
        right = self.reference.repeat_interleave(PERIOD, 1)[:, :, None]
        quiet = height[:, :length, None] - 4.0
        at_peak = (frames[:length] % PERIOD < width)[:, :, None]
        before = logits[:, :length].gather(2, right)
        logits[:, :length].scatter_(
            2, right, torch.where(at_peak, torch.maximum(before, quiet), before)
        )
        self.log_probs = logits.log_softmax(-1)


class SimulatedDecoder:
    """A ``TokenScorer`` that looks at the position only."""

    def __init__(self, task: Task, vocab: int, seed: int, utterances: list[int]):
        generator = torch.Generator().manual_seed(seed + 1)
        self.noise = torch.randn(NOISE_ROWS, vocab, generator=generator)
        end = torch.full((len(task.reference), 1), vocab - 1)
        self.heard = torch.cat([task.heard, end], 1)
        self.right = torch.cat([task.reference, end], 1)
        self.height = math.log(vocab) + 2.5
        self.utterance = torch.tensor(utterances)
        self.position = torch.full((len(utterances),), -1)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        self.utterance = self.utterance[parents]
        self.position = (self.position[parents] + 1).clamp(max=self.heard.size(1) - 1)
        logits = self.noise[self.position % NOISE_ROWS]
        rows = torch.arange(len(tokens))
        logits[rows, self.right[self.utterance, self.position]] = self.height - 3.0
        logits[rows, self.heard[self.utterance, self.position]] = self.height
        logits[:, 0] = -torch.inf
        return logits.log_softmax(-1)


class ESPnetCTC:
    """A ``PartialScorer`` of one utterance by ESPnet's ``CTCPrefixScoreTH``."""

    candidates = None

    def __init__(self, log_probs: torch.Tensor):
        from espnet.nets.ctc_prefix_score import CTCPrefixScoreTH

        frames, self.vocab = log_probs.shape
        lengths = torch.tensor([frames])
        self.scorer = CTCPrefixScoreTH(log_probs[None], lengths, 0, self.vocab - 1)
        self.prefixes, self.state = [[self.vocab - 1]], None

    def score(self) -> torch.Tensor:
        scores, self.new = self.scorer(self.prefixes, self.state)
        return scores.masked_fill(scores < -1e8, -torch.inf)

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        r, psi, *rest = self.new
        # as index_select_state, which wants as many hypotheses as before
        self.state = (
            r[:, :, parents, tokens],
            psi[parents, tokens][:, None].expand(-1, self.vocab),
            *rest[:2],
        )
        self.prefixes = [
            [*self.prefixes[parent], token]
            for parent, token in zip(parents.tolist(), tokens.tolist())
        ]


def make_run(args: argparse.Namespace) -> Callable:
    """One decoding of the task by the row ``args.worker``."""
    from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
    from espnet_llm_plugin.speech_llm.joint_ctc import JointCTC
    from espnet_llm_plugin.speech_llm.search import LabelSearch

    task = Task(args)
    search = LabelSearch(
        sos=args.vocab - 1,
        eos=args.vocab - 1,
        vocab_size=args.vocab,
        beam_size=args.beam,
        weights=SearchWeights(ctc_weight=0.0 if args.worker == "decoder" else args.ctc_weight),
        forbidden=(0,),
    )
    top_k = args.top_k if args.worker in ("top_k", "both") else None
    threshold = args.threshold if args.worker in ("compress", "both") else None

    def some(utterances: list[int]) -> list[list[int]]:
        ctc = None
        if args.worker == "espnet":
            ctc = ESPnetCTC(task.log_probs[utterances[0]].clone())
        elif args.worker != "decoder":
            ctc = JointCTC(
                task.log_probs,
                torch.full((len(utterances),), args.frames),
                vocab_size=args.vocab,
                eos=args.vocab - 1,
                top_k=top_k,
                compress_threshold=threshold,
            )
        decoder = SimulatedDecoder(task, args.vocab, args.seed, utterances)
        # without CTC nothing but the end symbol ends a hypothesis
        limits = [args.frames // PERIOD + 2] * len(utterances)
        return [list(hyps[0].tokens) for hyps in search({"decoder": decoder}, limits, ctc=ctc)]

    @torch.inference_mode()
    def run() -> float:
        everyone = list(range(args.batch))
        if args.worker == "espnet":
            found = [some([utterance])[0] for utterance in everyone]
        else:
            found = some(everyone)
        errors = sum(map(Levenshtein.distance, task.reference.tolist(), found))
        return 100 * errors / task.reference.numel()

    return run


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    names = ("batch", "beam", "frames", "top_k", "threshold", "ctc_weight", "threads", "seed")
    shared = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    for vocab in args.vocabs:
        some = [dict(scorer=name, vocab=vocab) for name in args.scorers]
        for row in some:
            need = 4.0 * ESPNET_TENSORS * args.beam * args.frames * vocab
            if row["scorer"] == "espnet" and need > args.memory_limit_gb * 1e9:
                row["skipped"] = f"left out (about {need / 1e9:.1f} GB for one utterance)"
            if row["scorer"] in ("top_k", "both") and args.top_k + 2 >= vocab:
                row["skipped"] = f"{args.top_k} labels are all of them"

        def options(row: dict) -> list[str]:
            return ["--worker", row["scorer"], "--vocab", str(row["vocab"]), *shared]

        compare(some, options, args.repeats)
        rows += some
    return rows


def show(rows: list[dict]) -> str:
    """A table; factors are against all labels without reductions."""
    lines = ["|V|CTC|s a batch|peak MB|faster|less memory|TER|", "|---|---|---|---|---|---|---|"]
    plain = {row["vocab"]: row for row in rows if row["scorer"] == "none"}
    for row in rows:
        begin = f"|{row['vocab']}|{ROWS[row['scorer']]}|"
        if "skipped" in row:
            lines.append(f"{begin}{row['skipped']}|||||")
            continue
        base = plain.get(row["vocab"], row)
        lines.append(
            f"{begin}{row['median_s']:.2f}|{row['memory_bytes'] / 1e6:.0f}"
            f"|{base['median_s'] / row['median_s']:.1f}x"
            f"|{base['memory_bytes'] / max(1.0, row['memory_bytes']):.1f}x|{row['result']:.2f}|"
        )
    return "\n".join(lines)


def main(cmd: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabs", nargs="+", type=int, default=[500, 10000, 152000])
    parser.add_argument("--scorers", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--frames", type=int, default=160)
    parser.add_argument("--top_k", type=int, default=1000)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--ctc_weight", type=float, default=0.5)
    parser.add_argument("--memory_limit_gb", type=float, default=1.0, help="of ESPnet's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # in a worker process
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(cmd)
    if args.worker:
        torch.set_num_threads(args.threads)
        serve(make_run(args), "cpu")
        return
    rows = measure(args)
    print(
        f"{args.batch} utterances of {args.frames} frames, beam {args.beam}, {args.threads} "
        f"threads, torch {torch.__version__}\n"
    )
    print(show(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
