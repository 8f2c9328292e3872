"""How well an LLM in ASR pieces copies from its context: what a speech LLM needs it for.

Prints and writes loss and accuracy of the text alone (`loss_plain`, `acc_plain`), after a noisy
copy of it (`loss_copy`, `acc_copy`), after a clean one (`acc_clean`), and of random pieces after a
clean copy, where knowing the language does not help (`acc_random`). `gap_copy` is the loss after
the noisy copy of another sentence minus `loss_copy`: about 0 if the LLM ignores its context.
"""

import argparse
import json
from typing import Optional, Sequence

from espnet_llm_plugin.errors import UserError, run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.copy_accuracy",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--llm", required=True, help="directory with tokens.txt")
    parser.add_argument("--text", required=True, help="`id words ...` a line")
    parser.add_argument("--max_sentences", type=int, help="as many sentences, from the start")
    parser.add_argument(
        "--output", required=True, help="JSON file to write, unless --require fails"
    )
    parser.add_argument(
        "--require",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fail unless these figures are at least so high, e.g. acc_random=0.9",
    )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin.data.atomic import atomic_write
    from espnet_llm_plugin.llm.copy_accuracy import measure_directory
    from espnet_llm_plugin.llm.copy_noise import CopyNoise
    from espnet_llm_plugin.llm.perplexity import read_text

    sentences = read_text(args.text, has_ids=True, max_lines=args.max_sentences)
    figures = measure_directory(args.llm, sentences, CopyNoise())
    print(f"{args.llm}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    for requirement in args.require:
        name, _, bound = requirement.partition("=")
        if name not in figures or not _is_number(bound):
            raise UserError(
                f"--require {requirement}: expected NAME=VALUE with one of {', '.join(figures)}."
            )
        if figures[name] < float(bound):
            raise UserError(
                f"{args.llm} does not copy well enough: {name} is {figures[name]:.3f}, at least "
                f"{bound} is required. A speech LLM with it would hardly learn to use the audio; "
                "train it longer, or with more layers."
            )
    with atomic_write(args.output) as stream:
        json.dump(figures, stream, indent=1)
        stream.write("\n")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
