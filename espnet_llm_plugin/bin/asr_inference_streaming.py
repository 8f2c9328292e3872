"""Decode recordings as streams, with a streaming encoder, as they would come from a microphone.

The options are those of espnet2.bin.asr_inference_streaming and some more, the output directory is
that of asr_inference. Besides, streaming.jsonl has what was recognised after every piece of
--sim_chunk_length samples, and how long it took. The results do not depend on the pieces and are,
without endpoints, those of asr_inference with the same --chunk_ms.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import (
    add_endpoint_options,
    add_model_options,
    add_search_options,
    espnet_streaming_parser,
    parse_with_configs,
)


def get_parser() -> argparse.ArgumentParser:
    parser = espnet_streaming_parser()
    parser.prog = "python -m espnet_llm_plugin.bin.asr_inference_streaming"
    parser.description = __doc__
    add_model_options(parser)
    add_search_options(parser, espnet_search=False)
    add_endpoint_options(parser, default=False)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    from espnet_llm_plugin.inference.decode_streaming import decode_streaming

    decode_streaming(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
