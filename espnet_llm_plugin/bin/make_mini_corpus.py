"""Make a small synthetic corpus in the layout of FLEURS, LibriSpeech, Loquacious or MLS."""

from dataclasses import fields

from espnet_llm_plugin.bin.data_options import add_jobs_option, new_parser
from espnet_llm_plugin.data.corpora import mini_fleurs, mini_librispeech, mini_loquacious, mini_mls
from espnet_llm_plugin.errors import UserError, run_cli

CORPORA = {
    "fleurs": (mini_fleurs.make_mini_fleurs, mini_fleurs.Sizes),
    "librispeech": (mini_librispeech.make_mini_librispeech, mini_librispeech.Sizes),
    "loquacious": (mini_loquacious.make_mini_loquacious, mini_loquacious.Sizes),
    "mls": (mini_mls.make_mini_mls, mini_mls.Sizes),
}


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("corpus", choices=sorted(CORPORA))
    parser.add_argument("output_dir", help="Directory to make")
    for name in ("train", "dev", "test", "lm"):
        parser.add_argument(f"--{name}", type=int, help=f"Another size of {name} (see the module)")
    parser.add_argument("--langs", nargs="+", help="Languages of fleurs, mls (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="Another seed, other sentences")
    add_jobs_option(parser)
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    make, sizes = CORPORA[args.corpus]
    given = {n: getattr(args, n) for n in ("train", "dev", "test", "lm") if getattr(args, n)}
    known = [field.name for field in fields(sizes)]
    for name, count in given.items():
        if name not in known or count < 1:
            raise UserError(f"--{name} {count}: {args.corpus} has {', '.join(known)}, at least 1")
    options = {"langs": args.langs} if args.langs and args.corpus != "librispeech" else {}
    made = make(args.output_dir, sizes(**given), seed=args.seed, nj=args.nj, **options)
    print(f"{args.output_dir}: {'made' if made else 'already complete'}")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
