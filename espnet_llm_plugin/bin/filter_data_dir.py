"""Remove utterances that are too short, too long or have no transcript (ESPnet's stage 4)."""

from espnet2.utils.types import humanfriendly_parse_size_or_none

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.filter import REMOVED, filter_data_dir
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("source_dir", help="Formatted data directory, e.g. dump/raw/org/train")
    parser.add_argument("target_dir", help="E.g. dump/raw/train")
    parser.add_argument(
        "--fs", type=humanfriendly_parse_size_or_none, default="16k", help="Its sampling rate"
    )
    parser.add_argument("--min_wav_duration", type=float, default=0.1, help="Seconds, exclusive")
    parser.add_argument("--max_wav_duration", type=float, default=20.0, help="Seconds, exclusive")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    counts = filter_data_dir(
        args.source_dir,
        args.target_dir,
        fs=args.fs,
        min_duration=args.min_wav_duration,
        max_duration=args.max_wav_duration,
    )
    print(
        f"{args.target_dir}: {counts.kept} utterances kept; removed: {counts.too_short} too short, "
        f"{counts.too_long} too long, {counts.empty} without transcript (see {REMOVED})"
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
