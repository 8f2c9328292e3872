"""Print the options of training that give a speech LLM the languages and pieces of a recipe."""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.speech_llm.recipe import recipe_options
from espnet_llm_plugin.training_config import add_config_options, read_training_config


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_options(parser)
    parser.add_argument(
        "--langs", default="", help="Codes of the recipe's languages, separated by spaces"
    )
    parser.add_argument(
        "--ctc_config", help="config.yaml of the recipe's CTC model, whose pieces are taken"
    )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    config = read_training_config(args.config, args.asr_args)
    pieces = ""
    if args.ctc_config:
        pieces = read_training_config(args.ctc_config).get("bpemodel") or ""
        if not pieces:
            raise UserError(f"{args.ctc_config}: the CTC model has no pieces (bpemodel)")
    print(*recipe_options(config, args.langs.split(), pieces))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
