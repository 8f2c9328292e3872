"""Write a trained `causal_llm` LM, or the LLM of a speech LLM, as a Hugging Face directory."""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.errors import UserError, run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export_llm",
        description="Write as a Hugging Face directory either a causal_llm trained by lm_train, "
        "over its token list, for the `llm` predictor of a factorized transducer; or the LLM of a "
        "speech LLM trained by asr_train, LoRA merged, its logits compared with those of training.",
    )
    parser.add_argument("--lm_train_config", help="config.yaml of lm_train")
    parser.add_argument("--lm_file", help="its checkpoint (.pth)")
    parser.add_argument("--asr_train_config", help="config.yaml of asr_train")
    parser.add_argument("--asr_model_file", help="its checkpoint (.pth)")
    parser.add_argument("--output_dir", required=True, help="directory to create")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> int:
    args = get_parser().parse_args(cmd)
    lm = (args.lm_train_config, args.lm_file)
    asr = (args.asr_train_config, args.asr_model_file)
    if not (all(lm) and not any(asr)) and not (all(asr) and not any(lm)):
        raise UserError(
            "give either --lm_train_config and --lm_file, or --asr_train_config and "
            "--asr_model_file"
        )
    from espnet_llm_plugin import registry

    if all(asr):
        registry.register(tuple(kind for kind in registry.CHOICES if not kind.startswith("lm")))
        from espnet_llm_plugin.llm.export_tuned import export_tuned_llm

        print(export_tuned_llm(*asr, args.output_dir))
        return 0
    registry.register(("lm", "lm_model"))
    from espnet_llm_plugin.llm.export import export_llm

    print(export_llm(*lm, args.output_dir))
    return 0


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
