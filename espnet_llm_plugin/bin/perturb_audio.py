"""Play audio faster or slower: the command in wav.scp of speed-perturbed data directories.

Reads a file, an archive offset or standard input (``-``), writes a 16-bit WAV to standard output.
"""

import argparse
import sys

from espnet_llm_plugin.data import audio
from espnet_llm_plugin.errors import UserError, run_cli


def get_parser():
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("factor", help="Speed, e.g. 0.9")
    parser.add_argument("audio", help="File, archive offset (foo.ark:1234) or -")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    try:
        factor = float(args.factor)
    except ValueError as error:
        raise UserError(f"speed factor '{args.factor}' is not a number") from error
    with audio.open_recording(args.audio) as recording:
        samples = audio.change_speed(recording.read(), recording.rate, factor)
        sys.stdout.buffer.write(audio.encode(samples, recording.rate, "wav"))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
