"""Write a data directory whose wav.scp names plain files of one format (ESPnet's stage 3)."""

from espnet2.utils.types import humanfriendly_parse_size_or_none, int_or_none

from espnet_llm_plugin.bin.data_options import add_reading_options, new_parser
from espnet_llm_plugin.data.format import AUDIO_FORMATS, DROPPED, format_data_dir
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("source_dir", help="Kaldi data directory, e.g. data/train")
    parser.add_argument("target_dir", help="E.g. dump/raw/org/train; audio goes to its data/")
    parser.add_argument(
        "--fs",
        type=humanfriendly_parse_size_or_none,
        help="Sampling rate, e.g. 16k; 'none' keeps the one of the sources",
    )
    parser.add_argument("--audio_format", choices=AUDIO_FORMATS, default="flac", help="16 bit each")
    parser.add_argument(
        "--ref_channel", type=int_or_none, help="Channel of multi-channel recordings, from 0"
    )
    add_reading_options(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    summary = format_data_dir(
        args.source_dir,
        args.target_dir,
        fs=args.fs,
        audio_format=args.audio_format,
        ref_channel=args.ref_channel,
        nj=args.nj,
        drop_bad=args.drop_bad,
        require_text=args.require_text,
        utterance_is_speaker=args.utt_as_spk,
        progress=True,
    )
    print(
        f"{args.target_dir}: {summary.utterances} utterances, {summary.seconds / 3600:.2f} hours"
        f" ({summary.reused} finished before)"
        + (f"; {summary.dropped} ids dropped, see {DROPPED}" if summary.dropped else "")
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
