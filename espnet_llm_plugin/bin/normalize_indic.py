"""Spell other text (for an LM, of another system) as the transcripts of egs2/indic."""

import sys

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.indic_text import DIGITS, JOINERS, LANGUAGES, LATIN, TextOptions
from espnet_llm_plugin.data.indic_transcripts import normalize_table
from espnet_llm_plugin.data.kaldi import read_clean_table, write_table
from espnet_llm_plugin.errors import UserError, run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("--text", required=True, help="File of lines '<id> <sentence>'")
    parser.add_argument("--output", required=True, help="File to write, sorted by id")
    parser.add_argument("--lang", choices=LANGUAGES, help="Language of all lines")
    parser.add_argument("--utt2lang", help="Table '<id> <language>'")
    parser.add_argument("--digits", choices=DIGITS, default=DIGITS[0], help="Spelling of digits")
    parser.add_argument("--joiners", choices=JOINERS, default=JOINERS[0], help="Those to keep")
    parser.add_argument("--latin", choices=LATIN, default=LATIN[0], help="Case of Latin words")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    if (args.lang is None) == (args.utt2lang is None):
        raise UserError("give either --lang or --utt2lang")
    text = read_clean_table(args.text, may_be_empty=True)
    utt2lang = dict.fromkeys(text, args.lang)
    if args.utt2lang is not None:
        utt2lang = read_clean_table(args.utt2lang)
    options = TextOptions(args.digits, args.joiners, args.latin)
    normalized = normalize_table(args.text, text, utt2lang, options)
    write_table(args.output, normalized)
    empty = sum(not line for line in normalized.values())
    print(f"{args.output}: {len(normalized)} lines")
    if empty:
        print(f"warning: {empty} line(s) have nothing but their id", file=sys.stderr)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
