"""The LM configurations in conf/lm: each names a model that can be built as the comment says."""

import pytest
import torch
import yaml

from espnet_llm_plugin.llm.causal_llm import CausalLLM
from tests.llm.tiny import char_tokens, save_adapted_dir


def load(root, name):
    file = root / "conf" / "lm" / name
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ") and "arXiv" in text
    return text, yaml.safe_load(text)


def test_small_llama(root):
    text, conf = load(root, "train_causal_llm_small.yaml")
    with torch.device("meta"):
        lm = CausalLLM(5000, **conf["lm_conf"])
    millions = sum(p.numel() for p in lm.parameters()) / 1e6
    assert f"A {millions:.0f}M-parameter" in text


def test_fine_tuning(root, tmp_path):
    _, conf = load(root, "finetune_causal_llm.yaml")
    llm = save_adapted_dir(tmp_path / "llm", char_tokens())
    lm = CausalLLM(len(char_tokens()), llm=str(llm), **conf["lm_conf"])
    assert lm.llm.is_gradient_checkpointing
    assert (
        conf["scheduler_conf"]["warmup_steps"] == 0.05 * conf["scheduler_conf"]["first_cycle_steps"]
    )


def test_lora(root, tmp_path):
    _, conf = load(root, "finetune_causal_llm_lora.yaml")
    llm = save_adapted_dir(tmp_path / "llm", char_tokens())
    conf["lm_conf"]["lora_conf"]["r"] = 2
    lm = CausalLLM(len(char_tokens()), llm=str(llm), **conf["lm_conf"])
    assert lm.tuned.gradient_checkpointing
    assert all("lora" in name for name, _ in lm.named_parameters())
    assert (
        conf["scheduler_conf"]["warmup_steps"] == 0.05 * conf["scheduler_conf"]["first_cycle_steps"]
    )


NAMES = [
    "train_causal_llm_small.yaml",
    "finetune_causal_llm.yaml",
    "finetune_causal_llm_lora.yaml",
]


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_espnet_accepts_every_key(root, name):
    from espnet_llm_plugin import registry

    registry.register(("lm",))
    from espnet2.schedulers.cosine_anneal_warmup_restart import CosineAnnealingWarmupRestarts
    from espnet2.tasks.lm import LMTask

    _, conf = load(root, name)
    args = LMTask.get_parser().parse_args(["--config", str(root / "conf" / "lm" / name)])
    for key, value in conf.items():
        found = getattr(args, key)
        if key in ("best_model_criterion",):
            found = [list(item) for item in found]
        if isinstance(value, dict):
            assert value.items() <= found.items(), key
        else:
            assert found == value, key
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], **args.optim_conf)
    scheduler = CosineAnnealingWarmupRestarts(optimizer, **args.scheduler_conf)
    for _ in range(args.scheduler_conf["warmup_steps"]):
        scheduler.step()
    assert scheduler.get_lr()[0] == pytest.approx(args.optim_conf["lr"])
