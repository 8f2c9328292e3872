"""A mistake in a YAML file, given as users give it: one line that names it, no traceback."""

import os
import subprocess
import sys

import pytest

from tests.inference.tiny_asr import TOKENS, make_audio

pytestmark = pytest.mark.integration

GOOD = """
encoder: transformer
encoder_conf: {{output_size: 16, attention_heads: 2, linear_units: 16, num_blocks: 1}}
frontend_conf: {{n_mels: 40}}
token_type: char
model: factorized_transducer
model_conf: {{{model_conf}}}
decoder: factorized_transducer
decoder_conf: {{predictor: {predictor}, {decoder_conf} joint_dim: 8}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    make_audio(directory, {"a": 0.6, "b": 0.5})
    (directory / "text").write_text("a ab\nb dc\n")
    (directory / "shape").write_text("a 9600\nb 8000\n")
    (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    return directory


@pytest.mark.parametrize(
    "mistake, message",
    [
        (
            {"predictor": "statless"},
            "unknown predictor 'statless'; choose one of: stateless, lstm, llm",
        ),
        (
            {"decoder_conf": "blank_nrm: softmax,"},
            "decoder_conf of 'factorized_transducer': unknown option 'blank_nrm'; valid options: "
            "predictor, ",
        ),
        (
            {"model_conf": "ilm_wieght: 0.1"},
            "model_conf of 'factorized_transducer': unknown option 'ilm_wieght'; valid options: "
            "ctc_weight, ilm_weight, ",
        ),
    ],
    ids=["predictor", "decoder_conf", "model_conf"],
)
def test_one_line_and_exit_code_2(data, tmp_path, mistake, message):
    keys = {"predictor": "stateless", "decoder_conf": "", "model_conf": "", **mistake}
    (tmp_path / "bad.yaml").write_text(GOOD.format(**keys))
    command = [sys.executable, "-m", "espnet_llm_plugin", "-m", "espnet2.bin.asr_train"]
    command += ["--config", "bad.yaml", "--output_dir", "exp", "--ngpu", "0"]
    command += ["--token_list", str(data / "tokens.txt")]
    for part in ("train", "valid"):
        for triple in (f"{data}/wav.scp,speech,sound", f"{data}/text,text,text"):
            command += [f"--{part}_data_path_and_name_and_type", triple]
        command += [f"--{part}_shape_file", str(data / "shape")]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}")
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.stderr + result.stdout
    assert not list(tmp_path.glob("exp/*.pth"))
