"""The recipes as users run them: through bash, on tiny synthetic speech."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from espnet_llm_plugin.memory import PEAK

pytestmark = pytest.mark.integration


def environment():
    """The test's Python first in PATH, so that `python3` is the one under test."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command, directory, **kwargs):
    return subprocess.run(
        [str(argument) for argument in command],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="session")
def recipes(tmp_path_factory, root):
    """A copy of egs2/ and conf/ without anybody's data and experiments."""
    target = tmp_path_factory.mktemp("recipes")
    ignore = shutil.ignore_patterns("exp", "dump", "data")
    shutil.copytree(root / "egs2", target / "egs2", symlinks=True, ignore=ignore)
    shutil.copytree(root / "conf", target / "conf")
    return target / "egs2"


@pytest.fixture(scope="session")
def mini(recipes):
    """egs2/mini after a tiny run of all stages: (its directory, what the run printed)."""
    directory = recipes / "mini" / "asr1"
    result = run(["./run.sh", "--size", "tiny"], directory)
    assert result.returncode == 0, result.stdout + result.stderr
    return directory, result.stdout


SYSTEMS = (
    "CTC",
    "RNN-T",
    "RNN-T + LLM shallow fusion",
    "FT weak",
    "FT weak, LLM swapped in",
    "FT trained with the LLM",
)


def test_mini_ends_with_a_table_of_all_systems(mini):
    directory, printed = mini
    table = (directory / "exp/tiny/RESULTS.md").read_text()
    for system in SYSTEMS:
        assert f"|{system}|" in table
        assert system in printed
    assert (directory / "exp/tiny/wer.png").stat().st_size > 1000


def keys_of(path):
    return {line.split()[0] for line in path.read_text().splitlines()}


def test_mini_decodes_every_utterance_in_espnets_form(mini):
    directory, _ = mini
    keys = keys_of(directory / "dump/tiny/raw/test/wav.scp")
    for experiment in ("asr_ctc/decode", "asr_rnnt/decode_fusion", "asr_ft_weak/decode_swap"):
        decoded = directory / "exp/tiny" / experiment / "test"
        for name in ("text", "token", "token_int", "score"):
            assert keys_of(decoded / name) == keys
        for unit in ("wer", "cer", "ter"):
            assert (decoded / f"score_{unit}" / "result.txt").is_file()


def test_no_checkpoint_of_a_transducer_holds_the_llm(mini):
    import torch

    directory, _ = mini
    exp = directory / "exp/tiny"
    llm = exp / "lm_llama_adapted/llm/model.safetensors"
    checkpoint = torch.load(exp / "asr_ft_llm/valid.loss.ave.pth", weights_only=True)
    predictor = sum(v.numel() for k, v in checkpoint.items() if k.startswith("decoder.predictor"))
    assert predictor < 100 < llm.stat().st_size / 4


def test_a_second_run_does_nothing_twice(mini):
    directory, first = mini
    before = {p: p.stat().st_mtime_ns for p in (directory / "exp/tiny").rglob("*.pth")}
    start = time.monotonic()
    result = run(["./run.sh", "--size", "tiny"], directory)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stage 11" in result.stdout and "already done" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in (directory / "exp/tiny").rglob("*.pth")} == before
    assert time.monotonic() - start < 240


ASR_LLM = ["../../TEMPLATE/asr1/asr_llm.sh", "--datadir", "data/tiny", "--expdir", "exp/tiny"]
ASR_LLM += ["--dumpdir", "dump/tiny", "--nbpe", "300", "--nj", "1", "--skip_data_prep", "true"]


def asr_llm(mini, *arguments, **kwargs):
    return run([*ASR_LLM, *arguments], mini[0], **kwargs)


def test_trained_models_are_not_overwritten_by_other_options(mini):
    arguments = ["--asr_tag", "ctc", "--asr_config", "conf/mini/train_ctc.yaml"]
    result = asr_llm(mini, *arguments, "--asr_args", "--max_epoch 2", "--stop_stage", "11")
    assert result.returncode == 2
    assert "exp/tiny/asr_ctc was trained with other options" in result.stderr


def kill_when(ready, mini, arguments, kind):
    """Start asr_llm.sh and send it and its children a signal as soon as ``ready()``."""
    process = subprocess.Popen(
        [*ASR_LLM, *arguments],
        cwd=mini[0],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, kind)
    process.wait()


def test_a_killed_training_continues(mini):
    """SIGKILL in the first epochs; the second call resumes at the last finished epoch."""
    arguments = ["--asr_tag", "killed", "--asr_config", "conf/mini/train_ctc.yaml"]
    arguments += ["--asr_args", "--max_epoch 3", "--stage", "11", "--stop_stage", "11"]
    directory = mini[0] / "exp/tiny/asr_killed"
    kill_when((directory / "1epoch.pth").is_file, mini, arguments, signal.SIGKILL)
    assert not (directory / ".done").exists()
    result = asr_llm(mini, *arguments)
    assert result.returncode == 0, result.stderr
    assert (directory / ".done").exists()
    log = (directory / "train.log").read_text()
    assert "The training was resumed using" in log
    assert log.count("1epoch results") == 1


def test_a_stopped_decoding_stops_its_jobs_and_continues(mini):
    """SIGTERM while a background job decodes: the job ends too, and its work is not lost."""
    arguments = ["--asr_tag", "ctc", "--asr_config", "conf/mini/train_ctc.yaml", "--stage", "12"]
    arguments += ["--inference_tag", "stopped", "--inference_nj", "1", "--stop_stage", "12"]
    output = mini[0] / "exp/tiny/asr_ctc/stopped/test/logdir/output.1"
    kill_when(lambda: any(output.glob(".partial*")), mini, arguments, signal.SIGTERM)
    time.sleep(1)
    processes = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not any("--inference_tag stopped" in p or "ctc/stopped" in p for p in processes)
    result = asr_llm(mini, *arguments)
    assert result.returncode == 0, result.stderr
    assert len(keys_of(mini[0] / "exp/tiny/asr_ctc/stopped/test/text")) == 20


def test_missing_stages_are_named(mini):
    result = asr_llm(
        mini, "--asr_tag", "never", "--asr_config", "conf/mini/train_ctc.yaml", "--stage", "12"
    )
    assert result.returncode == 2
    assert "exp/tiny/asr_never is not a finished training: run stage 11" in result.stderr


def test_unmodified_espnet_decodes_what_the_recipe_trained(mini):
    directory, _ = mini
    result = run(
        [
            *[sys.executable, "-m", "espnet_llm_plugin", "-m", "espnet2.bin.asr_inference"],
            *["--asr_train_config", "exp/tiny/asr_ft_llm/config.yaml"],
            *["--asr_model_file", "exp/tiny/asr_ft_llm/valid.loss.ave.pth"],
            *["--data_path_and_name_and_type", "dump/tiny/raw/dev/wav.scp,speech,sound"],
            *["--output_dir", "exp/tiny/espnet_decode", "--beam_size", "1"],
        ],
        directory,
    )
    assert result.returncode == 0, result.stderr
    decoded = directory / "exp/tiny/espnet_decode/1best_recog/text"
    assert len(decoded.read_text().splitlines()) == 20


def test_espnet_packs_what_the_recipe_trained(mini):
    directory, _ = mini
    result = run(
        [
            *[sys.executable, "-m", "espnet_llm_plugin", "-m", "espnet2.bin.pack", "asr"],
            *["--asr_train_config", "exp/tiny/asr_ft_weak/config.yaml"],
            *["--asr_model_file", "exp/tiny/asr_ft_weak/valid.loss.ave.pth"],
            *["--outpath", "exp/tiny/packed.zip"],
        ],
        directory,
    )
    assert result.returncode == 0, result.stderr
    names = zipfile.ZipFile(directory / "exp/tiny/packed.zip").namelist()
    assert "meta.yaml" in names
    assert any(name.endswith("config.yaml") for name in names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stagee", "3"], "unknown option --stagee"),
        (["train"], "expected an option, got 'train'"),
        (["--stage"], "option --stage needs a value"),
        (["--token_type", "phone"], "expected bpe, char, word or hugging_face"),
        (["--use_lm", "yes"], "expected true or false"),
        (["--lm_token_type", "bpe"], "expected hugging_face or nothing"),
        (["--lm_token_type", "hugging_face"], "--lm_token_type hugging_face needs --llm"),
    ],
)
def test_wrong_options_are_refused(recipes, arguments, message):
    result = run(["../../TEMPLATE/asr1/asr_llm.sh", *arguments], recipes / "custom" / "asr1")
    assert result.returncode == 2
    assert message in result.stderr


def test_help_lists_every_option_and_stage(recipes):
    result = run(["../../TEMPLATE/asr1/asr_llm.sh", "--help"], recipes / "mini" / "asr1")
    assert result.returncode == 0
    for word in ("stage 11", "stage 13", "--asr_config", "--swap_llm", "--tune_config"):
        assert word in result.stdout


def test_custom_data(mini, recipes):
    """Bring your own directories: here the tiny corpus, seen as somebody else's."""
    source = recipes / "somebody"
    directory = recipes / "custom" / "asr1"
    for name, target in (("train", "train"), ("dev", "dev"), ("test", "test"), ("test", "again")):
        shutil.copytree(mini[0] / "data/tiny" / name, source / target)
        lines = (source / target / "wav.scp").read_text().splitlines()
        # the recipe's own paths are relative to its directory
        absolute = [f"{key} {mini[0] / path}\n" for key, path in map(str.split, lines)]
        (source / target / "wav.scp").write_text("".join(absolute))
    (directory / "one_point.yaml").write_text("alphas: [1.0]\nbetas: [0.0]\nbeam_size: 2\n")
    result = run(
        [
            *["./run.sh", "--train_dir", source / "train", "--valid_dir", source / "dev"],
            *["--test_dirs", f"{source}/test {source}/again", "--nj", "2", "--inference_nj", "2"],
            *["--asr_args", "--max_epoch 1", "--lm_args", "--max_epoch 1"],
            *["--llm", mini[0] / "exp/tiny/lm_llama/llm", "--tune_config", "one_point.yaml"],
        ],
        directory,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("test", "again"):
        for tag in ("decode", "decode_swap"):
            assert (directory / f"exp/asr_ft/{tag}/{name}/score_wer/result.txt").is_file()
    # the page of the swapped system compares it with the weak LM
    for tag, compared in (("decode", False), ("decode_swap", True)):
        page = (directory / f"exp/asr_ft/{tag}/diagnosis.md").read_text()
        assert ("with the weak LM" in page and "with the strong LM tuned" in page) == compared


def decode_mark(root, directory, tool="tune_fusion"):
    """By which a decoding tuned by ``grid.yaml`` is known."""
    functions = "".join(
        f"/^{name}()/,/^}}/p; " for name in ("checksum", "llm_mark", "configured", "decode_mark")
    )
    names = "asr_exp inference_asr_model inference_config inference_args lm_files lm_exp swap_llm"
    script = f"""set -eu
        eval "$(sed -n '{functions}' {root}/egs2/TEMPLATE/asr1/asr_llm.sh)"
        for name in {names} decode_lang; do declare "${{name}}="; done
        tune_tool={tool} tune_config=grid.yaml
        decode_mark"""
    mark = run(["bash", "-c", script], directory)
    assert mark.returncode == 0 and len(mark.stdout.strip()) == 64, mark.stderr
    return mark.stdout


@pytest.mark.parametrize("tool", ["tune_scales", "tune_fusion"])
def test_another_grid_is_tuned_again(root, tmp_path, tool):
    """The mark of a decoding depends on what is in the file of the grid."""
    marks = []
    for grid in ("alphas: [1.0]\n", "alphas: [0.5]\n", "# a comment\nalphas: [1.0]\n"):
        (tmp_path / "grid.yaml").write_text(grid)
        marks.append(decode_mark(root, tmp_path, tool))
    assert marks[0] == marks[2] != marks[1]


@pytest.mark.parametrize(
    ("key", "file"),
    [("fusion_llm: llm", "llm/model.safetensors"), ("fusion_ngram: lm.npz", "lm.npz")],
)
def test_another_lm_in_the_same_place_is_decoded_again(root, tmp_path, key, file):
    (tmp_path / "grid.yaml").write_text(f"{key}\n")
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text("{}")
    marks = []
    for content in (b"first", b"other", b"first"):
        (tmp_path / file).write_bytes(content)
        marks.append(decode_mark(root, tmp_path))
    assert marks[0] == marks[2] != marks[1]


def test_a_copy_of_an_llm_is_the_same_llm_and_other_weights_are_not(root, tmp_path):
    functions = "/^checksum()/,/^}/p; /^llm_mark()/,/^}/p"
    script = f"""set -eu
        eval "$(sed -n '{functions}' {root}/egs2/TEMPLATE/asr1/asr_llm.sh)"
        llm_mark "$1" """
    marks = []
    weights = bytearray(3_000_000)
    for name, byte in (("first", 0), ("copy", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        weights[5 * 3_000_000 // 256] = byte  # in the middle, at the start of a block
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        marks.append(run(["bash", "-c", script, "bash", name], tmp_path).stdout)
    assert marks[0] == marks[1] != marks[2] and marks[0].strip()


def test_options_of_the_adaptation_reach_it_and_adapt_again(root, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> calls\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "text").write_text("a b\n")
    for name, content in (("llm/config.json", "{}"), ("data/token_list/char/tokens.txt", "a\n")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    command = [root / "egs2/TEMPLATE/asr1/asr_llm.sh", "--stage", 6, "--stop_stage", 6]
    command += ["--python", "./python", "--token_type", "char", "--llm", "llm", "--use_lm", "true"]
    command += ["--train_set", "train", "--valid_set", "dev", "--test_sets", "test"]
    command += ["--lm_tag", "x", "--lm_train_text", "text", "--lm_dev_text", "text"]
    runs = [
        ([], ["mean", "true"]),
        (["--exact_match", "true"], None),  # the same as before: already done
        (["--exact_match", "false"], ["mean", "false"]),
        (["--oov_init", "random", "--exact_match", "false"], ["random", "false"]),
        (["--oov_init", "random"], ["random", "true"]),
    ]
    for options, expected in runs:
        (tmp_path / "calls").write_text("")
        result = run([*command, *options], tmp_path)
        assert result.returncode == 0, result.stderr
        words = (tmp_path / "calls").read_text().split()
        names = ("--oov_init", "--exact_match")
        found = [words[words.index(name) + 1] for name in names] if words else None
        assert found == expected


def test_time_and_memory_of_a_training(root, tmp_path):
    """Of the largest process, what the log says."""
    functions = "; ".join(
        f"/^{name}()/,/^}}/p"
        for name in ("cpu_seconds", "start_clock", "peak_memory", "stop_clock")
    )
    script = f"""set -euo pipefail
        eval "$(sed -n '{functions}' {root}/egs2/TEMPLATE/asr1/asr_llm.sh)"
        start_clock .
        cp log train.log
        stop_clock ."""
    resident = f"{PEAK} 5000000000 bytes\n1epoch: nothing\n{PEAK} 3000000000 bytes\n"
    gpu = "1epoch: gpu_max_cached_mem_GB=2.5, x\n2epoch: gpu_max_cached_mem_GB=0.5\n"
    for log, expected in (
        ("nothing\n", {}),
        (resident, {"memory_bytes": 5_000_000_000}),
        (gpu, {"gpu_memory_bytes": 2.5 * 2**30}),
        (gpu + resident, {"memory_bytes": 5_000_000_000, "gpu_memory_bytes": 2.5 * 2**30}),
    ):
        (tmp_path / "log").write_text(log)
        assert run(["bash", "-c", script], tmp_path).returncode == 0
        found = json.loads((tmp_path / "time.json").read_text())
        assert found == {"seconds": found["seconds"], "cpu_seconds": 0, **expected}


def test_custom_test_sets_need_names_of_their_own(recipes):
    directories = ["--train_dir", "a/x", "--valid_dir", "a/y", "--test_dirs"]
    for test_dirs in ("a/test b/test", "a/train"):
        result = run(["./run.sh", *directories, test_dirs], recipes / "custom" / "asr1")
        assert result.returncode == 2
        assert "already a set called" in result.stderr


def test_custom_data_names_what_is_missing(recipes):
    result = run(["./run.sh", "--train_dir", "nowhere"], recipes / "custom" / "asr1")
    assert result.returncode == 2
    assert "--valid_dir is missing" in result.stderr
