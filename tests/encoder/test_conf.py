"""The configurations with streaming encoders state the latency that their numbers give."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from espnet2.asr.frontend.default import DefaultFrontend

from espnet_llm_plugin.encoder.emformer import EmformerEncoder
from espnet_llm_plugin.encoder.latency import algorithmic_latency
from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder

CONF = Path(__file__).resolve().parents[2] / "conf" / "transducer"
CLASSES = {"emformer": EmformerEncoder, "streaming_conformer": StreamingConformerEncoder}
NAMES = [f"train_ft_{encoder}{size}" for encoder in CLASSES for size in ("", "_small")]


@pytest.mark.parametrize("name", NAMES)
def test_stated_latency_and_chunk_sizes(name):
    text = (CONF / f"{name}.yaml").read_text()
    conf = yaml.safe_load(text)
    with torch.device("meta"):
        encoder = CLASSES[conf["encoder"]](80, **conf["encoder_conf"])
    frontend = DefaultFrontend(**conf["frontend_conf"])
    stated = re.search(r"Algorithmic latency ([\d.]+) ms", text)[1]
    assert float(stated) == round(algorithmic_latency(frontend, encoder).longest, 1)
    if encoder.dynamic_chunk_sizes:
        for milliseconds in (80, 160, 320, 640):
            encoder.set_chunk_size(milliseconds // 10)
            assert milliseconds // 10 in encoder.dynamic_chunk_sizes


@pytest.mark.parametrize("encoder, layers", [("emformer", 20), ("streaming_conformer", 30)])
def test_paper_scale(encoder, layers):
    conf = yaml.safe_load((CONF / f"train_ft_{encoder}.yaml").read_text())["encoder_conf"]
    assert conf["num_blocks"] == layers
    assert (conf["output_size"], conf["attention_heads"], conf["linear_units"]) == (512, 8, 2048)
