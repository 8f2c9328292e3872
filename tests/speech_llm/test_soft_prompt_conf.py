"""Configurations with soft prompts build models of the size they state."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.data.corpora.mls import LANGUAGES as MLS
from espnet_llm_plugin.data.indic_text import LANGUAGES as INDIC
from espnet_llm_plugin.data.preprocessor import MultilingualPreprocessor
from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.recipe import recipe_options
from espnet_llm_plugin.training_config import read_training_config
from tests.speech_llm.test_conf import llm_of_width

CONF = Path(__file__).resolve().parents[2] / "conf" / "prefix_tuning"
NAMES = sorted(path.name for path in CONF.glob("*_prompt*.yaml"))


@pytest.mark.parametrize("languages", [MLS, INDIC], ids=["mls", "indic"])
@pytest.mark.parametrize("name", NAMES)
def test_configuration(tmp_path, name, languages):
    """With what the recipe of a corpus fills in."""
    registry.register()
    from espnet2.tasks.asr import ASRTask, preprocessor_choices

    text = (CONF / name).read_text()
    conf = yaml.safe_load(text)
    mini = name.startswith("mini")
    llm = llm_of_width(tmp_path / "llm", 128 if mini else 896, native=True)
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / "tokens.txt").write_text("<blank>\n<unk>\nword\n<sos/eos>\n")
    (tmp_path / "tokens.txt").write_text("\n".join(native_token_list(llm)) + "\n")
    options = ["--config", str(CONF / name), "--output_dir", str(tmp_path)]
    options += ["--token_list", str(tmp_path / "tokens.txt"), "--decoder_conf", f"llm={llm}"]
    options += recipe_options(
        read_training_config(CONF / name), list(languages), str(pieces / "bpe.model")
    )
    heads = conf.get("model_conf", {}).get("auxiliary", [])
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
    rows = len(languages) + 1 if "lang" in name else 1  # with the unknown language
    assert size == rows * conf["decoder_conf"]["soft_prompt_conf"]["length"] * (
        128 if mini else 896
    )
    assert (decoder.language_head is not None) == (mini and "lang" in name or "predicted" in name)
    if "lang" in name:
        assert decoder.soft_prompt.languages.codes == tuple(languages)
        kind = preprocessor_choices.get_class(args.preprocessor)
        assert kind is MultilingualPreprocessor and args.allow_variable_data_keys
