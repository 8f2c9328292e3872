"""The page on training names every option, and no other."""

import re

import pytest

from espnet_llm_plugin.options import valid_options
from espnet_llm_plugin.speech_llm.decoder import SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.model import SpeechLLMModel

PASSED = ("self", "vocab_size", "encoder_output_size", "token_list", "decoder", "ctc")


@pytest.mark.parametrize(
    "section, cls", [("decoder_conf", SpeechLLMDecoder), ("model_conf", SpeechLLMModel)]
)
def test_tables_of_options(root, section, cls):
    page = (root / "docs" / "speech_llm.md").read_text()
    table = page.split(f"## `{section}`")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(valid_options(cls, (*PASSED, "joint_network")))
