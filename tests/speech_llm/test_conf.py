"""Every configuration of conf/speech_llm and prefix_tuning builds a model of the size it states."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.encoder.stride import encoder_frame_ms
from espnet_llm_plugin.speech_llm.recipe import recipe_options
from espnet_llm_plugin.training_config import read_training_config
from tests.speech_llm.tiny_llm import save_adapted, save_native

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = [*CONF.glob("speech_llm/*.yaml"), *CONF.glob("prefix_tuning/train_*.yaml")]
PROMPT = ["transcribe", "speech", "to", "text"]
WORDS = ["<blank>", "<unk>", *PROMPT, *(f"w{i}" for i in range(9993)), "<sos/eos>"]
# Width of the LLM that a configuration names: all that the size of the other parts depends on.
WIDTHS = {"llama7b": 4096, "qwen2_0.5b": 896, "mini": 128}
WIDTHS |= {"bloom560m": 1024, "bloom1b7": 2048, "bloom7b1": 4096}


def llm_of_width(directory, width, native):
    """Thin but for the width of its embeddings."""
    conf = dict(hidden_size=width, head_dim=4, intermediate_size=4)
    if native:
        return save_native(directory, **conf)
    return save_adapted(directory, tokens=WORDS, **conf)


@pytest.mark.parametrize("name", sorted(str(path.relative_to(CONF)) for path in FILES))
def test_configuration(tmp_path, name):
    registry.register()
    from espnet2.tasks.asr import ASRTask

    text = (CONF / name).read_text()
    conf = yaml.safe_load(text)
    tokens = WORDS
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces/tokens.txt").write_text("\n".join(WORDS) + "\n")
    options = ["--config", str(CONF / name), "--output_dir", str(tmp_path)]
    if "decoder" in conf:
        width = next(width for key, width in WIDTHS.items() if key in name)
        # the header says which token list
        native = "token_type hugging_face" in text
        llm = llm_of_width(tmp_path / "llm", width, native)
        options += ["--decoder_conf", f"llm={llm}"]
        if conf["decoder_conf"]["tuning"] == "full":  # its weights cannot be made without memory
            options += ["--decoder_conf", "tuning=frozen"]
        if native:
            from espnet_llm_plugin.llm.native import native_token_list

            tokens = native_token_list(llm)
        config = read_training_config(CONF / name)
        options += recipe_options(config, ["en", "de"], str(tmp_path / "pieces/bpe.model"))
        heads = config["model_conf"].get("auxiliary", [])
    (tmp_path / "tokens.txt").write_text("\n".join(tokens) + "\n")
    options += ["--token_list", str(tmp_path / "tokens.txt")]
    args = ASRTask.get_parser().parse_args(options)
    with torch.device("meta"):
        model = ASRTask.build_model(args)
    parts = [model.encoder, *([model.decoder.adapter] if "decoder" in conf else [])]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    stated = re.search(r"([\d.]+) M\s+(# )?parameters", text)
    groups = conf.get("optim_conf", {}).get("groups", {})
    names = [name for name, _ in model.named_parameters()]
    assert all(any(name.startswith(f"{group}.") for name in names) for group in groups)
    if "decoder" in conf:
        assert len(model.auxiliary) == len(heads)
    assert stated[1] in (f"{parameters / 1e6:.0f}", f"{parameters / 1e6:.1f}")
    if "decoder" in conf:
        assert not model.decoder.llm.is_loaded


def axes(conf):
    """What the tables of the papers vary: stride, encoder layers, rank, masked text, tuning."""
    decoder = conf["decoder_conf"]
    stack = decoder["adapter_conf"].get("stack")
    lora = decoder.get("lora_conf", {})
    return {
        "ms": None if stack is None else stack * encoder_frame_ms(conf),
        "layers": conf["encoder_conf"]["num_blocks"],
        "rank": lora.get("r", 8) if decoder.get("tuning", "lora") == "lora" else 0,
        "mask": conf.get("model_conf", {}).get("text_mask", 0.0),
    }


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in CONF.glob("speech_llm/train_llama7b_*.yaml"))
)
def test_an_axis_of_the_paper_is_what_the_name_says(name):
    """All else is as in train_llama7b_240ms.yaml, and the header names the row of the table."""
    text, base = (
        (CONF / f"speech_llm/{n}.yaml").read_text() for n in (name, "train_llama7b_240ms")
    )
    conf, base = yaml.safe_load(text), yaml.safe_load(base)
    expected = axes(base)
    assert expected == {"ms": 240, "layers": 18, "rank": 8, "mask": 0.0}
    for word in name.removeprefix("train_llama7b_").split("_"):
        for pattern, axis, number in (
            (r"([\d]+)ms", "ms", int),
            (r"enc(\d+)", "layers", int),
            (r"r(\d+)", "rank", int),
            (r"mask([\d.]+)", "mask", float),
        ):
            if found := re.fullmatch(pattern, word):
                expected[axis] = number(found[1])
        expected |= {"frozen": {"rank": 0}, "mask": {"mask": 0.25}}.get(word, {})
    assert axes(conf) == expected
    assert "arXiv 2307.11795" in text and re.search(r"average WER [\d.]+", text)
    # and nothing else differs
    for one in (conf, base):
        one["decoder_conf"]["adapter_conf"].pop("stack")
        one["encoder_conf"].pop("num_blocks")
        one["decoder_conf"].pop("lora_conf", None), one["decoder_conf"].pop("tuning")
        one.setdefault("model_conf", {}).pop("text_mask", None)
    assert conf == base
