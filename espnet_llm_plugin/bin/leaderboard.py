"""WER and speed of a model on the test sets of the Open ASR Leaderboard, by its protocol.

All options that are not listed here are those of espnet_llm_plugin.bin.asr_inference (the same for
every test set, as the leaderboard demands), e.g. --asr_train_config, --asr_model_file, --config,
--ngpu. Without them --hyp_dir gives the hypotheses of an earlier decoding.

Writes OUTPUT_DIR/leaderboard.{md,json,png}. A set that is not there is skipped by name; a run that
was interrupted continues.
"""

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.scoring.leaderboard import SPLITS
from espnet_llm_plugin.scoring.normalizers import NORMALIZERS


def get_parser() -> argparse.ArgumentParser:
    """The command line's own options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--test_sets",
        help="directory with the test sets: a copy of hf-audio/esb-datasets-test-only-sorted, or "
        "Kaldi data directories called " + ", ".join(SPLITS),
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="one test set: a Kaldi data directory or a directory with Parquet files",
    )
    parser.add_argument("--sets", nargs="+", default=[], help="take these only (default: all)")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--hyp_dir",
        help="score HYP_DIR/<set or its directory>/{text,1best_recog/text} instead of decoding",
    )
    parser.add_argument(
        "--normalizer",
        default="leaderboard",
        choices=NORMALIZERS,
        help="of references and hypotheses (default: leaderboard)",
    )
    parser.add_argument(
        "--leaderboard_repo",
        help="checkout of huggingface/open_asr_leaderboard whose own normaliser is used",
    )
    parser.add_argument("--title", default="Open ASR Leaderboard", help="of the table and plot")
    parser.add_argument("--fs", type=int, default=16000, help="sampling rate of the model in Hz")
    parser.add_argument("--nj", type=int, default=1, help="processes that prepare the audio")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    args, rest = get_parser().parse_known_args(cmd)
    logging.basicConfig(level="INFO", format="%(asctime)s (%(module)s) %(levelname)s: %(message)s")
    from espnet_llm_plugin.inference import leaderboard

    given = {}
    for item in args.set:
        name, equals, directory = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: expected NAME=DIR, e.g. ami=dump/raw/ami_test")
        given[name] = Path(directory)
    if args.nj < 1:
        raise UserError(f"--nj {args.nj}: at least one process is needed")
    if args.hyp_dir and rest:
        raise UserError(f"--hyp_dir decodes nothing: {rest[0]} has no meaning with it")
    if args.hyp_dir and not Path(args.hyp_dir).is_dir():
        raise UserError(f"--hyp_dir {args.hyp_dir} is not a directory")
    root = Path(args.test_sets) if args.test_sets else None
    sources, skipped = leaderboard.find_sets(root, given, args.sets)
    if args.hyp_dir:
        hypotheses = leaderboard.Existing(Path(args.hyp_dir))
    else:
        hypotheses = leaderboard.Decoder(decoding_options(rest), args.fs, args.nj)
    board = leaderboard.run(
        sources,
        skipped,
        Path(args.output_dir),
        hypotheses,
        normalizer=args.normalizer,
        leaderboard_repo=args.leaderboard_repo,
        title=args.title,
    )
    print(board.page(), end="")


def decoding_options(rest: Sequence[str]):
    """A function from wav.scp and an output directory to the options of bin.asr_inference."""
    from espnet_llm_plugin.bin.asr_inference import get_parser as inference_parser
    from espnet_llm_plugin.inference.options import parse_with_configs

    for name in ("--data_path_and_name_and_type", "--key_file"):
        if name in rest:
            raise UserError(f"{name}: what is decoded is said by --test_sets and --set")

    def options(wav_scp: Path, output_dir: Path) -> argparse.Namespace:
        data = ["--data_path_and_name_and_type", f"{wav_scp},speech,sound"]
        return parse_with_configs(
            inference_parser(), [*rest, *data, "--output_dir", str(output_dir)]
        )

    if options(Path("wav.scp"), Path("out")).asr_train_config is None:
        raise UserError("give a model by --asr_train_config and --asr_model_file, or --hyp_dir")
    return options


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
