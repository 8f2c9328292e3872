"""Write Kaldi data directories of LibriSpeech, and its LM text with ids (stage 1)."""

from pathlib import Path

from espnet2.utils.types import str2bool

from espnet_llm_plugin.bin.data_options import add_jobs_option, new_parser
from espnet_llm_plugin.data.corpora.librispeech import (
    SETS,
    download_librispeech,
    download_lm_text,
    parts_of,
    prepare_librispeech,
    prepare_lm_text,
)
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--librispeech",
        help="Local copy: directory with train-clean-100, ..., or with LibriSpeech/; without it "
        "the parts are downloaded into --download_dir",
    )
    parser.add_argument("--output_dir", default="data", help="Where the data directories appear")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=["train_960", "dev", "dev_clean", "dev_other", "test_clean", "test_other"],
        help=f"Data directories to write, some of {', '.join(SETS)}",
    )
    parser.add_argument(
        "--lower_case", type=str2bool, default=True, help="Small letters instead of capitals"
    )
    parser.add_argument(
        "--lm_text",
        help="librispeech-lm-norm.txt.gz, or 'download'; written to <output_dir>/lm_train/text",
    )
    parser.add_argument("--download_dir", default="downloads", help="Where downloads are kept")
    add_jobs_option(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    corpus = args.librispeech or download_librispeech(args.download_dir, parts_of(args.sets))
    written = prepare_librispeech(
        corpus, args.output_dir, args.sets, lower_case=args.lower_case, nj=args.nj
    )
    for name, data in written.items():
        speakers = len(set(data.utt2spk.values()))
        print(f"{args.output_dir}/{name}: {len(data.utterances)} utterances, {speakers} speakers")
    if args.lm_text:
        source = args.lm_text
        if source == "download":
            source = download_lm_text(args.download_dir)
        output = Path(args.output_dir) / "lm_train" / "text"
        count = prepare_lm_text(source, output, lower_case=args.lower_case)
        print(f"{output}: {count} sentences")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
