"""Make a corpus of synthetic speech (egs2/mini, egs2/stories): Kaldi data directories, LM text."""

import argparse
import os
import time
from dataclasses import replace
from typing import Optional, Sequence

from espnet_llm_plugin.data.synthetic.corpus import PRESETS, make_corpus
from espnet_llm_plugin.errors import run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", default="data", help="where train/, dev/, test/ appear")
    parser.add_argument("--size", choices=sorted(PRESETS), default="mini")
    for name in ("train", "dev", "test", "lm"):
        parser.add_argument(
            f"--num_{name}", type=int, help=f"utterances of {name} instead of those of --size"
        )
    parser.add_argument(
        "--text", help="directory of {train,dev,test,lm}/text to speak (default: a grammar's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus")
    parser.add_argument(
        "--nj", type=int, default=len(os.sched_getaffinity(0)), help="number of processes"
    )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    chosen = {name: getattr(args, f"num_{name}") for name in ("train", "dev", "test", "lm")}
    sizes = replace(PRESETS[args.size], **{k: v for k, v in chosen.items() if v is not None})
    started = time.perf_counter()
    report, made = make_corpus(args.output_dir, sizes, args.seed, args.nj, args.text)
    seconds = time.perf_counter() - started
    print(f"{args.output_dir}: " + (f"made in {seconds:.0f} s" if made else "already complete"))
    print(
        f"{'set':6s}{'utts':>7s}{'words':>8s}{'hours':>7s}{'speakers':>9s}{'words/s':>8s}"
        f"{'vocab':>6s}{'OOV train':>10s}{'OOV LM':>8s}{'homophones':>11s}{'grammar PPL':>12s}"
    )
    for name, row in report["sets"].items():
        hours = f"{row['hours']:.2f}" if "hours" in row else "-"
        perplexity = f"{row['grammar_ppl']:.1f}" if "grammar_ppl" in row else "-"
        speed = f"{row['words_per_second']:.2f}" if "hours" in row else "-"
        print(
            f"{name:6s}{row['utterances']:7d}{row['words']:8d}{hours:>7s}"
            f"{row.get('speakers', '-'):>9}{speed:>8s}{row['vocabulary']:6d}"
            f"{row['oov_train']:10.2%}{row['oov_lm']:8.2%}{row['homophones']:11.1%}"
            f"{perplexity:>12s}"
        )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
