"""Build an LLM over the tokens of an ASR model from a Hugging Face LLM."""

import argparse
import sys
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli

TRUE_FALSE = {"true": True, "false": False}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adapt_vocabulary",
        description="Replace the vocabulary of an LLM by an ASR token list: tokens that the LLM "
        "has keep their rows, others get a mix of the rows of their sub-tokens. Writes a Hugging "
        "Face directory, for the `llm` predictor and for fine-tuning by lm_train.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--llm", required=True, help="LLM directory or hub id, e.g. Qwen/Qwen2.5-0.5B"
    )
    parser.add_argument("--token_list", required=True, help="ESPnet's tokens.txt")
    parser.add_argument("--bpemodel", help="sentencepiece model of the token list")
    parser.add_argument(
        "--token_type", choices=["bpe", "char", "word"], help="guessed from the list if not given"
    )
    parser.add_argument("--output_dir", required=True, help="directory to create")
    parser.add_argument(
        "--oov_init",
        default="mean",
        choices=["mean", "length_weighted_mean", "first", "random"],
        help="rows of tokens that the LLM does not have",
    )
    parser.add_argument(
        "--exact_match",
        default="true",
        choices=list(TRUE_FALSE),
        help="copy the row of a token that the LLM has",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --oov_init random")
    parser.add_argument(
        "--text", help="text to measure the word-level perplexity on, one sentence a line"
    )
    parser.add_argument(
        "--text_has_ids",
        default="false",
        choices=list(TRUE_FALSE),
        help="the first field of each line is an utterance id (Kaldi)",
    )
    parser.add_argument(
        "--max_text_lines", type=int, default=1000, help="sentences of --text to use at most"
    )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> int:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin.llm.adaptation import adapt_llm

    report = adapt_llm(
        args.llm,
        args.token_list,
        args.output_dir,
        bpemodel=args.bpemodel,
        token_type=args.token_type,
        oov_init=args.oov_init,
        exact_match=TRUE_FALSE[args.exact_match],
        seed=args.seed,
        text=args.text,
        text_has_ids=TRUE_FALSE[args.text_has_ids],
        max_text_lines=args.max_text_lines,
    )
    sys.stdout.write(report)
    return 0


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
