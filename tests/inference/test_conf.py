"""The configurations of decoding: known options, and batches where the search takes any."""

from pathlib import Path

import pytest

from espnet_llm_plugin.bin.asr_inference import get_parser
from espnet_llm_plugin.inference.options import parse_with_configs

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize("name", sorted(str(p.relative_to(CONF)) for p in CONF.rglob("decode*")))
def test_batches(name):
    options = ["--config", str(CONF / name), "--output_dir", "x"]
    options += ["--data_path_and_name_and_type", "wav.scp,speech,sound"]
    args = parse_with_configs(get_parser(), options)
    if args.search == "espnet":
        assert args.batch_size == 1  # all that ESPnet's search takes
    else:
        assert args.batch_size >= 8
