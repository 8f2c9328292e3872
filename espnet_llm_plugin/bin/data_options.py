"""Options that the command lines for data directories share."""

import argparse
import os

from espnet2.utils.types import str2bool


def _jobs(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How to read a data directory and what to do with faults in it."""
    parser.add_argument(
        "--drop_bad",
        type=str2bool,
        default=False,
        help="Leave out utterances with faults, count and list them, instead of stopping",
    )
    parser.add_argument(
        "--require_text", type=str2bool, default=True, help="Whether a file 'text' must be there"
    )
    parser.add_argument(
        "--utt_as_spk",
        type=str2bool,
        default=False,
        help="Without a file 'utt2spk' let every utterance be its own speaker",
    )
    add_jobs_option(parser)


def add_jobs_option(parser: argparse.ArgumentParser) -> None:
    """How many jobs at once."""
    parser.add_argument(
        "--nj", type=_jobs, default=min(8, os.cpu_count() or 1), help="Number of parallel jobs"
    )
