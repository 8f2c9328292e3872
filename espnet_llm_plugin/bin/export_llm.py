"""Write a trained `causal_llm` LM as a Hugging Face directory."""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export_llm",
        description="Write a causal_llm trained by lm_train as a Hugging Face directory over its "
        "token list, for the `llm` predictor of a factorized transducer.",
    )
    parser.add_argument("--lm_train_config", required=True, help="config.yaml of lm_train")
    parser.add_argument("--lm_file", required=True, help="its checkpoint (.pth)")
    parser.add_argument("--output_dir", required=True, help="directory to create")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> int:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin import registry

    registry.register(("lm", "lm_model"))
    from espnet_llm_plugin.llm.export import export_llm

    print(export_llm(args.lm_train_config, args.lm_file, args.output_dir))
    return 0


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
