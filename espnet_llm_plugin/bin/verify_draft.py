"""Decode greedily, and let a language model correct the draft only where it disagrees.

The draft is the greedy output of CTC (of any ESPnet model that has one) or of a transducer of this
package. The LM reads it in one forward; places whose disagreement (natural log) is above the
threshold are decoded again from their alternatives. Threshold inf: the draft itself; all: every
place. The LM is over the recogniser's tokens: an adapted LLM (--llm) or an ESPnet LM.

OUTPUT_DIR is a decoding directory; with several thresholds it has one of each,
threshold_<value>, table.txt with the word errors (--text), LM calls and real-time factor of each,
and speed.png, word errors against speed.
"""

import argparse
import logging
import math
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import parse_with_configs

LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


def _threshold(text: str) -> float:
    return -math.inf if text == "all" else float(text)  # argparse takes -inf for an option


def get_parser() -> argparse.ArgumentParser:
    types = import_quietly("espnet2.utils.types")
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.verify_draft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="Options in YAML; may be given several times")
    parser.add_argument("--log_level", type=str.upper, default="INFO")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU; 1: one GPU")

    group = parser.add_argument_group("Data")
    group.add_argument(
        "--data_path_and_name_and_type",
        type=types.str2triple_str,
        required=True,
        action="append",
        help="e.g. dump/raw/dev/wav.scp,speech,sound",
    )
    group.add_argument("--key_file", help="utterances to use (default: all)")
    group.add_argument("--text", help="transcripts: adds word errors to the table")
    group.add_argument("--num_workers", type=int, default=1)

    group = parser.add_argument_group("Models")
    group.add_argument("--asr_train_config", required=True, help="config.yaml of the ASR training")
    group.add_argument("--asr_model_file", required=True, help="ASR checkpoint")
    group.add_argument("--bpemodel", type=types.str_or_none)
    group.add_argument("--llm", help="LLM adapted to the ASR tokens: directory or hub id")
    group.add_argument("--llm_dtype", default="float32", help="float32, bfloat16, float16, auto")
    group.add_argument("--lm_train_config", help="config.yaml of an ESPnet LM's training")
    group.add_argument("--lm_file", help="LM checkpoint")
    group.add_argument(
        "--eos", choices=("eos", "none"), default="eos", help="score the end of text"
    )
    group.add_argument("--prior", help="label prior of CTC, written by estimate_prior")

    group = parser.add_argument_group("Verification")
    group.add_argument(
        "--thresholds",
        type=_threshold,
        nargs="+",
        default=[0.0],
        help="disagreement above which a place is decoded again, or all; several: a table [0]",
    )
    group.add_argument("--lm_weight", type=float, default=0.4)
    group.add_argument("--prior_weight", type=float, default=0.0)
    group.add_argument("--label_bonus", type=float, default=0.0)
    group.add_argument("--beam_size", type=int, default=4, help="hypotheses kept [4]")
    group.add_argument(
        "--alternatives", type=int, default=4, help="of a place, besides the draft's [4]"
    )
    group.add_argument(
        "--margin",
        type=float,
        default=8.0,
        help="alternatives are at most so much less probable than the draft's (natural log) [8]",
    )
    group.add_argument("--batch_size", type=int, default=32, help="utterances verified together")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(level=args.log_level, format=LOG_FORMAT)
    from espnet_llm_plugin.inference.verify_draft import verify_draft

    verify_draft(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
