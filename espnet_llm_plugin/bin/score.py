"""Word, character and token error rates of a hypothesis file, equal to NIST sclite's."""

import argparse
import sys
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.scoring.bootstrap import RESAMPLES, Difference, positive_int
from espnet_llm_plugin.scoring.evaluate import evaluate
from espnet_llm_plugin.scoring.normalizers import NORMALIZERS
from espnet_llm_plugin.scoring.report import HEADER, percentage_cells
from espnet_llm_plugin.scoring.table import plain
from espnet_llm_plugin.token_list import TOKEN_TYPES


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.score",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ref", required=True, help="Kaldi text file of the references")
    parser.add_argument(
        "--hyp",
        required=True,
        help="Kaldi text file of the hypotheses (a missing one counts as empty)",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="gets score_wer/, score_cer/, score_ter/ (as from ESPnet), diagnostics.txt and "
        "scores.json",
    )
    parser.add_argument("--utt2spk", help="speakers (default: utt2spk beside --ref)")
    parser.add_argument("--bpemodel", help="SentencePiece model: adds the token error rate")
    parser.add_argument(
        "--token_list",
        help="tokens of the model: tokens of the references that it lacks are reported",
    )
    parser.add_argument(
        "--token_type",
        default="bpe",
        choices=TOKEN_TYPES,
        help="how the model cuts text into the tokens of --token_list",
    )
    parser.add_argument(
        "--non_linguistic_symbols",
        help="file of symbols, one a line, that count neither as words nor as characters",
    )
    parser.add_argument(
        "--words",
        help="file of words of interest, one group (e.g. homophones: there their) a line; "
        "their recall and precision are reported",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="DIR",
        help="--output_dir of other systems on the same test set: paired bootstrap of the WER",
    )
    parser.add_argument(
        "--case_sensitive", action="store_true", help="as sclite -s; ESPnet scores without it"
    )
    parser.add_argument(
        "--allow_empty_ref",
        action="store_true",
        help="score utterances with an empty reference: all words are insertions",
    )
    parser.add_argument(
        "--normalizer",
        default="none",
        choices=NORMALIZERS,
        help="text normalisation of references and hypotheses (whisper_basic: not for Indic "
        "scripts; whisper_english and leaderboard: English)",
    )
    parser.add_argument(
        "--resamples", type=positive_int, default=RESAMPLES, help="of the bootstrap"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    args.compare = tuple(args.compare)
    result = evaluate(**vars(args))
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rows = []
    for unit, scored in result.scored.items():
        low, high = result.scores[unit]["interval"]
        rows.append([unit.upper(), *percentage_cells(scored.summary()), f"{low:.2f}-{high:.2f}"])
    print(plain(["%", *HEADER[1:], "95 % interval of Err"], rows), end="")
    for other, values in result.scores["comparisons"].items():
        print(describe(Difference(**values), "this system", other))


def describe(difference: Difference, first: str, second: str) -> str:
    """One line of words on a paired comparison."""
    return (
        f"WER of {first} - WER of {second} = {difference.difference:+.2f} "
        f"(95 % {difference.low:+.2f} to {difference.high:+.2f}; {second} has fewer errors in "
        f"{100 * difference.probability:.1f} % of resamples)"
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
