"""A speech LLM with auxiliary heads, exported, packed by ESPnet, and decoded where nothing of its
training is left."""

import re
import shlex
import shutil

import pytest
import torch
import yaml

from espnet_llm_plugin.bin import asr_inference, export_model
from espnet_llm_plugin.errors import UserError
from tests.integration.test_speech_llm_training import (
    UTTERANCES,
    data,
    decoding,
    hypotheses,
    state,
    task,
    training,
)
from tests.llm.tiny import train_sentencepiece
from tests.speech_llm.tiny_llm import TOKENS

__all__ = ["data", "task"]  # fixtures
pytestmark = pytest.mark.integration

CONF = """
model: speech_llm
model_conf:
  ctc_weight: 0.3
  ctc_vocabulary: {token_list: files/bpe.tokens.txt, bpemodel: files/bpe.model}
  auxiliary:
  - {loss: rnnt, tap: llm_prefix, joint_dim: 8, predictor_dim: 8,
     vocabulary: {token_list: files/tokens.txt}}
  - {loss: ctc, tap: encoder}
decoder: speech_llm
decoder_conf:
  llm: files/llm
  tuning: lora
  lora_conf: {r: 2, alpha: 4}
  adapter: ctc_compression
"""
SEARCH = ("--ctc_weight", "0", "--lm_weight", "0")


@pytest.fixture(scope="module")
def trained(data, task, tmp_path_factory):
    """A directory like a recipe's: exp/asr from an epoch, and the files that its YAML names."""
    directory = tmp_path_factory.mktemp("recipe")
    files = directory / "files"
    shutil.copytree(data / "llm", files / "llm")
    (files / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    train_sentencepiece(files / "bpe", ["abcde edcba", "cab deb", "bad ace"], vocab_size=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        task.main(cmd=training(data, directory / "exp/asr", CONF, "--max_epoch", "1"))
    return directory


def export(*options, output_dir="exp/export"):
    export_model.main(
        [
            *("--asr_train_config", "exp/asr/config.yaml"),
            *("--asr_model_file", "exp/asr/valid.loss.ave.pth"),
            *("--output_dir", str(output_dir), *options),
        ]
    )


def decode(data, config, model, out):
    """What both commands write, ESPnet's and ours; the scores too."""
    from espnet2.bin import asr_inference as espnets

    found = {}
    for command, more in ((espnets, ()), (asr_inference, ("--max_repeats", "0"))):
        name = command.__name__
        arguments = decoding(data, out, out / name, *SEARCH, *more)
        arguments[1], arguments[3] = str(config), str(model)
        command.main(arguments)
        text = (out / name / "1best_recog/text").read_text()
        assert len(text.splitlines()) == UTTERANCES
        found[name] = (text, hypotheses(out / name))
    assert len(found) == 2
    return found


def test_packed_and_unpacked_elsewhere(data, trained, tmp_path, monkeypatch, capsys):
    from espnet2.bin import pack
    from espnet2.main_funcs.pack_funcs import unpack

    here = shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(here)
    config, model = "exp/asr/config.yaml", "exp/asr/valid.loss.ave.pth"
    before = decode(data, config, model, tmp_path / "before")

    # 1. What is exported: all but the heads, bit by bit
    export()
    printed = capsys.readouterr().out
    whole, exported = state(here / model), state(here / "exp/export/model.pth")
    heads = {name for name in whole if name.startswith("auxiliary.")}
    assert {name.split(".")[1] for name in heads} == {"llm_prefix_rnnt", "encoder_ctc"}
    assert set(exported) == set(whole) - heads
    assert all(torch.equal(exported[name], whole[name]) for name in exported)
    sizes = re.search(r"([\d.]+) MB before, ([\d.]+) MB without (\d+) tensors", printed)
    assert int(sizes[3]) == len(heads)
    assert [float(size) for size in sizes.groups()[:2]] == [
        round((here / path).stat().st_size / 1e6, 3) for path in (model, "exp/export/model.pth")
    ]
    assert float(sizes[2]) < float(sizes[1])
    conf = yaml.safe_load((here / "exp/export/config.yaml").read_text())
    assert "auxiliary" not in conf["model_conf"]
    assert conf["model_conf"]["ctc_vocabulary"] == {
        "token_list": "exp/export/ctc_tokens.txt",
        "bpemodel": "exp/export/ctc_bpe.model",
    }

    # 2. Packed as the command says, and unpacked where nothing else is
    command = shlex.split(printed.split("from this directory: ")[1])
    assert command[:4] == ["python", "-m", "espnet2.bin.pack", "asr"]
    pack.main(command[3:])
    shutil.move(here / "exp/export.zip", tmp_path / "model.zip")
    shutil.rmtree(here)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    files = unpack(tmp_path / "model.zip", "unpacked")
    config, model = files["asr_train_config"], files["asr_model_file"]
    assert decode(data, config, model, tmp_path / "after") == before


def test_packed_without_export_espnet_misses_the_vocabularies(data, trained, tmp_path, monkeypatch):
    """The reason for the command; ours does not build the heads, but needs the CTC."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    shutil.move("files/tokens.txt", tmp_path)
    with pytest.raises(UserError, match="tokens.txt cannot be read"):
        decode(data, "exp/asr/config.yaml", "exp/asr/valid.loss.ave.pth", tmp_path / "out")
    export()  # needs no file of a head
    shutil.move("files/bpe.model", tmp_path)
    with pytest.raises(UserError, match="ctc_vocabulary.bpemodel is files/bpe.model, and there is"):
        export(output_dir="exp/again")
    decode(data, "exp/export/config.yaml", "exp/export/model.pth", tmp_path / "out")


def test_what_cannot_be_exported_or_packed(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    export(output_dir=tmp_path / "outside")
    assert "outside is not below the working directory" in capsys.readouterr().out
    for file in ("checkpoint.pth", "train.yaml"):
        with pytest.raises(UserError, match=f"{file} is not the checkpoint of a model"):
            export("--asr_model_file", f"exp/asr/{file}")
    with pytest.raises(UserError, match="is not empty"):
        export(output_dir="exp/asr")
    config = yaml.safe_load((tmp_path / "here/exp/asr/config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "model": "espnet"}))
    with pytest.raises(UserError, match="only a speech_llm has auxiliary heads"):
        export("--asr_train_config", str(tmp_path / "config.yaml"))
