"""Write a data directory of several speeds of another one (ESPnet's stage 2), without sox."""

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.perturb import perturb_speed
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("source_dir", help="Kaldi data directory, e.g. data/train")
    parser.add_argument("target_dir", help="E.g. data/train_sp")
    parser.add_argument(
        "--factors", nargs="+", default=["0.9", "1.0", "1.1"], help="1.0 is the original"
    )
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    count = perturb_speed(args.source_dir, args.target_dir, args.factors)
    print(f"{args.target_dir}: {count} utterances at speeds {' '.join(args.factors)}")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
