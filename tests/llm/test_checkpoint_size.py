"""Sizes of checkpoints with LoRA, counted without weights, are those of real ones."""

import importlib
import sys

import pytest
import torch

from espnet_llm_plugin.llm.tuning import TunedLLM
from tests.llm.tiny import save_llm_dir


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield importlib.import_module("checkpoint_size")
    sys.modules.pop("checkpoint_size")


@pytest.mark.parametrize("conf", [{"r": 8}, {"r": 2, "targets": ["q_proj", "v_proj"]}])
def test_the_tensors_of_a_checkpoint(benchmark, tmp_path, conf):
    directory = str(save_llm_dir(tmp_path / "llm", "llama"))
    llm = TunedLLM(directory, tuning="lora", lora_conf=conf)
    llm.model()  # loaded: its own weights must not count
    saved = llm.state_dict()
    del saved["identity.fingerprint"]  # the record of the LLM, 32 numbers
    saved = list(saved.values())
    size = sum(value.numel() * value.element_size() for value in saved)
    assert benchmark.lora_size(benchmark.llm_config(directory), conf) == (len(saved), size)
    assert all(value.dtype == torch.float32 for value in saved)


def test_llama_1b_leaves_megabytes(benchmark, capsys, root):
    config = benchmark.llm_config(None)
    assert benchmark.llm_parameters(config) == 1_235_814_400
    tensors, size = benchmark.lora_size(config, {"r": 8, "targets": "attention"})
    # q and o: 2048 to 2048; k and v: 2048 to 512
    assert (tensors, size) == (16 * 4 * 2, 4 * 16 * 8 * 2 * (4096 + 2560))
    names = ("train_llama7b_240ms", "train_qwen2_0.5b_full")
    benchmark.main([str(root / "conf" / "speech_llm" / f"{name}.yaml") for name in names])
    printed = capsys.readouterr().out
    assert "2472 MB" in printed and "|train_llama7b_240ms|128|6.8|" in printed
    assert "full" not in printed
