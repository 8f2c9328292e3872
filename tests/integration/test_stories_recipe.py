"""egs2/stories: which trainings and decodings its rows need, and with which options."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_fusion
from espnet_llm_plugin.inference.options import parse_with_configs

pytestmark = pytest.mark.integration

ROWS = [
    [field.strip() for field in line.split("|")]
    for line in (Path(__file__).parents[2] / "egs2/stories/asr1/local/rows.txt").open()
    if not line.startswith("#")
]
MAIN = [row[0] for row in ROWS if row[1] == "main"]

# Notes its options, as several may do at a time, a line each.
NOTE = """#!/usr/bin/env bash
flock {0}.lock bash -c 'printf "%s\\t" "$@" >> {0}; echo >> {0}' - "$@"
"""
# It leaves what tuning leaves, because training after it reads that.
ASR_LLM = f"""{NOTE.format("calls")}
while [ $# -gt 1 ]; do declare "${{1#--}}=$2"; shift 2; done
[ -n "${{inference_tag:-}}" ] || exit 0
directory=${{expdir}}/asr_${{asr_tag}}/${{inference_tag}}/tune
mkdir -p "${{directory}}"
printf '# WER 9 %%\\nalpha: 0.2\\nbeta: 0.4\\nbeam_size: 4\\nlabel_bonus: 2.5\\n' \\
    > "${{directory}}/best.yaml"
"""
REQUIRED = ["--output_dir", "x", "--data_path_and_name_and_type", "x,speech,sound"]
REQUIRED += ["--asr_train_config", "x", "--asr_model_file", "x"]
PYTHON = NOTE.format("tools")


def copy_recipe(target, root):
    """A copy of the recipe in which nothing is trained."""
    ignore = shutil.ignore_patterns("exp", "dump", "data")
    shutil.copytree(root / "egs2", target / "egs2", symlinks=True, ignore=ignore)
    shutil.copytree(root / "conf", target / "conf")
    (target / "egs2/TEMPLATE/asr1/asr_llm.sh").write_text(ASR_LLM)
    (target / "bin").mkdir()
    (target / "bin/python3").write_text(PYTHON)
    (target / "bin/python3").chmod(0o755)
    return target / "egs2/stories/asr1"


@pytest.fixture
def recipe(tmp_path, root):
    return copy_recipe(tmp_path, root)


def launch(recipe, *arguments, python, script="run.sh"):
    return subprocess.run(
        [f"./{script}", *map(str, arguments)],
        cwd=recipe,
        env={**os.environ, "PATH": f"{python}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def run(recipe, *arguments, status=0, script="run.sh"):
    """Options of each call of asr_llm.sh (of one given twice, the last); or what went wrong."""
    for name in ("calls", "tools"):
        (recipe / name).unlink(missing_ok=True)
    result = launch(recipe, *arguments, python=recipe.parents[2] / "bin", script=script)
    assert result.returncode == status, result.stdout + result.stderr
    if status:
        return result.stderr
    lines = (line.split("\t") for line in (recipe / "calls").read_text().split("\t\n")[:-1])
    return [dict(zip(words[::2], words[1::2])) for words in lines]


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory, root):
    """(calls of a run of all rows, what else it called)"""
    recipe = copy_recipe(tmp_path_factory.mktemp("all"), root)
    return run(recipe, *OPTIONS, "--rows", "all"), (recipe / "tools").read_text()


def trainings(found):
    """The last training options of each model, by its directory."""
    return {
        f"{call['--expdir']}/asr_{call['--asr_tag']}": call
        for call in found
        if call.get("--stop_stage") == "11"
    }


def decodings(found):
    return {
        f"{call['--expdir']}/asr_{call['--asr_tag']}/{call['--inference_tag']}": call
        for call in found
        if "--inference_tag" in call
    }


OPTIONS = ["--llm_source", "DIR/LLM", "--size", "full", "--epochs", "5", "--jobs", "1"]
EXP = "exp/full_LLM"
HERE = f"{EXP}/offline_e5_s1"
SMALL = "exp/small_llama_full/llm"


def test_rows_are_models_with_decodings_of_their_own(all_rows):
    found = decodings(all_rows[0])
    assert len(ROWS) == len({row[0] for row in ROWS}) == len(found) == 27
    for row in ROWS:
        model, use, scales = row[2:5]
        tag = "_".join(["decode", *use.split(), *(["as_trained"] if scales != "tuned" else [])])
        place = f"{EXP}/offline_s1" if model == "ctc" else HERE
        call = found[f"{place}/asr_{model}/{tag}"]
        grid = "tune" if scales == "tuned" else "tune_as_trained"
        assert call["--tune_config"] == f"conf/stories/{grid}.yaml"
        llm = f"{EXP}/lm_{use.split()[-1]}" if use else None
        assert call.get("--swap_llm") == (f"{llm}/llm" if use.startswith("swap") else None)
        assert call.get("--lm_exp") == (llm if use.startswith("fusion") else None)
        after_mwer = row[0].startswith(("swap_mwer", "direct_mwer", "weak_mwer"))
        after_mwer |= row[0].endswith("rnnt_loss")
        assert ("--inference_asr_model" in call) == after_mwer


def test_every_configuration_is_used_and_there(all_rows, root):
    used = {
        Path(value).name
        for call in all_rows[0]
        for value in call.values()
        if value.startswith("conf/stories/")
    }
    there = {path.name for path in (root / "conf/stories").iterdir()}
    others = ("speech_llm", "copy_llama", "combination")  # of the other experiments
    others = {name for name in there if any(word in name for word in others)}
    assert used == there - {"results.yaml", "tune_tiny.yaml"} - others


def test_a_row_needs_only_its_own_models(recipe):
    found = trainings(run(recipe, *OPTIONS, "--rows", "weak"))
    assert list(found) == [f"{EXP}/offline_s1/asr_ctc", f"{HERE}/asr_ft_weak"]
    weak = found[f"{HERE}/asr_ft_weak"]
    assert weak["--ctc_init"] == f"{EXP}/offline_s1/asr_ctc"
    # 3,000 utterances in batches of 16, 5 epochs, one cosine
    assert weak["--asr_args"].split()[:6] == [
        *["--max_epoch", "5", "--scheduler_conf", "first_cycle_steps=940"],
        *["--scheduler_conf", "warmup_steps=94"],
    ]


def test_training_after_the_swap(all_rows):
    found = trainings(all_rows[0])
    for name in ("swap_mwer", "swap_rnnt_loss", "swap_mwer_n8"):
        call = found[f"{HERE}/asr_{name}"]
        assert call["--asr_config"] == "conf/stories/finetune_mwer.yaml"
        weak = f"{HERE}/asr_ft_weak/valid.loss.ave.pth"
        assert call["--pretrained_model"] == f"{weak}:::decoder.predictor"
        for option in ("lm_scale=0.2", "beta=0.4", "label_bonus=2.5"):
            assert f" --decoder_conf {option} " in call["--asr_args"] + " "
        assert f"predictor_conf.llm={EXP}/lm_stories/llm" in call["--asr_args"]
        assert ("mwer_weight=0" in call["--asr_args"]) == (name == "swap_rnnt_loss")
        assert ("mwer_conf.nbest=8" in call["--asr_args"]) == (name == "swap_mwer_n8")


def test_training_after_direct_training_keeps_the_llm(all_rows):
    call = trainings(all_rows[0])[f"{HERE}/asr_direct_mwer"]
    assert call["--pretrained_model"] == f"{HERE}/asr_ft_llm/valid.loss.ave.pth"
    assert f"predictor_conf.llm={EXP}/lm_stories/llm" in call["--asr_args"]


def test_mwer_without_swap_keeps_the_weak_lm(all_rows):
    call = trainings(all_rows[0])[f"{HERE}/asr_weak_mwer"]
    assert call["--pretrained_model"] == f"{HERE}/asr_ft_weak/valid.loss.ave.pth"
    assert "--decoder_conf predictor=stateless" in call["--asr_args"]
    assert "predictor_conf" not in call["--asr_args"]


def test_the_lstm_lm_is_frozen(all_rows):
    found, tools = all_rows
    lstm, weak = (trainings(found)[f"{HERE}/asr_{name}"] for name in ("ft_lstm", "ft_weak_lstm"))
    assert lstm["--pretrained_model"].startswith(f"{EXP}/lm_lstm/predictor.pth:")
    assert "--freeze_param decoder.predictor" in lstm["--asr_args"]
    assert "--pretrained_model" not in weak and "freeze" not in weak["--asr_args"]
    assert f"lstm_predictor\t--lm_file\t{EXP}/lm_lstm/" in tools


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stories", {"--llm": "DIR/LLM"}),
        ("adapted", {"--llm": "DIR/LLM", "--lm_config": None}),
        ("first", {"--llm": "DIR/LLM", "--oov_init": "first"}),
        ("weighted", {"--oov_init": "length_weighted_mean"}),
        ("random", {"--oov_init": "random"}),
        ("other", {"--llm": SMALL, "--lm_train_text": "data/grammar_full/lm/text"}),
        ("transcripts", {"--llm": SMALL, "--lm_train_text": "dump/full_LLM/raw/train/text"}),
        ("lstm", {"--llm": None, "--lm_config": "conf/stories/train_lstm_lm.yaml"}),
    ],
)
def test_language_models(all_rows, name, expected):
    (call, *_) = [call for call in all_rows[0] if call.get("--lm_tag") == name]
    assert {option: call.get(option) for option in expected} == expected
    if "--lm_config" not in expected:
        assert call["--lm_config"] == "conf/stories/finetune_llm.yaml"


def test_conditions_have_directories_of_their_own(recipe):
    options = ["--rows", "weak", "--encoders", "offline 160", "--seeds", "1 2", "--size", "small"]
    found = trainings(
        run(recipe, "--llm_source", "LLM", *options, "--epochs", "5 10", "--jobs", "2")
    )
    kinds = ("offline", "streaming")
    assert set(found) == {
        f"exp/small_LLM/{kind}_s{seed}/asr_ctc" for kind in kinds for seed in "12"
    } | {
        f"exp/small_LLM/{kind}_e{epochs}_s{seed}/asr_ft_weak"
        for kind in kinds
        for epochs in (5, 10)
        for seed in "12"
    }
    for directory, call in found.items():
        assert f"--seed {directory.split('_s')[-1][0]} " in call["--asr_args"] + " "
        assert ("chunk_size=32" in call["--asr_args"]) == ("/streaming_" in directory)
    assert "--max_epoch 10 " in found["exp/small_LLM/streaming_e10_s2/asr_ft_weak"]["--asr_args"]


def test_one_streaming_model_is_decoded_in_chunks_of_all_sizes(recipe):
    found = run(recipe, *OPTIONS, "--rows", "swap_mwer", "--encoders", "160 640")
    assert {directory.split("/")[-1] for directory in trainings(found)} == {
        *("asr_ctc", "asr_ft_weak", "asr_swap_mwer")
    }
    mwer = trainings(found)[f"{EXP}/streaming_e5_s1/asr_swap_mwer"]["--asr_args"]
    assert "--encoder_conf dynamic_chunk_sizes=[8,16,32,64]" in mwer
    for chunk in (160, 640):
        call = decodings(found)[f"{EXP}/streaming_e5_s1/asr_swap_mwer/decode_{chunk}ms"]
        for option, name in (("--tune_config", "tune"), ("--inference_config", "decode")):
            assert call[option] == f"{EXP}/conf/{name}_swap_mwer_{chunk}.yaml"
            settings = yaml.safe_load((recipe / call[option]).read_text())
            plain = yaml.safe_load((recipe / f"conf/stories/{name}.yaml").read_text())
            assert settings == {**plain, "chunk_ms": chunk}
            # every key is an option of the command that reads it
            parser = {"tune": tune_fusion, "decode": asr_inference}[name].get_parser()
            given = ["--config", str(recipe / call[option]), *REQUIRED]
            args = parse_with_configs(parser, given + ["--text", "x"] * (name == "tune"))
            assert args.chunk_ms == chunk
    # what all chunk sizes share starts with the scales of the middle one
    swap = decodings(found)[f"{EXP}/streaming_e5_s1/asr_ft_weak/decode_swap_stories_320ms"]
    assert swap["--tune_config"].endswith("tune_swap_320.yaml")


def test_streams_are_measured_with_the_scales_of_320_ms(recipe):
    (recipe / "dump/full_LLM/raw/test").mkdir(parents=True)
    for name in ("wav.scp", "text"):
        lines = "".join(f"utt{number} x\n" for number in range(1600))
        (recipe / "dump/full_LLM/raw/test" / name).write_text(lines)
    run(recipe, *OPTIONS, "--rows", "weak", "--encoders", "80", "--stream", "swap swap_mwer")
    tools = (recipe / "tools").read_text().split("\n")
    swap, mwer = (line.split("\t") for line in tools if "bin.streaming_report\t" in line)
    place = f"{EXP}/streaming_e5_s1"
    assert f"{place}/asr_ft_weak/valid.loss.ave.pth" in swap
    assert f"{place}/asr_ft_weak/decode_swap_stories_320ms/tune/best.yaml" in swap
    assert f"llm={EXP}/lm_stories/llm" in swap
    # as wide a beam as that of the table, and the CTC model's alignment
    assert swap[swap.index("--beam_size") + 1] == "8"
    assert f"{EXP}/streaming_s1/asr_ctc/valid.loss.ave.pth" in swap
    assert f"{place}/asr_swap_mwer/valid.mwer_expected_errors.ave.pth" in mwer
    assert f"{place}/asr_swap_mwer/decode_320ms_stream" in mwer and "--predictor" not in mwer
    assert len((recipe / EXP / "stream/test/wav.scp").read_text().splitlines()) == 400


def test_rows_of_the_archive_are_not_done_again(recipe):
    done = f"{HERE}/asr_ft_weak/decode/test"
    (recipe / "results.tar.xz").touch()
    (recipe / done).mkdir(parents=True)
    (recipe / done / "scores.json").write_text("{}")  # as the command of `tools` would
    found = run(recipe, *OPTIONS, "--rows", "weak swap")
    assert [call["--inference_tag"] for call in found if "--inference_tag" in call] == [
        "decode_swap_stories"
    ]
    tools = (recipe / "tools").read_text()
    assert "results_archive\t--archive\tresults.tar.xz\t--restore" in tools
    assert f"results_archive\t--archive\tresults.tar.xz\t--collect\t{EXP}/results.yaml" in tools


def test_two_workers_share_the_rows(recipe):
    """Every row is decoded once, whoever takes it."""
    found = run(recipe, *OPTIONS, "--rows", "weak swap direct rnnt rnnt_fusion", "--jobs", "2")
    tags = [
        (call["--asr_tag"], call["--inference_tag"]) for call in found if "--inference_tag" in call
    ]
    assert sorted(tags) == sorted(
        [
            *[("ft_weak", "decode"), ("ft_weak", "decode_swap_stories"), ("ft_llm", "decode")],
            *[("rnnt", "decode"), ("rnnt", "decode_fusion_stories")],
        ]
    )


def test_sizes(recipe):
    run(recipe, *OPTIONS, "--rows", "ctc")
    sample = (recipe / "tools").read_text()
    assert "--num_train\t3000\t--num_dev\t300\t--num_test\t1600\t--num_lm\t48000" in sample
    assert "--llm\tDIR/LLM" in sample
    for size, count in (("less", 1000), ("small", 3000)):
        data, *_ = run(recipe, "--llm_source", "LLM", "--size", size, "--rows", "ctc")
        # a part of full's sentences, whose test set is the same for less audio
        assert "--text data/text_full_LLM " in data["--local_data_opts"]
        assert f"--num_train {count} " in data["--local_data_opts"]
        assert ("--num_test 1600" in data["--local_data_opts"]) == (size == "less")


def test_the_table_has_what_was_run(recipe):
    """The YAML file that the last stage gives to results_table."""
    run(recipe, *OPTIONS, "--rows", "swap swap_other")
    assert run(
        recipe, *OPTIONS, "--rows", "weak", "--epochs", "10", "--encoders", "320", "--seeds", "2"
    )
    for place in (
        f"{HERE}/asr_ft_weak/decode_swap_other",
        f"{EXP}/streaming_e10_s2/asr_ft_weak/decode_320ms",
    ):
        (recipe / place / "test").mkdir()
        (recipe / place / "test/scores.json").touch()
    result = launch(recipe, *OPTIONS, "--rows", "none", python=recipe.parents[2] / "bin")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((recipe / EXP / "results.yaml").read_text())
    assert config["unfinished"] is True and config["seeds"] == [1, 2]
    entries = {(entry["group"], entry["name"]): entry for entry in config["systems"]}
    titles = [row[5] for row in ROWS]
    assert [name for group, name in entries if group == "offline, 5 epochs"] == titles
    assert [name for group, name in entries if group == "320, 10 epochs"] == titles[: len(MAIN)]
    assert set(config["baseline"]) <= set(titles)
    swap = entries["offline, 5 epochs", "swap"]
    here = f"{EXP}/offline_e5_s{{seed}}"
    assert swap["test"] == f"{here}/asr_ft_weak/decode_swap_stories/test"
    assert swap["perplexity"] == f"{here}/asr_ft_weak/decode_swap_stories/nll/nll.json"
    fusion = entries["offline, 5 epochs", "RNN-T + LLM fusion"]
    assert fusion["perplexity"] == f"{EXP}/lm_stories/perplexity.json"
    assert set(swap["time"]) == {
        f"{EXP}/offline_s{{seed}}/asr_ctc/time.json",
        f"{here}/asr_ft_weak/time.json",
        f"{EXP}/lm_stories/time.json",
    }
    mwer = entries["offline, 5 epochs", "swap + MWER"]
    assert set(mwer["time"]) == {*swap["time"], f"{here}/asr_swap_mwer/time.json"}
    weak = entries["offline, 5 epochs", "FT weak"]
    assert weak["perplexity"] == f"{here}/asr_ft_weak/decode/nll/nll.json"
    assert "perplexity" not in entries["offline, 5 epochs", "RNN-T"]
    assert "--rows swap --encoders offline --epochs 5" in swap["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "weak swpa"], "neither a row nor a set 'swpa'"),
        (["--size", "huge"], "--size is 'huge'; expected full, less, small or tiny"),
        (["--encoders", "offline 100"], "--encoders has '100'; expected some of"),
        (["--rows", "swap_other"], "need --llm_source"),
        (["--row", "weak"], "unknown option --row"),
    ],
)
def test_mistakes_end_in_one_message(recipe, arguments, message):
    assert message in run(recipe, *arguments, status=2)


def test_run_is_short_and_has_help(recipe):
    assert len((recipe / "run.sh").read_text().splitlines()) < 60
    result = launch(recipe, "--help", python=recipe.parents[2] / "bin")
    assert result.returncode == 0
    for word in ("--llm_source", "--rows", "--encoders", "--seeds", "less", "none"):
        assert word in result.stdout


def test_data_stages(tmp_path, root):
    """Up to token lists, with the small LLaMA that stands in for a pretrained one."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra `demo`) is not installed")
    ignore = shutil.ignore_patterns("exp", "dump", "data")
    shutil.copytree(root / "egs2", tmp_path / "egs2", symlinks=True, ignore=ignore)
    shutil.copytree(root / "conf", tmp_path / "conf")
    recipe = tmp_path / "egs2/stories/asr1"
    python = Path(sys.executable).parent
    result = launch(recipe, "--size", "tiny", "--stop_stage", "5", python=python)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {
        name: len((recipe / f"dump/tiny_own/raw/{name}/text").read_text().splitlines())
        for name in ("train", "dev", "test")
    }
    assert counts == {"train": 96, "dev": 8, "test": 8}
    assert (recipe / "data/tiny_own/token_list/bpe_unigram100/tokens.txt").is_file()
    assert len((recipe / "data/tiny_own/lm_train/text").read_text().splitlines()) == 500
