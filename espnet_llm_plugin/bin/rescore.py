"""Rescore n-best lists with a language model, and tune the weights of the sum.

NBEST_DIR is any ESPnet decoding directory ({1..N}best_recog in it or in its logdir/output.*), of
CTC, attention, transducer or speech LLM. The LM is any Hugging Face LLM, in its own tokens; or an
LLM adapted to the ASR tokens, or an ESPnet LM. The best hypothesis has the highest

  score + lm_weight * lm - prior_weight * prior - ilm_weight * ilm + length_bonus * length.

With --text (the transcripts) the weights are tuned: OUTPUT_DIR gets best.yaml (a --config for other
sets), table.txt, heat_map.png and scales.json. OUTPUT_DIR is a decoding directory itself. The LM's
scores are kept there: another grid, or a run that was killed, computes none of them again.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import parse_with_configs

LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


def _steps(first: int, last: int, step: float) -> list[float]:
    return [round(i * step, 6) for i in range(first, last + 1)]


def get_parser() -> argparse.ArgumentParser:
    types = import_quietly("espnet2.utils.types")
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.rescore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="Options in YAML; may be given several times")
    parser.add_argument("--log_level", type=str.upper, default="INFO")
    parser.add_argument("--nbest_dir", required=True, help="decoding directory")
    parser.add_argument("--output_dir", required=True, help="decoding directory to write")
    parser.add_argument("--nbest", type=int, default=0, help="first hypotheses only [0: all]")
    parser.add_argument("--text", help="transcripts: tune the weights on them")
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU; 1: one GPU")
    parser.add_argument("--batch_size", type=int, default=16, help="hypotheses at once, at most")

    group = parser.add_argument_group("Language model")
    group.add_argument("--llm", help="Hugging Face directory or hub id")
    group.add_argument("--llm_dtype", default="float32", help="float32, bfloat16, float16, auto")
    group.add_argument("--lm_train_config", help="config.yaml of an ESPnet LM's training")
    group.add_argument("--lm_file", help="LM checkpoint")
    group.add_argument(
        "--eos",
        choices=("eos", "newline", "none"),
        default="eos",
        help="end of a text that is scored: the LM's end token, a line end, none",
    )
    group.add_argument("--lm_temperature", type=float, default=1.0, help="divides the LM's logits")
    group.add_argument(
        "--lm_lowercase", type=types.str2bool, default=False, help="score text in lower case"
    )

    group = parser.add_argument_group("What is subtracted, and the first pass")
    group.add_argument("--prior", help="label prior written by estimate_prior")
    group.add_argument(
        "--ilm",
        choices=("zero_context", "mini_lstm"),
        help="internal LM of an attention model (--asr_train_config): from an encoder output of "
        "zeros, or from a trained mini-LSTM (--ilm_file)",
    )
    group.add_argument("--ilm_file", help="mini-LSTM written by train_ilm")
    group.add_argument("--asr_train_config", help="config.yaml of the attention model")
    group.add_argument("--asr_model_file", help="its checkpoint")
    group.add_argument(
        "--first_pass_score",
        choices=("total", "acoustic"),
        default="total",
        help="total: what the search reported; acoustic: without the LMs of the search, where "
        "nbest.jsonl has it",
    )

    group = parser.add_argument_group("Weights")
    group.add_argument("--lm_weight", type=float, default=0.4)
    group.add_argument("--prior_weight", type=float, default=0.0)
    group.add_argument("--ilm_weight", type=float, default=0.0)
    group.add_argument("--length_bonus", type=float, default=0.0)
    group.add_argument(
        "--bonus_unit", choices=("word", "label"), default="word", help="what the bonus counts"
    )

    group = parser.add_argument_group("Grid to tune on --text")
    for name, values in (
        ("lm_weights", _steps(0, 24, 0.05)),
        ("prior_weights", _steps(0, 6, 0.1)),
        ("ilm_weights", _steps(0, 6, 0.1)),
        ("length_bonuses", _steps(-2, 6, 0.5)),
    ):
        group.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            default=values,
            help=f"[{values[0]:g} {values[1]:g} ... {values[-1]:g}]",
        )
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(level=args.log_level, format=LOG_FORMAT)
    from espnet_llm_plugin.inference.rescore import rescore

    rescore(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
