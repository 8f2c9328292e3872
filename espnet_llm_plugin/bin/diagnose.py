"""Write one page that says which failure signatures a scored experiment shows, and why."""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.scoring.bootstrap import RESAMPLES, positive_int


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.diagnose",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--scored",
        nargs="+",
        required=True,
        metavar="DIR",
        help="--output_dir of score, one or several sets; the verdicts are about the first (best "
        "the validation set). N-best lists are found there if asr_inference kept them (--nbest)",
    )
    parser.add_argument(
        "--output_dir", required=True, help="gets diagnosis.md, diagnosis.png, diagnosis.json"
    )
    parser.add_argument("--nll", metavar="FILE", help="nll.json of evaluate_nll")
    parser.add_argument("--scales", metavar="FILE", help="scales.json of the tuning")
    parser.add_argument("--train_log", metavar="FILE", help="log of the training")
    parser.add_argument(
        "--vocabulary_report", metavar="FILE", help="vocabulary_report.json of the adapted LLM"
    )
    group = parser.add_argument_group("LM swap: compare with")
    group.add_argument(
        "--weak",
        metavar="DIR",
        help="the first set, scored with the weak LM (tuned too, to be fair)",
    )
    group.add_argument("--untuned", metavar="DIR", help="the first set, scored before tuning")
    group.add_argument(
        "--swapped",
        metavar="DIR",
        help="of a model that was trained further after the swap, e.g. for minimum word error "
        "rate: the first set, scored after tuning and before that training",
    )
    group.add_argument("--weak_nll", metavar="FILE", help="nll.json with the weak LM")
    group = parser.add_argument_group("speech LLM")
    group.add_argument(
        "--audio_use",
        metavar="FILE",
        help="audio_use.json of evaluate_audio_use; this or one of the next two asks for the "
        "signatures of a speech LLM",
    )
    group.add_argument(
        "--alone", metavar="DIR", help="the first set, decoded by the LLM alone, scored"
    )
    group.add_argument("--wider", metavar="DIR", help="the first set, with a wider beam, scored")
    parser.add_argument(
        "--resamples", type=positive_int, default=RESAMPLES, help="of the bootstrap"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin.scoring.diagnose import PAGE, diagnose

    for finding in diagnose(**vars(args)):
        print(f"{finding.verdict:>13}  {finding.signature}: {finding.statement}")
    print(f"{args.output_dir}/{PAGE}")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
