"""Write Kaldi data directories of Multilingual LibriSpeech, with utt2lang (stage 1)."""

import sys
from collections import Counter
from pathlib import Path

from espnet_llm_plugin.bin.data_options import add_jobs_option, new_parser
from espnet_llm_plugin.data.corpora.balance import write_balanced_text
from espnet_llm_plugin.data.corpora.mls import LANGUAGES, URL, describe_mismatches, prepare_mls
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--mls", required=True, help=f"Directory with mls_german, mls_french_opus, ... from {URL}"
    )
    parser.add_argument("--langs", nargs="+", default=list(LANGUAGES), help="Languages to take")
    parser.add_argument(
        "--output_dir",
        default="data",
        help="Where train/, dev/, test/ and balanced_text appear; the latter has as many "
        "characters of every language, for the token list",
    )
    add_jobs_option(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    written, mismatches = prepare_mls(args.mls, args.output_dir, args.langs, nj=args.nj)
    for split, data in written.items():
        counts = Counter(data.extra["utt2lang"].values())
        shares = ", ".join(f"{lang} {counts[lang]}" for lang in args.langs)
        print(f"{args.output_dir}/{split}: {len(data.utterances)} utterances ({shares})")
    if mismatches:
        print(f"warning: {describe_mismatches(mismatches)}", file=sys.stderr)
    train = written["train"]
    output = Path(args.output_dir) / "balanced_text"
    characters = write_balanced_text(train.text, train.extra["utt2lang"], output)
    print(f"{output}: {characters.total()} characters of {len(characters)} languages")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
