"""Configurations with soft prompts build models of the size they state."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.data.corpora.mls import LANGUAGES
from espnet_llm_plugin.data.preprocessor import MultilingualPreprocessor
from espnet_llm_plugin.llm.native import native_token_list
from tests.speech_llm.test_conf import llm_of_width

CONF = Path(__file__).resolve().parents[2] / "conf" / "prefix_tuning"
NAMES = sorted(path.name for path in CONF.glob("*_prompt*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_configuration(tmp_path, name):
    registry.register()
    from espnet2.tasks.asr import ASRTask, preprocessor_choices

    text = (CONF / name).read_text()
    conf = yaml.safe_load(text)
    mini = name.startswith("mini")
    llm = llm_of_width(tmp_path / "llm", 128 if mini else 896, native=True)
    words = tmp_path / "words.txt"
    words.write_text("<blank>\n<unk>\nword\n<sos/eos>\n")
    (tmp_path / "tokens.txt").write_text("\n".join(native_token_list(llm)) + "\n")
    options = ["--config", str(CONF / name), "--output_dir", str(tmp_path)]
    options += ["--token_list", str(tmp_path / "tokens.txt"), "--decoder_conf", f"llm={llm}"]
    if mini:
        options += ["--model_conf", f"ctc_vocabulary.token_list={words}"]
    heads = conf.get("model_conf", {}).get("auxiliary", [])
    for head in heads:
        head["vocabulary"]["token_list"] = str(words)
    options += ["--model_conf", f"auxiliary={json.dumps(heads)}"] if heads else []
    args = ASRTask.get_parser().parse_args(options)
    with torch.device("meta"):
        model = ASRTask.build_model(args)
    decoder = model.decoder
    assert len(model.auxiliary) == len(heads) == ("_rnnt" in name)
    assert not decoder.llm.is_loaded
    parts = (model.encoder, decoder.adapter)
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    stated = re.search(r"([\d.]+) M\s+(# )?parameters", text)
    assert stated[1] in (f"{parameters / 1e6:.0f}", f"{parameters / 1e6:.1f}")
    size = sum(p.numel() for p in decoder.soft_prompt.parameters())
    rows = 9 if "lang" in name else 1  # with the unknown language
    assert size == rows * conf["decoder_conf"]["soft_prompt_conf"]["length"] * (
        128 if mini else 896
    )
    assert (decoder.language_head is not None) == (mini and "lang" in name or "predicted" in name)
    if "lang" in name:
        assert set(decoder.soft_prompt.languages.codes) == set(LANGUAGES)
        kind = preprocessor_choices.get_class(args.preprocessor)
        assert kind is MultilingualPreprocessor and args.allow_variable_data_keys
