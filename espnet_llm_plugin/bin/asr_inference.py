"""Decode speech with a transducer, a factorized transducer, a speech LLM or a CTC model.

The options are those of espnet2.bin.asr_inference and some more, the output directory is the same:
OUTPUT_DIR/1best_recog/{text,token,token_int,score}. Besides, nbest.jsonl has every hypothesis with
the parts of its score, and rtf.json the real-time factor.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import (
    add_model_options,
    add_search_options,
    espnet_parser,
    parse_with_configs,
)
from espnet_llm_plugin.inference.speech_llm_options import add_speech_llm_options


def get_parser() -> argparse.ArgumentParser:
    parser = espnet_parser()
    parser.prog = "python -m espnet_llm_plugin.bin.asr_inference"
    parser.description = __doc__
    add_model_options(parser)
    add_search_options(parser)
    add_speech_llm_options(parser)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    if args.search == "espnet":
        from espnet_llm_plugin.inference.espnet_search import decode_with_espnet

        decode_with_espnet(args)
    else:
        from espnet_llm_plugin.inference.decode import decode

        decode(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
