"""Which parts of a CTC checkpoint go where."""

import pytest

from espnet_llm_plugin.bin import ctc_init as command
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.ctc_init import init_params


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "ctc.pth").touch()
    return str(tmp_path / "ctc.pth")


def test_factorized_transducer(checkpoint):
    assert init_params(checkpoint, {"model": "factorized_transducer"}) == [
        f"{checkpoint}:encoder:encoder",
        f"{checkpoint}:ctc.ctc_lo:decoder.acoustic_output",
    ]


def test_rnnt_with_auxiliary_ctc(checkpoint):
    config = {"model": "transducer", "model_conf": {"acoustic_residual": True, "ctc_weight": 0.3}}
    assert init_params(checkpoint, config) == [
        f"{checkpoint}:encoder:encoder",
        f"{checkpoint}:ctc.ctc_lo:joint_network.acoustic_output",
        f"{checkpoint}:ctc:ctc",
    ]


@pytest.mark.parametrize(
    "config, parts",
    [
        ({}, ["encoder"]),
        ({"model_conf": {"ctc_weight": 0.3}}, ["encoder", "ctc"]),
        ({"decoder_conf": {"adapter": "ctc_compression"}}, ["encoder", "ctc"]),
        ({"decoder_conf": {"adapter": "frame_stacking"}}, ["encoder"]),
    ],
)
def test_speech_llm(checkpoint, config, parts):
    expected = [f"{checkpoint}:{part}:{part}" for part in parts]
    assert init_params(checkpoint, {"model": "speech_llm", **config}) == expected


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model": "espnet"}, "model: espnet"),
        ({}, "model: espnet"),
        ({"model": "transducer"}, "acoustic_residual: true"),
    ],
)
def test_refusals(checkpoint, config, message):
    with pytest.raises(UserError, match=message):
        init_params(checkpoint, config)


def test_missing_checkpoint():
    with pytest.raises(UserError, match="no CTC checkpoint /nowhere"):
        init_params("/nowhere/x.pth", {"model": "factorized_transducer"})


def test_command_prints_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: factorized_transducer\nmodel_conf: {ctc_weight: 0.1}")
    command.main(["--ctc", checkpoint, "--config", str(tmp_path / "c.yaml")])
    assert len(capsys.readouterr().out.split()) == 3


def test_values_of_the_configuration_follow(checkpoint, tmp_path, capsys):
    """They would be lost otherwise: ESPnet's command line replaces a list of the configuration."""
    config = tmp_path / "c.yaml"
    config.write_text("model: speech_llm\ninit_param: [model.pth, 'a.pth:x:y']\n")
    command.main(["--ctc", checkpoint, "--config", str(config)])
    assert capsys.readouterr().out.split() == [
        f"{checkpoint}:encoder:encoder",
        *("model.pth", "a.pth:x:y"),
    ]
    command.main(["--config", str(config)])
    assert capsys.readouterr().out.split() == ["model.pth", "a.pth:x:y"]
    # what the options say of the model counts
    args = "--asr_args=--max_epoch 1 --model_conf ctc_weight=0.3"
    command.main(["--ctc", checkpoint, "--config", str(config), args])
    assert f"{checkpoint}:ctc:ctc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such training configuration"),
        ("- a\n", "expected `key: value` lines"),
        ("a: [\n", "is not a YAML file"),
        ("init_param: model.pth\n", "init_param must be a list of files, got 'model.pth'"),
    ],
)
def test_bad_configurations(tmp_path, text, message):
    config = tmp_path / "c.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(UserError, match=message):
        command.main(["--config", str(config)])
