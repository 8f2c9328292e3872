"""asr_llm.sh with soft prompts of languages: utt2lang through statistics, training and decoding."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from espnet_llm_plugin.bin import add_languages
from tests.inference.tiny_asr import read_scp
from tests.integration.test_soft_prompt_training import conf
from tests.integration.test_speech_llm_training import COMMON, UTTERANCES, data
from tests.llm.tiny import save_adapted_dir

__all__ = ["data"]  # fixture
pytestmark = pytest.mark.integration

CODES = ["en", "de"]


@pytest.fixture(scope="module")
def directory(data, tmp_path_factory):
    """Data directories; the language of one training utterance is not known."""
    place = tmp_path_factory.mktemp("recipe")
    keys = [f"utt{i:02d}" for i in range(UTTERANCES)]
    for name in ("train", "dev", "test"):
        (place / "data" / name).mkdir(parents=True)
        for file in ("wav.scp", "text"):
            shutil.copy(data / file, place / "data" / name)
        (place / "data" / name / "utt2spk").write_text("".join(f"{k} {k}\n" for k in keys))
        table = "".join(f"{key} {CODES[i % 2]}\n" for i, key in enumerate(keys))
        (place / "data" / name / "utt2lang").write_text(table)
    text = COMMON.replace("normalize: utterance_mvn\n", "") + conf()
    text += "max_epoch: 1\nvalid_batch_type: unsorted\n"
    (place / "train.yaml").write_text(text)
    (place / "tune.yaml").write_text(
        "ctc_weights: [0.2]\nlabel_bonuses: [0.0, 0.5]\nbeam_size: 2\nmax_tokens_per_second: 9\n"
    )
    return place


@pytest.fixture(scope="module")
def run(directory, root):
    def command(*options):
        asr_llm = root / "egs2/TEMPLATE/asr1/asr_llm.sh"
        python = Path(sys.executable).parent
        return subprocess.run(
            [
                *(str(asr_llm), "--token_type", "char", "--nj", "1", "--inference_nj", "1"),
                *("--asr_config", "train.yaml", "--feats_normalize", "utterance_mvn"),
                *("--asr_args", "--decoder_conf llm=llm", "--asr_tag", "x", *options),
            ],
            cwd=directory,
            env={**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return command


@pytest.fixture(scope="module")
def decoded(directory, run):
    """All stages, with the languages given and tuned weights."""
    result = run("--stage", "3", "--stop_stage", "5")
    assert result.returncode == 0, result.stdout + result.stderr
    tokens = (directory / "data/token_list/char/tokens.txt").read_text().splitlines()
    save_adapted_dir(directory / "llm", tokens, max_position_embeddings=64)
    # lost on the way, and of a set that is not decoded
    table = directory / "dump/raw/train/utt2lang"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    options = ("--stage", "10", "--tune_config", "tune.yaml", "--inference_tag", "given")
    result = run(*options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_languages_of_the_training(directory, decoded):
    assert "1 utterances have no language, e.g. utt07" in decoded
    assert "languages of the model without an utterance: pl" in decoded
    table = read_scp(directory / "exp/asr_x/utt2lang/train")
    assert list(table) == [f"utt{i:02d}" for i in range(UTTERANCES)]
    assert table["utt07"] == "unk" and table["utt00"] == "en"
    assert (directory / "exp/asr_stats_raw_char/train/lang_shape").is_file()
    log = (directory / "exp/asr_x/train.log").read_text()
    assert "acc_language=" in log and "num_no_language=" in log
    config = yaml.safe_load((directory / "exp/asr_x/config.yaml").read_text())
    assert config["preprocessor"] == "multilingual"


def test_languages_of_the_decoding(directory, decoded):
    test = directory / "exp/asr_x/given/test"
    assert read_scp(test / "lang") == read_scp(directory / "data/test/utt2lang")
    assert "predicted languages of test" in decoded and "macro average" in decoded
    scores = json.loads((test / "language_id.json").read_text())
    assert scores["utterances"] == UTTERANCES
    # tuning and evaluation had them too
    for file in ("tune/tune.log", "nll/evaluate_nll.1.log", "audio_use/evaluate_audio_use.1.log"):
        assert (directory / "exp/asr_x/given" / file).is_file(), file
    result = (directory / "exp/asr_x/given/nll/nll.json").read_text()
    assert json.loads(result)["num_utterances"] == UTTERANCES


def test_predicted_languages_in_decoding(directory, decoded, run):
    options = ("--stage", "12", "--inference_lang", "predicted", "--inference_tag", "predicted")
    result = run(*options)
    assert result.returncode == 0, result.stdout + result.stderr
    exp = directory / "exp/asr_x"
    used = read_scp(exp / "predicted/test/lang")
    assert used == read_scp(exp / "predicted/test/lang_predicted")
    given, predicted = (
        json.loads((exp / name / "nll/nll.json").read_text())["total_nll"]
        for name in ("given", "predicted")
    )
    assert predicted != pytest.approx(given, abs=1e-6)


def test_what_is_done_is_not_done_again(decoded, run):
    options = ("--stage", "10", "--tune_config", "tune.yaml", "--inference_tag", "given")
    result = run(*options)
    assert result.returncode == 0 and "test already decoded" in result.stdout


def test_sets_without_languages_are_named(directory, decoded, run):
    dump = directory / "dump/raw"
    shutil.copytree(dump / "test", dump / "other")
    (dump / "other/utt2lang").unlink()
    options = ("--stage", "12", "--test_sets", "other", "--inference_tag", "other")
    result = run(*options)
    assert result.returncode == 2
    assert "other/utt2lang: give --inference_lang predicted, unk or a language" in result.stderr
    (dump / "train/utt2lang").rename(dump / "train/kept")
    result = run("--stage", "11", "--stop_stage", "11", "--asr_tag", "y")
    (dump / "train/kept").rename(dump / "train/utt2lang")
    assert result.returncode == 2 and "train/utt2lang: soft prompts of languages" in result.stderr


@pytest.fixture(scope="module")
def extended(directory, decoded):
    """exp/more, the trained model with one more language; data of that language; a CTC model."""
    exp = directory / "exp/asr_x"
    dump = directory / "dump/raw"
    for name in ("train", "dev"):
        shutil.copytree(dump / name, dump / f"{name}_fr")
        keys = read_scp(dump / name / "wav.scp")
        (dump / f"{name}_fr/utt2lang").write_text("".join(f"{key} fr\n" for key in keys))
    options = ["--asr_train_config", str(exp / "config.yaml"), "--languages", "fr"]
    options += ["--asr_model_file", str(exp / "valid.loss.best.pth")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # the LLM is named relative to it
        add_languages.main([*options, "--output_dir", str(directory / "exp/more")])
    ctc = directory / "exp/asr_ctc"
    ctc.mkdir()
    (ctc / ".done").write_text("finished\n")
    trained = torch.load(exp / "valid.loss.best.pth", weights_only=True)
    parts = ("encoder.", "ctc.")
    torch.save(
        {name: torch.randn_like(v) for name, v in trained.items() if name.startswith(parts)},
        ctc / "valid.loss.ave.pth",
    )
    return trained


ADDED = ["--asr_config", "exp/more/train.yaml", "--train_set", "train_fr", "--valid_set", "dev_fr"]
ADDED += ["--stage", "10", "--stop_stage", "11", "--asr_stats_dir", "exp/stats_fr"]


def test_added_languages_start_from_the_trained_model(directory, extended, run):
    """Beside --ctc_init, as recipes give it."""
    settings = yaml.safe_load((directory / "exp/more/train.yaml").read_text())
    assert settings["valid_batch_type"] == "unsorted"
    assert not {"fold_length", "train_shape_file", "valid_shape_file"} & set(settings)
    options = ["--ctc_init", "exp/asr_ctc", "--asr_tag", "more"]
    result = run(*ADDED, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "languages of the model without an utterance: en, de, pl" in result.stdout
    found = torch.load(directory / "exp/asr_more/valid.loss.best.pth", weights_only=True)
    new = {name for name in found if name.endswith("lang_fr")}
    assert len(new) == 2 and set(found) - new == set(extended)
    for name, value in extended.items():
        assert torch.equal(found[name], value), name
    # those of the configuration come last
    config = yaml.safe_load((directory / "exp/asr_more/config.yaml").read_text())
    model = str((directory / "exp/more/model.pth").resolve())
    ctc = "exp/asr_ctc/valid.loss.ave.pth"
    assert config["init_param"] == [f"{ctc}:encoder:encoder", f"{ctc}:ctc:ctc", model]


def test_initial_values_among_the_options_are_refused(extended, run):
    """They would replace the others without a word."""
    args = ["--asr_args", "--decoder_conf llm=llm --init_param exp/more/model.pth"]
    result = run(*ADDED, "--ctc_init", "exp/asr_ctc", "--asr_tag", "z", *args)
    assert result.returncode == 2
    assert "--asr_args has --init_param, which would replace --ctc_init" in result.stderr


def test_languages_among_the_options_are_checked_early(directory, decoded, run):
    """Not those of the configuration: the options of the training have others."""
    args = ["--asr_args", "--decoder_conf llm=llm --decoder_conf soft_prompt_conf.languages=[en]"]
    result = run("--stage", "10", "--stop_stage", "10", "--asr_stats_dir", "exp/s", *args)
    assert result.returncode == 2
    assert "does not know: 'de' (3 utterances, e.g. utt01); it knows en" in result.stderr
    assert not (directory / "exp/s").exists()
