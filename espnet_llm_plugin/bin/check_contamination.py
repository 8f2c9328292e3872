"""Report how much of test transcripts occurs in the training text of a language model.

By n-grams, up to case: an LM that has seen the test set looks better than it is. The table is
printed; OUTPUT_DIR gets contamination.json and worst.txt, the utterances with most overlap.
"""

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.contamination import (
    HEADER,
    check_contamination,
    read_test_sets,
    text_lines,
    write_report,
)
from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.scoring.table import plain


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("--text", nargs="+", default=[], help="LM text, lines '<id> <sentence>'")
    parser.add_argument("--plain_text", nargs="+", default=[], help="LM text, sentences alone")
    parser.add_argument(
        "--eval_text", nargs="+", required=True, help="'text' of the test sets' data directories"
    )
    parser.add_argument("--ngram", type=int, default=8, help="Words of an n-gram")
    parser.add_argument("--listed", type=int, default=100, help="Utterances of a set in worst.txt")
    parser.add_argument("--output_dir", required=True, help="E.g. exp/lm_llama/contamination")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    if not args.text and not args.plain_text:
        raise UserError("give the LM's text by --text or --plain_text")
    lines = text_lines(args.text, args.plain_text)
    overlaps = check_contamination(lines, read_test_sets(args.eval_text), args.ngram)
    write_report(overlaps, args.output_dir, args.ngram, args.listed)
    print(f"{args.ngram}-grams of the test transcripts that are in the LM's text:")
    print(plain(HEADER, [overlap.row() for overlap in overlaps]), end="")
    if any(overlap.worst for overlap in overlaps):
        print(f"utterances with most of them: {args.output_dir}/worst.txt")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
