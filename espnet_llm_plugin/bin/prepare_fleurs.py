"""Write Kaldi data directories of FLEURS's ten Indic languages, with utt2lang (stage 1).

Transcripts are normalised (see espnet_llm_plugin.data.indic_text). <split>/transcripts.txt lists
those of which nothing is left, and those with words of other scripts.
"""

import sys
from collections import Counter
from pathlib import Path

from espnet_llm_plugin.bin.data_options import add_jobs_option, new_parser
from espnet_llm_plugin.data.corpora.ai4bharat import SETS
from espnet_llm_plugin.data.corpora.balance import write_balanced_text
from espnet_llm_plugin.data.corpora.fleurs import TEXT_FIELDS, URL, describe_mismatches
from espnet_llm_plugin.data.corpora.indic import REPORT, prepare_indic
from espnet_llm_plugin.data.indic_text import DIGITS, JOINERS, LANGUAGES, LATIN, TextOptions
from espnet_llm_plugin.data.indic_transcripts import MIXED_SCRIPTS, describe
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--fleurs",
        required=True,
        help=f"Directory with hi_in, bn_in, ...: of `lhotse download fleurs`, or from {URL}",
    )
    for name in SETS:
        parser.add_argument(f"--{name}", help="Local copy of this set: more training data")
    parser.add_argument("--langs", nargs="+", default=list(LANGUAGES), help="Languages to take")
    parser.add_argument(
        "--output_dir",
        default="data",
        help="Where train/, dev/, test/ and balanced_text appear; the latter has (nearly) as many "
        "characters of every language, and all that occur, for the token list",
    )
    group = parser.add_argument_group("text")
    group.add_argument(
        "--fleurs_text", choices=TEXT_FIELDS, default=TEXT_FIELDS[0], help="Column to take"
    )
    group.add_argument("--digits", choices=DIGITS, default=DIGITS[0], help="Spelling of digits")
    group.add_argument(
        "--joiners",
        choices=JOINERS,
        default=JOINERS[0],
        help="ZWJ and ZWNJ to keep: those that make another letter, all within words, or none",
    )
    group.add_argument("--latin", choices=LATIN, default=LATIN[0], help="Case of Latin words")
    group.add_argument(
        "--mixed_scripts",
        choices=MIXED_SCRIPTS,
        default=MIXED_SCRIPTS[0],
        help="Training utterances with words of other scripts",
    )
    add_jobs_option(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    prepared = prepare_indic(
        args.fleurs,
        args.output_dir,
        args.langs,
        more_train={name: getattr(args, name) for name in SETS if getattr(args, name)},
        text_field=args.fleurs_text,
        options=TextOptions(args.digits, args.joiners, args.latin),
        mixed_scripts=args.mixed_scripts,
        nj=args.nj,
    )
    for split, data in prepared.data.items():
        counts = Counter(data.extra["utt2lang"].values())
        shares = ", ".join(f"{lang} {counts[lang]}" for lang in args.langs)
        print(f"{args.output_dir}/{split}: {len(data.utterances)} utterances ({shares})")
        if prepared.odd[split]:
            odd = describe(prepared.odd[split], prepared.utt2lang)
            print(f"warning: {args.output_dir}/{split}/{REPORT}: {odd}", file=sys.stderr)
    if prepared.mismatches:
        print(f"warning: {describe_mismatches(prepared.mismatches)}", file=sys.stderr)
    train = prepared.data["train"]
    output = Path(args.output_dir) / "balanced_text"
    characters = write_balanced_text(
        train.text, train.extra["utt2lang"], output, cover_characters=True
    )
    print(f"{output}: {characters.total()} characters of {len(characters)} languages")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
