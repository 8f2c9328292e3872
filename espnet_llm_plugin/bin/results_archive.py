"""Keep what a table of results was made of in a tar.xz file, or bring it back.

A long experiment can then go on elsewhere, or later, without the models that it has trained.
"""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.scoring.results_archive import collect, restore


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.results_archive", description=__doc__
    )
    parser.add_argument("--archive", required=True, help="the tar.xz file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--collect",
        metavar="CONFIG",
        help="add the files of all scored systems of this YAML file (see bin/results_table)",
    )
    what.add_argument(
        "--restore", action="store_true", help="write the files that are not here already"
    )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    if args.restore:
        print(f"{args.archive}: {restore(args.archive)} files restored")
    else:
        print(f"{args.archive}: {collect(args.collect, args.archive)} files")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
