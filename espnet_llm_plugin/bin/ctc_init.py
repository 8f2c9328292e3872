"""Print the ``--init_param`` values of a training: a CTC model's, then the configuration's own.

On the command line ESPnet's ``--init_param`` replaces that of the configuration; so both are given.
"""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.training_config import (
    add_config_options,
    initial_values,
    read_training_config,
)
from espnet_llm_plugin.transducer.ctc_init import init_params


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ctc", help="Checkpoint (.pth) of a CTC model to start from")
    add_config_options(parser)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    config = read_training_config(args.config, args.asr_args)
    values = [] if args.ctc is None else init_params(args.ctc, config)
    print(*values, *initial_values(config))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
