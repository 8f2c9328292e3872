"""Print the ``--init_param`` values that start another model from a trained CTC model."""

import argparse
from typing import Optional, Sequence

import yaml

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.transducer.ctc_init import init_params


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ctc", required=True, help="Checkpoint (.pth) of the CTC model")
    parser.add_argument("--config", required=True, help="Training configuration of that model")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    with open(args.config, encoding="utf-8") as stream:
        config = yaml.safe_load(stream)
    print(" ".join(init_params(args.ctc, config)))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
