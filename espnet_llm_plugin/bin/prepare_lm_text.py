"""Join LM training texts, drop empty lines, and look for sentences of the evaluation sets."""

from espnet2.utils.types import str2bool

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.lm_text import CONTAMINATION, prepare_lm_text
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("--text", nargs="+", default=[], help="Files of lines '<id> <sentence>'")
    parser.add_argument(
        "--plain_text", nargs="+", default=[], help="Files of sentences; ids are made up"
    )
    parser.add_argument("--output", required=True, help="E.g. dump/raw/lm_train.txt")
    parser.add_argument(
        "--eval_text", nargs="+", default=[], help="'text' of dev and test sets to look out for"
    )
    parser.add_argument(
        "--contamination", choices=CONTAMINATION, default="keep", help="What to do with such lines"
    )
    parser.add_argument(
        "--lowercase", type=str2bool, default=False, help="Write the sentences in lower case"
    )
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    counts = prepare_lm_text(
        args.text,
        args.output,
        plain_texts=args.plain_text,
        evaluation_texts=args.eval_text,
        contamination=args.contamination,
        lowercase=args.lowercase,
    )
    fate = {"keep": "kept", "drop": "dropped", "error": "found"}[args.contamination]
    print(
        f"{args.output}: {counts.written} lines; {counts.empty} empty ones dropped, "
        f"{counts.contaminated} equal to a sentence of the evaluation sets {fate}"
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
