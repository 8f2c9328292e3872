"""Estimate the prior of a CTC model's labels, which fusion with a language model subtracts.

From the mean of CTC's softmax over training speech (a few thousand utterances are enough), or from
the labels' counts in the training transcripts. Works with every model of ESPnet or this package
that has a CTC output.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli

LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


def get_parser() -> argparse.ArgumentParser:
    types = import_quietly("espnet2.utils.types")
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.estimate_prior",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--log_level", type=str.upper, default="INFO")
    parser.add_argument("--asr_train_config", required=True, help="config.yaml of the ASR training")
    parser.add_argument("--asr_model_file", help="ASR checkpoint (for posteriors)")
    parser.add_argument("--output", required=True, help="file to write, e.g. exp/asr/prior.json")
    parser.add_argument(
        "--mode",
        choices=("label", "frame"),
        default="label",
        help="label: subtracted with each new label; frame: at every frame, blank included",
    )
    parser.add_argument(
        "--estimate_from", choices=("posteriors", "counts"), default="posteriors", help="see above"
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        help="share of a uniform distribution mixed in (default: 0, of counts 0.1)",
    )
    parser.add_argument(
        "--data_path_and_name_and_type",
        type=types.str2triple_str,
        default=[],
        action="append",
        help="training speech, e.g. dump/raw/train/wav.scp,speech,sound",
    )
    parser.add_argument("--key_file", help="utterances to use (default: all)")
    parser.add_argument("--text", help="training transcripts (for counts)")
    parser.add_argument("--token_type", type=types.str_or_none)
    parser.add_argument("--bpemodel", type=types.str_or_none)
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU; 1: one GPU")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=1)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    logging.basicConfig(level=args.log_level, format=LOG_FORMAT)
    from espnet_llm_plugin.inference.prior import estimate_prior

    estimate_prior(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
