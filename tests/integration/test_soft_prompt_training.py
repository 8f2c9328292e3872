"""Soft prompts of languages through ESPnet's own commands, and ours after them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin.bin import add_languages, asr_inference, score_language_id
from espnet_llm_plugin.errors import UserError
from tests.integration.test_distributed_training import by_torchrun
from tests.integration.test_speech_llm_training import (
    UTTERANCES,
    data,
    decoding,
    hypotheses,
    loads,
    state,
    task,
    training,
)

__all__ = ["data", "loads", "task"]  # fixtures
pytestmark = pytest.mark.integration

CONF = """
model: speech_llm
model_conf: {{ctc_weight: 0.3, language_weight: 0.2{model_conf}}}
decoder: speech_llm
decoder_conf:
  tuning: {tuning}
  adapter_conf: {{stack: 2}}
  soft_prompt: per_language
  soft_prompt_conf: {{length: 2, languages: {languages}}}
  language_prediction: true
preprocessor: multilingual
allow_variable_data_keys: true
"""
CODES = ["en", "de"]


def conf(tuning="frozen", languages="[en, de, pl]", model_conf=""):
    return CONF.format(tuning=tuning, languages=languages, model_conf=model_conf)


@pytest.fixture(scope="module")
def utt2lang(data):
    """Languages in turn; one utterance has none, which ESPnet's statistics want to be said."""
    path = data / "utt2lang"
    codes = [CODES[i % 2] for i in range(UTTERANCES)]
    codes[3] = "unk"
    path.write_text("".join(f"utt{i:02d} {code}\n" for i, code in enumerate(codes)))
    return path


def lang(path):
    options = []
    for part in ("train", "valid"):
        options += [f"--{part}_data_path_and_name_and_type", f"{path},lang,text"]
    return options


@pytest.fixture(scope="module")
def trained(data, utt2lang, task, tmp_path_factory):
    """An epoch with LoRA; its log is in train.txt."""
    exp = tmp_path_factory.mktemp("exp")
    command = training(
        data, exp, conf("lora"), "--max_epoch", "1", *lang(utt2lang), llm=data / "llm"
    )
    result = subprocess.run(
        [sys.executable, "-m", "espnet_llm_plugin", "-m", "espnet2.bin.asr_train", *command],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (exp / "train.txt").write_text(result.stdout + result.stderr)
    return exp


def test_statistics_carry_the_languages(data, utt2lang, task, tmp_path, loads):
    options = ("--collect_stats", "true", *lang(utt2lang))
    task.main(cmd=training(data, tmp_path, conf("full"), *options, llm=data / "llm"))
    assert loads == []
    shapes = dict(line.split() for line in (tmp_path / "train/lang_shape").open())
    assert shapes["utt00"] == "2" and shapes["utt03"] == "3" and len(shapes) == UTTERANCES
    assert "lang" in (tmp_path / "train/batch_keys").read_text().split()
    with_names = conf(languages="{en: bad, de: head}").replace(
        "length: 2", "length: 2, init: language_name"
    )
    task.main(cmd=training(data, tmp_path / "names", with_names, *options, llm=data / "llm"))
    assert loads == []


def test_training(trained):
    log = (trained / "train.txt").read_text()
    for name in ("num_no_language", "loss_language", "acc_language"):
        assert f"{name}=" in log
    saved = state(trained / "1epoch.pth")
    soft = {name for name in saved if "soft_prompt" in name}
    codes = ("lang_en", "lang_de", "lang_pl", "unk")
    assert soft == {f"decoder.soft_prompt.{name}" for name in codes}


@pytest.mark.parametrize(
    "line, message",
    [
        ("utt02 fr", r"does not know: 'fr' \(1 utterance, e.g. utt02\); it knows en, de, pl"),
        (None, "utt2lang"),
    ],
)
def test_training_with_wrong_languages(data, utt2lang, task, tmp_path, line, message):
    options = ()
    if line is not None:
        lines = utt2lang.read_text().splitlines()
        lines[2] = line
        (tmp_path / "utt2lang").write_text("\n".join(lines) + "\n")
        options = lang(tmp_path / "utt2lang")
    command = training(data, tmp_path, conf(), "--max_epoch", "1", *options, llm=data / "llm")
    with pytest.raises(UserError, match=message):
        task.main(cmd=command)


def test_two_processes(data, task, tmp_path):
    """Every parameter has its gradient, though a process may have no language, or no utterance with
    one: means of that are left out."""
    lines = [f"utt{i:02d} {'en' if i == 0 else 'unk'}\n" for i in range(UTTERANCES)]
    (tmp_path / "utt2lang").write_text("".join(lines))
    exp = tmp_path / "exp"
    options = ("--max_epoch", "2", *lang(tmp_path / "utt2lang"))
    command = training(data, exp, conf("lora"), *options, llm=data / "llm")
    by_torchrun("espnet2.bin.asr_train", command, tmp_path)
    first, second = state(exp / "1epoch.pth"), state(exp / "2epoch.pth")
    for name in ("lang_en", "unk"):
        key = f"decoder.soft_prompt.{name}"
        assert not torch.equal(first[key], second[key]) and second[key].isfinite().all()
    stats = torch.load(exp / "checkpoint.pth", weights_only=False)["reporter"]["stats"]
    train = stats[2]["train"]
    assert float(train["loss"]) > 0 and float(train["num_no_language"]) > 0


def test_decoding(data, utt2lang, trained, tmp_path, capsys):
    from espnet2.bin import asr_inference as espnets

    # ESPnet's command knows no languages: they are predicted
    search = ("--ctc_weight", "0.2", "--lm_weight", "0")
    espnets.main(decoding(data, trained, tmp_path / "espnet", *search))
    theirs = hypotheses(tmp_path / "espnet")
    assert len({score for _, score in theirs.values()}) == UTTERANCES
    found = {}
    for name, options in {"given": ("--utt2lang", str(utt2lang)), "predicted": ()}.items():
        asr_inference.main(
            decoding(data, trained, tmp_path / name, *search, *options, "--max_repeats", "0")
        )
        lines = (tmp_path / name / "nbest.jsonl").read_text().splitlines()
        found[name] = {entry["utt"]: entry for entry in map(json.loads, lines)}
    predicted = tmp_path / "predicted/1best_recog/lang_predicted"
    options = ["--utt2lang", str(utt2lang), "--hyp", str(predicted)]
    score_language_id.main([*options, "--output_dir", str(tmp_path)])
    assert "1 utterances without a language" in capsys.readouterr().out
    scores = json.loads((tmp_path / "language_id.json").read_text())
    assert scores["utterances"] == UTTERANCES - 1
    for i in range(UTTERANCES):
        name = f"utt{i:02d}"
        used = found["given"][name]["lang"]
        assert used == (CODES[i % 2] if i != 3 else "unk")


def test_packed_model(data, utt2lang, trained, tmp_path, monkeypatch):
    """What ESPnet packs is unpacked elsewhere and decodes to the same."""
    from espnet2.bin import pack
    from espnet2.main_funcs.pack_funcs import unpack

    monkeypatch.chdir(trained)  # ESPnet unpacks only what was packed by relative paths
    pack.main(
        [
            *("asr", "--asr_train_config", "config.yaml"),
            *("--asr_model_file", "valid.loss.ave.pth"),
            *("--outpath", str(tmp_path / "model.zip")),
        ]
    )
    files = unpack(tmp_path / "model.zip", tmp_path / "unpacked")
    assert all(tmp_path in Path(file).parents for file in files.values())
    results = []
    for name, config, model in (
        ("before", trained / "config.yaml", trained / "valid.loss.ave.pth"),
        ("after", files["asr_train_config"], files["asr_model_file"]),
    ):
        command = decoding(data, trained, tmp_path / name, "--utt2lang", str(utt2lang))
        command[1], command[3] = str(config), str(model)
        asr_inference.main([*command, "--ctc_weight", "0.2"])
        lines = (tmp_path / name / "nbest.jsonl").read_text().splitlines()
        results.append([(entry["token_int"], entry["lang"]) for entry in map(json.loads, lines)])
    assert results[0] == results[1]


def test_new_languages_are_trained_alone(data, trained, task, tmp_path, caplog):
    caplog.set_level("INFO")
    options = ["--asr_train_config", str(trained / "config.yaml")]
    options += ["--asr_model_file", str(trained / "1epoch.pth")]
    new = tmp_path / "new"
    add_languages.main([*options, "--languages", "hi", "ta=bade", "--output_dir", str(new)])
    before, start = state(trained / "1epoch.pth"), state(new / "model.pth")
    added = {name for name in start if name not in before}
    assert added == {
        f"decoder.{part}.lang_{code}"
        for part in ("soft_prompt", "language_head")
        for code in ("hi", "ta")
    }
    assert all(torch.equal(start[name], before[name]) for name in before)
    config = yaml.safe_load((new / "train.yaml").read_text())
    assert "output_dir" not in config and "train_data_path_and_name_and_type" not in config
    assert config["optim"] == "adam" and config["encoder_conf"]["output_size"] == 16

    # data in the new languages; the options are those of a recipe
    lines = [f"utt{i:02d} {('hi', 'ta')[i % 2]}\n" for i in range(UTTERANCES)]
    (tmp_path / "utt2lang").write_text("".join(lines))
    exp = tmp_path / "exp"
    command = training(data, exp, "", "--max_epoch", "1", *lang(tmp_path / "utt2lang"))
    command[1] = str(new / "train.yaml")
    task.main(cmd=command)
    after = state(exp / "1epoch.pth")
    assert {name for name in after if not torch.equal(after[name], start[name])} == added
    asr_inference.main(decoding(data, exp, tmp_path / "decoded", "--lang", "ta"))
    assert len((tmp_path / "decoded/nbest.jsonl").read_text().splitlines()) == UTTERANCES

    for languages, message in ((["en"], "has en already"), (["a.b"], "'a.b'")):
        with pytest.raises(UserError, match=message):
            add_languages.main([*options, "--languages", *languages, "--output_dir", str(new)])


def test_languages_cannot_be_added_to_other_models(data, trained, tmp_path):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    options = ["--languages", "hi", "--output_dir", str(tmp_path / "new")]
    options += ["--asr_model_file", str(trained / "1epoch.pth")]
    for change, message in (
        ({"soft_prompt": "none", "soft_prompt_conf": None}, "is not of a speech LLM with"),
        ({"tuning": "frozen", "lora_conf": None}, "differ in|lora"),
    ):
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({**config, "decoder_conf": {**config["decoder_conf"], **change}})
        )
        with pytest.raises(UserError, match=message):
            add_languages.main([*options, "--asr_train_config", str(tmp_path / "config.yaml")])
