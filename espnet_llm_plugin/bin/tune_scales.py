"""Choose the weights of a trained model's search on held-out speech.

Of a transducer alpha, beta, the LM weight and the label bonus; of a speech LLM the weights of CTC,
of the LLM without audio and of an external LM, the label bonus and the length normalisation.

Every point of the grid is decoded (utterances are encoded once, language models run once for a
prefix) and scored by WER. OUTPUT_DIR gets best.yaml, a --config for asr_inference; table.txt;
scales.json with every point; heat_map.png where two scales vary.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.fusion_options import add_fusion_options
from espnet_llm_plugin.inference.options import (
    add_chunk_option,
    add_ilm_options,
    add_model_options,
    parse_with_configs,
)
from espnet_llm_plugin.inference.speech_llm_options import add_speech_llm_options

LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


def get_parser(
    prog: str = "python -m espnet_llm_plugin.bin.tune_scales", description: Optional[str] = __doc__
) -> argparse.ArgumentParser:
    """The options of both tuning commands."""
    types = import_quietly("espnet2.utils.types")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", help="Options in YAML; may be given several times")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--log_level",
        type=lambda x: x.upper(),
        default="INFO",
        choices=("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET"),
    )
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU; 1: GPUs, one a process")
    parser.add_argument(
        "--nj", type=int, default=1, help="Processes; on GPUs at most as many as are visible"
    )

    group = parser.add_argument_group("Data")
    group.add_argument(
        "--data_path_and_name_and_type",
        type=types.str2triple_str,
        required=True,
        action="append",
        help="e.g. dump/raw/dev/wav.scp,speech,sound",
    )
    group.add_argument("--key_file", help="Utterances to use (default: all)")
    group.add_argument("--text", required=True, help="Transcripts")

    group = parser.add_argument_group("Models")
    group.add_argument("--asr_train_config", help="config.yaml of the ASR training")
    group.add_argument("--asr_model_file", help="ASR checkpoint")
    group.add_argument("--lm_train_config", help="config.yaml of an external LM's training")
    group.add_argument("--lm_file", help="LM checkpoint")
    group.add_argument("--token_type", type=types.str_or_none)
    group.add_argument("--bpemodel", type=types.str_or_none)
    add_ilm_options(group)
    add_model_options(parser)

    group = parser.add_argument_group("Grid (one value or several; default: the model's own)")
    group.add_argument("--alphas", type=float, nargs="+", help="Of a factorized_transducer")
    group.add_argument("--betas", type=float, nargs="+", help="Of a factorized_transducer")
    group.add_argument("--lm_weights", type=float, nargs="+", help="Of the external LM")
    group.add_argument(
        "--ilm_weights",
        type=float,
        nargs="+",
        help="Of the internal LM (of an RNN-T or attention decoder), which is subtracted",
    )
    group.add_argument(
        "--prior_weights", type=float, nargs="+", help="Of --prior_file, which is subtracted"
    )
    group.add_argument("--label_bonuses", type=float, nargs="+", help="ESPnet's --penalty")
    group.add_argument(
        "--ctc_weights",
        type=float,
        nargs="+",
        help="Of a speech_llm; of a model with an attention decoder (tune_fusion)",
    )
    group.add_argument(
        "--textlm_weights", type=float, nargs="+", help="Of a speech_llm's LLM without audio"
    )
    group.add_argument("--length_norms", type=float, nargs="+", help="Of a speech_llm")

    group = parser.add_argument_group("Search")
    group.add_argument("--beam_size", type=int, default=4)
    group.add_argument("--batch_size", type=int, default=16, help="Utterances decoded together")
    add_chunk_option(group)
    group.add_argument("--max_symbols_per_frame", type=int, default=3)
    group.add_argument("--normalize_length", type=types.str2bool, default=False)
    add_fusion_options(parser, weights=False)
    add_speech_llm_options(parser, weights=False)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(level=args.log_level, format=LOG_FORMAT)
    from espnet_llm_plugin.inference.tune import tune

    tune(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
