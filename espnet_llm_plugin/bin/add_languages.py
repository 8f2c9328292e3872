"""Add languages to a trained speech LLM that has soft prompts of languages.

OUTPUT_DIR gets model.pth, the checkpoint with soft prompts for them, and train.yaml, the
configuration from which espnet2.bin.asr_train trains these alone; all else stays as it is.
"""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.add_languages", description=__doc__
    )
    parser.add_argument("--asr_train_config", required=True, help="config.yaml of the training")
    parser.add_argument("--asr_model_file", required=True, help="the checkpoint, a .pth file")
    parser.add_argument(
        "--languages",
        nargs="+",
        required=True,
        metavar="CODE[=NAME]",
        help="with `init: language_name`, a name where Whisper's list has none",
    )
    parser.add_argument("--output_dir", required=True, help="directory to write to")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin import registry
    from espnet_llm_plugin.inference.loading import read_train_config, require_file

    require_file(args.asr_train_config, "--asr_train_config", "config.yaml of the training")
    require_file(args.asr_model_file, "--asr_model_file", "the checkpoint, a .pth file")
    read_train_config(args.asr_train_config)
    registry.register(tuple(kind for kind in registry.CHOICES if not kind.startswith("lm")))
    from espnet_llm_plugin.speech_llm.add_languages import add_languages

    pairs = (word.partition("=") for word in args.languages)
    languages = {code: name or None for code, _, name in pairs}
    print(add_languages(args.asr_train_config, args.asr_model_file, languages, args.output_dir))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
