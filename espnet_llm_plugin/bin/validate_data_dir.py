"""Check a Kaldi data directory, and optionally write a clean copy of it."""

import sys

from espnet_llm_plugin.bin.data_options import add_reading_options, new_parser
from espnet_llm_plugin.data.validate import AUDIO_CHECKS, validate_data_dir
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("data_dir", help="Kaldi data directory")
    parser.add_argument("--output_dir", help="Write a copy with resolved paths and spk2utt here")
    parser.add_argument("--check_audio", choices=AUDIO_CHECKS, default="header", help="How closely")
    add_reading_options(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    data, problems = validate_data_dir(
        args.data_dir,
        output_dir=args.output_dir,
        drop_bad=args.drop_bad,
        check_audio=args.check_audio,
        nj=args.nj,
        require_text=args.require_text,
        utterance_is_speaker=args.utt_as_spk,
        progress=True,
    )
    if problems.found:
        print(problems.message(), file=sys.stderr)
    speakers = len(set(data.utt2spk.values()))
    print(
        f"{args.data_dir}: {len(data.utterances)} utterances, {speakers} speakers"
        + (f"; {len(problems.keys)} ids with problems dropped" if problems.found else "")
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
