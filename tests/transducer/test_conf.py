"""Every configuration of conf/transducer and conf/ctc builds a model of the size it states.

That with an attention decoder is looked at with its own number of pieces (test_baseline_conf.py).
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin import registry
from tests.transducer.tiny import save_llm

CONF = Path(__file__).resolve().parents[2] / "conf"
TOKENS = ["<blank>", "<unk>", *(f"t{i}" for i in range(4997)), "<sos/eos>"]
PREDICTORS = {"stateless": "StatelessPredictor", "lstm": "LSTMPredictor", "llm": "LLMPredictor"}


@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(CONF))
        for pattern in ("transducer/*", "ctc/train_ctc_*")
        for path in CONF.glob(pattern)
    ),
)
def test_configuration(tmp_path, name):
    registry.register()
    from espnet2.tasks.asr import ASRTask

    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    options = ["--config", str(CONF / name), "--token_list", str(tmp_path / "tokens.txt")]
    options += ["--output_dir", str(tmp_path)]
    conf = yaml.safe_load((CONF / name).read_text())
    predictor = conf.get("decoder_conf", {}).get("predictor")
    if predictor == "llm":
        (tmp_path / "llm").mkdir()
        llm = save_llm(tmp_path / "llm", tokens=TOKENS)
        options += ["--decoder_conf", f"predictor_conf.llm={llm}"]
    args = ASRTask.get_parser().parse_args(options)
    with torch.device("meta") if predictor != "llm" else torch.device("cpu"):
        model = ASRTask.build_model(args)
    stated = re.search(r"(\d+) M\s+(# )?parameters", (CONF / name).read_text())
    parameters = sum(p.numel() for p in model.parameters())
    assert int(stated[1]) == round(parameters / 1e6)
    if predictor is not None:
        assert type(model.decoder.predictor).__name__ == PREDICTORS[predictor]
    if predictor == "llm":
        assert model.decoder.predictor.llm.dtype == "bfloat16"
        assert not model.decoder.predictor.llm.is_loaded


@pytest.mark.parametrize("path", sorted(CONF.glob("transducer/*")), ids=lambda path: path.stem)
def test_stated_estimates(path):
    """The arithmetic of egs2/librispeech/asr1/README.md: bytes and operations a parameter."""
    text = path.read_text()
    comment = re.sub(r"\n# ?", " ", text.partition("\n\n")[0])
    conf = yaml.safe_load(text)
    millions = int(re.search(r"(\d+) M parameters", comment)[1])
    stated = re.search(r"(\d+) M parameters x 16 bytes .* moments\) are ([\d.]+) GB", comment)
    assert int(stated[1]) == millions
    assert float(stated[2]) == round(16 * millions / 1000, 1)
    stated = re.search(r"6 x (\d+)e6 x 86.4e6 x (\d+) epochs at .* are ([\d.]+) GPU hours", comment)
    assert (int(stated[1]), int(stated[2])) == (millions, conf["max_epoch"])
    operations = 6 * millions * 1e6 * 86.4e6 * conf["max_epoch"]
    assert float(stated[3]) == round(operations / 1e14 / 3600, 1)
    (seconds,) = set(re.findall(r"a batch of (\d+) s", comment))
    assert int(seconds) == conf["batch_bins"] / 16000
