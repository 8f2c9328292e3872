"""Choose the scales of a trained model on held-out speech from n-best lists.

As tune_scales, but the points of the grid are scored on n-best lists, by weighing the parts of
their scores anew, and only the best points are searched. The grid can be fine: a point costs next
to nothing. Same options and results as tune_scales; OUTPUT_DIR also gets nbest.jsonl, the lists
with the parts of their scores. "~" marks word error rates that are those of the lists.

A model with an attention decoder is searched by ESPnet, once at the middle of the grid and then at
the best points: weights of CTC, of an LM or LLM, of the internal LM (--ilm zero_context or
mini_lstm), and the bonus per label.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.bin import tune_scales
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import parse_with_configs


def get_parser() -> argparse.ArgumentParser:
    parser = tune_scales.get_parser("python -m espnet_llm_plugin.bin.tune_fusion", __doc__)
    group = parser.add_argument_group("N-best lists")
    group.add_argument(
        "--nbest_files",
        nargs="+",
        default=[],
        help="nbest.jsonl of asr_inference --nbest N with these models, to begin with (default: "
        "search three points of the grid)",
    )
    group.add_argument("--rounds", type=int, default=1, help="Choices of points, at most")
    group.add_argument("--cells", type=int, default=6, help="Points searched each time")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(level=args.log_level, format=tune_scales.LOG_FORMAT)
    from espnet_llm_plugin.inference.tune_fusion import tune_fusion

    tune_fusion(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
