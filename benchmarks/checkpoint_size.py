#!/usr/bin/env python3
"""What a LoRA run adds to each checkpoint, beside the LLM that it leaves out.

Counted from the LLM's configuration alone, on the meta device: no weights are needed, none are made
but those of LoRA. The encoder and the adapter of a model come on top, as in any model.

    python benchmarks/checkpoint_size.py conf/speech_llm/*.yaml            # shape of Llama-3.2-1B
    python benchmarks/checkpoint_size.py conf/speech_llm/*.yaml --llm DIR
"""

import argparse
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.llm.lora import lora_options, lora_parameters

# Llama-3.2-1B
SHAPE = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


def llm_config(directory: Optional[str]) -> Any:
    """Configuration of an LLM's directory, or of Llama-3.2-1B."""
    from transformers import AutoConfig, LlamaConfig

    return LlamaConfig(**SHAPE) if directory is None else AutoConfig.from_pretrained(directory)


def llm_parameters(config: Any) -> int:
    """Parameters of the whole LLM."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def lora_size(config: Any, lora_conf: Optional[dict]) -> tuple[int, int]:
    """Tensors that LoRA trains, and their bytes in a checkpoint."""
    parameters = lora_parameters(config, lora_options(lora_conf)).values()
    return len(parameters), sum(p.numel() * p.element_size() for p in parameters)


def main(cmd: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", type=Path, help="those without LoRA are left out")
    parser.add_argument("--llm", help="directory of an LLM instead of the shape of Llama-3.2-1B")
    args = parser.parse_args(cmd)
    config = llm_config(args.llm)
    print(f"the LLM itself: {2e-6 * llm_parameters(config):.0f} MB in bf16, in no checkpoint\n")
    print("|configuration|tensors of LoRA|MB in a checkpoint|\n|---|---|---|")
    known: dict[str, tuple[int, int]] = {}  # sizes by lora_conf
    for path in args.configs:
        conf = yaml.safe_load(path.read_text(encoding="utf-8")).get("decoder_conf") or {}
        if conf.get("tuning") == "lora":
            key = repr(conf.get("lora_conf"))
            if key not in known:
                known[key] = lora_size(config, conf.get("lora_conf"))
            tensors, size = known[key]
            print(f"|{path.stem}|{tensors}|{size / 1e6:.1f}|")


if __name__ == "__main__":
    run_cli(main)
