"""Merge the <n>best_recog directories of decoding jobs into one, sorted and complete."""

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.split import merge_outputs
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("input_dirs", nargs="+", help="Output directories of the jobs")
    parser.add_argument("--output_dir", required=True, help="Where the merged files go")
    parser.add_argument("--key_file", required=True, help="All keys that were to be decoded")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    for name, count in merge_outputs(args.input_dirs, args.output_dir, args.key_file).items():
        print(f"{args.output_dir}/{name}: {count} lines")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
