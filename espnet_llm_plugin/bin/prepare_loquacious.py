"""Write Kaldi data directories of Loquacious, and LM text with ids (stage 1)."""

from pathlib import Path

from espnet2.utils.types import str2bool

from espnet_llm_plugin.bin.data_options import add_jobs_option, new_parser
from espnet_llm_plugin.data.corpora.librispeech import prepare_lm_text
from espnet_llm_plugin.data.corpora.loquacious import (
    CONFIGS,
    REPOSITORY,
    download_loquacious,
    prepare_loquacious,
)
from espnet_llm_plugin.data.parquet_audio import count_skipped
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--loquacious",
        help=f"Local copy of {REPOSITORY}; without it the configuration is downloaded from the "
        "Hugging Face Hub into --download_dir",
    )
    parser.add_argument("--output_dir", default="data", help="Where the data directories appear")
    parser.add_argument(
        "--subset",
        choices=CONFIGS,
        default="small",
        help="250, 2,500 or 25,000 hours, or the clean part of the last",
    )
    parser.add_argument(
        "--lower_case", type=str2bool, default=True, help="Small letters instead of capitals"
    )
    parser.add_argument(
        "--lm_text",
        help="Text for LMs, a sentence a line, e.g. librispeech-lm-norm.txt.gz; written to "
        "<output_dir>/lm_train/text",
    )
    parser.add_argument("--download_dir", default="downloads", help="Where downloads are kept")
    add_jobs_option(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    corpus = args.loquacious or download_loquacious(
        Path(args.download_dir) / "LoquaciousSet", args.subset
    )
    written = prepare_loquacious(
        corpus, args.output_dir, args.subset, lower_case=args.lower_case, nj=args.nj
    )
    for name, (data, skipped) in written.items():
        hours = sum(map(float, data.extra["utt2dur"].values())) / 3600
        print(
            f"{args.output_dir}/{name}: {len(data.utterances)} utterances, {hours:.2f} hours; "
            f"{count_skipped(skipped)}"
        )
    if args.lm_text:
        output = Path(args.output_dir) / "lm_train" / "text"
        count = prepare_lm_text(args.lm_text, output, lower_case=args.lower_case)
        print(f"{output}: {count} sentences")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
