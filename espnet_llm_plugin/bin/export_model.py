"""Write a trained speech LLM for decoding elsewhere.

OUTPUT_DIR gets the checkpoint and the configuration without the auxiliary heads of the training,
and the files that the configuration names; the command prints how ESPnet packs it.
"""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.export_model", description=__doc__
    )
    parser.add_argument("--asr_train_config", required=True, help="config.yaml of the training")
    parser.add_argument("--asr_model_file", required=True, help="the checkpoint, a .pth file")
    parser.add_argument("--output_dir", required=True, help="directory to create")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin.inference.loading import read_train_config, require_file
    from espnet_llm_plugin.speech_llm.export import export_speech_llm

    require_file(args.asr_train_config, "--asr_train_config", "config.yaml of the training")
    require_file(args.asr_model_file, "--asr_model_file", "the checkpoint, a .pth file")
    read_train_config(args.asr_train_config)
    print(export_speech_llm(args.asr_train_config, args.asr_model_file, args.output_dir))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
