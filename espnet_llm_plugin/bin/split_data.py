"""Divide the lines of a key file (e.g. wav.scp) among jobs; prints the number of jobs."""

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.split import split_keys
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("key_file", help="One key at the beginning of each line")
    parser.add_argument("--nj", type=int, required=True, help="Most jobs wanted")
    parser.add_argument("--output_dir", required=True, help="Gets <name>.1.scp, <name>.2.scp, ...")
    parser.add_argument("--name", default="keys", help="Beginning of the files' names")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    print(split_keys(args.key_file, args.nj, args.output_dir, args.name))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
