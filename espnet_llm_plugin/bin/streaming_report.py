"""Measure a streaming model at several chunk sizes: error rate, delays, compute time.

OUTPUT_DIR gets RESULTS.md with a table, results.json with its numbers, and wer_latency.png. One
model for all chunk sizes is one that was trained with dynamic_chunk_sizes.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import (
    add_loading_options,
    add_model_options,
    add_search_options,
    parse_with_configs,
)


def get_parser() -> argparse.ArgumentParser:
    types = import_quietly("espnet2.utils.types")
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.streaming_report",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--data_path_and_name_and_type",
        type=types.str2triple_str,
        required=True,
        action="append",
        help="e.g. dump/raw/test/wav.scp,speech,sound; once for each test set",
    )
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        help="Transcripts, e.g. dump/raw/test/text; once for each test set, which is named after "
        "their directory",
    )
    parser.add_argument(
        "--chunks_ms",
        type=float,
        nargs="+",
        default=[80.0, 160.0, 320.0, 640.0],
        help="Chunk sizes in milliseconds",
    )
    parser.add_argument(
        "--align_asr_train_config",
        help="config.yaml of a model with CTC, to align with one that has none: same tokens, same "
        "frames (default: the model's own CTC)",
    )
    parser.add_argument("--align_asr_model_file", help="Its checkpoint")
    add_loading_options(parser)
    add_model_options(parser)
    add_search_options(parser, espnet_search=False, chunk=False)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    from espnet_llm_plugin.inference.streaming_report import streaming_report

    streaming_report(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
