"""`--system combination`: models, tuning, decoding and table of all rows, without computing any."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from espnet_llm_plugin.bin import train_ilm, tune_fusion
from espnet_llm_plugin.inference.options import parse_with_configs
from tests.integration.test_stories_recipe import PYTHON

pytestmark = pytest.mark.integration

ASR_LLM = "#!/usr/bin/env bash\nprintf '%s\\t' \"$@\" >> calls\necho >> calls\n"
REQUIRED = ["--output_dir", "x", "--data_path_and_name_and_type", "x,speech,sound"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory, root):
    target = tmp_path_factory.mktemp("combination")
    ignore = shutil.ignore_patterns("exp", "dump", "data", "downloads")
    shutil.copytree(root / "egs2", target / "egs2", symlinks=True, ignore=ignore)
    shutil.copytree(root / "conf", target / "conf", symlinks=True)
    (target / "egs2/TEMPLATE/asr1/asr_llm.sh").write_text(ASR_LLM)
    (target / "bin").mkdir()
    (target / "bin/python3").write_text(PYTHON)
    (target / "bin/python3").chmod(0o755)
    return target


def run(copy, corpus, *arguments, status=0):
    """The recipe's directory; options of each call of asr_llm.sh; words of each call of a tool."""
    recipe = copy / f"egs2/{corpus}/asr1"
    for name in ("calls", "tools"):
        (recipe / name).unlink(missing_ok=True)
    shutil.rmtree(recipe / "exp", ignore_errors=True)
    result = subprocess.run(
        ["./run.sh", "--system", "combination", *map(str, arguments)],
        cwd=recipe,
        env={**os.environ, "PATH": f"{copy}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stdout + result.stderr
    if status:
        return result.stderr
    lines = [line.split("\t") for line in (recipe / "calls").read_text().split("\t\n")[:-1]]
    tools = (recipe / "tools").read_text().split("\t\n") if (recipe / "tools").exists() else []
    return (
        recipe,
        [dict(zip(words[::2], words[1::2])) for words in lines],
        {
            (words[1].rsplit(".", 1)[-1], *words[2:])
            for words in (line.split("\t") for line in tools)
            if words[0] == "-m"
        },
    )


LOQUACIOUS = ["--loquacious", "DIR", "--subset", "medium", "--llm", "org/LLM", "--ngpu", "2"]


@pytest.fixture(scope="module")
def loquacious(copy):
    return run(copy, "loquacious", *LOQUACIOUS)


def by_tag(calls):
    return {call["--inference_tag"]: call for call in calls if "--inference_tag" in call}


def test_models(loquacious, root):
    """CTC, the LLM in both vocabularies, CTC + AED; over 10,000 pieces."""
    _, (data, ctc, pieces, native, aed, *_), _ = loquacious
    assert all(call["--nbpe"] == "10000" for call in (data, ctc, pieces, native, aed))
    assert ctc["--asr_config"] == "conf/loquacious/train_ctc.yaml" and ctc["--skip_eval"] == "true"
    for lm in (pieces, native):
        assert lm["--llm"] == "org/LLM" and lm["--use_lm"] == "true"
        assert lm["--lm_config"] == "conf/lm/finetune_causal_llm.yaml"
    assert "--lm_token_type" not in pieces and native["--lm_token_type"] == "hugging_face"
    assert aed["--asr_config"] == "conf/loquacious/train_aed.yaml"
    assert aed["--skip_eval"] == "true" and "--skip_train" not in aed


def test_ctc_rows_are_tuned_and_decoded(loquacious):
    recipe, calls, tools = loquacious
    prior = "exp/asr_train_ctc/prior.json"
    native = {"fusion_llm": "exp/lm_LLM_native/llm"}
    expected = {
        "ctc": {},
        "rescore": {**native, "fusion": "rescore"},
        "rescore_prior": {**native, "fusion": "rescore", "prior_file": prior},
        "delayed": {**native, "fusion": "delayed", "fusion_interval": 10},
        "delayed_prior": {
            **{**native, "fusion": "delayed", "fusion_interval": 10, "prior_file": prior}
        },
        "delayed_ngram": {
            **{**native, "fusion": "delayed", "fusion_interval": 10},
            "fusion_ngram": "exp/lm_LLM/ngram4.npz",
        },
        "label": {},
        "label_prior": {"prior_file": prior},
    }
    decodings = by_tag(calls)
    grid = yaml.safe_load((recipe / "conf/librispeech/tune_combination.yaml").read_text())
    for name, added in expected.items():
        call = decodings[f"combine_{name}"]
        config = recipe / call["--tune_config"]
        assert yaml.safe_load(config.read_text()) == {**grid, **added}
        assert call["--tune_tool"] == "tune_fusion" and call["--skip_train"] == "true"
        assert (call.get("--lm_exp") == "exp/lm_LLM") == name.startswith("label")
        required = [*REQUIRED, "--asr_train_config", "x", "--text", "x", "--config", str(config)]
        assert parse_with_configs(tune_fusion.get_parser(), required).beam_size == 16
    (estimate,) = [words for words in tools if words[0] == "estimate_ngram"]
    assert "dump/raw/train_medium/text" in estimate and "exp/lm_LLM/ngram4.npz" in estimate
    estimates = [words for words in tools if words[0] == "estimate_prior"]
    assert len(estimates) == 1 and prior in estimates[0] and estimates[0][-2:] == ("--ngpu", "1")
    assert "dump/raw/train_medium/wav.scp,speech,sound" in estimates[0]


def test_joint_sums(loquacious):
    """Tuned on dev, from n-best lists of ESPnet's search; decoded with what was found."""
    recipe, calls, tools = loquacious
    decodings = by_tag(calls)
    base = yaml.safe_load((recipe / "conf/librispeech/tune_aed.yaml").read_text())
    mini_lstm = "exp/asr_train_aed/mini_lstm.pth"
    expected = {
        "aed": {},
        "aed_llm": {"fusion_llm": "exp/lm_LLM_native/llm"},
        "aed_llm_ngram": {
            "fusion_llm": "exp/lm_LLM_native/llm",
            "fusion_ngram": "exp/lm_LLM/ngram4.npz",
        },
        "aed_pieces": {},
        "aed_pieces_ilm": {"ilm": "zero_context"},
        "aed_pieces_mini_lstm": {"ilm": "mini_lstm", "ilm_file": mini_lstm},
    }
    for name, added in expected.items():
        call = decodings[f"combine_{name}"]
        config = recipe / call["--tune_config"]
        assert yaml.safe_load(config.read_text()) == {**base, **added}
        parse_with_configs(
            tune_fusion.get_parser(), [*REQUIRED, "--text", "x", "--config", str(config)]
        )
        assert call["--tune_tool"] == "tune_fusion" and call["--inference_config"] == ""
        assert (call.get("--lm_exp") == "exp/lm_LLM") == name.startswith("aed_pieces")
        assert call["--asr_config"] == "conf/loquacious/train_aed.yaml"
        assert call["--inference_asr_model"] == "valid.acc.ave.pth"
    (trained,) = [words for words in tools if words[0] == "train_ilm"]
    options = dict(zip(trained[1::2], trained[2::2]))
    assert options["--output"] == mini_lstm and options["--ngpu"] == "1"
    assert options["--text"] == "dump/raw/train_medium/text"
    assert options["--valid_text"] == "dump/raw/dev/text"
    assert options["--asr_model_file"] == "exp/asr_train_aed/valid.acc.ave.pth"
    train_ilm.get_parser().parse_args([word for pair in options.items() for word in pair])


def test_one_table_of_all(loquacious, root):
    recipe, calls, tools = loquacious
    table = yaml.safe_load((recipe / "exp/results_combination.yaml").read_text())
    lines = (root / "egs2/TEMPLATE/asr1/combination_rows.txt").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line[0] != "#"]
    systems = {system["name"]: system for system in table["systems"]}
    assert list(systems) == [row[-1] for row in rows]
    assert set(table["baseline"]) <= set(systems)
    directories = {
        f"exp/asr_{call['--asr_tag']}/{call['--inference_tag']}"
        for call in calls
        if "--inference_tag" in call and call.get("--skip_eval") != "true"
    }
    assert {str(Path(system["test"]["test"]).parent) for system in systems.values()} == directories
    assert list(table["systems"][0]["test"]) == ["dev", "test"]
    (written,) = [words for words in tools if words[0] == "results_table"]
    assert "exp/RESULTS_combination.md" in written


def test_some_rows_without_attention_decoder(copy):
    arguments = [*LOQUACIOUS, "--aed_config", "none", "--lm_config", "none"]
    arguments += ["--combinations", "ctc delayed delayed_ngram aed", "--lm_text", "more"]
    recipe, calls, tools = run(copy, "loquacious", *arguments)
    assert list(by_tag(calls)) == [
        *("decode", "combine_ctc", "combine_delayed", "combine_delayed_ngram")
    ]
    estimate, table = sorted(tools)
    assert estimate[0] == "estimate_ngram" and table[0] == "results_table"
    assert estimate[estimate.index("--text") + 1] == "data/lm_train/text"
    settings = yaml.safe_load((recipe / by_tag(calls)["combine_delayed"]["--tune_config"]).open())
    assert settings["fusion_llm"] == "org/LLM"  # as it came
    assert not any("--lm_token_type" in call for call in calls)
    table = yaml.safe_load((recipe / "exp/results_combination.yaml").read_text())
    assert not any("AED" in system["name"] for system in table["systems"])


def test_stages_that_are_not_asked_for(copy):
    _, _, tools = run(copy, "loquacious", *LOQUACIOUS, "--stop_stage", "11")
    assert tools == set()
    _, _, tools = run(copy, "loquacious", *LOQUACIOUS, "--stop_stage", "12")
    assert {words[0] for words in tools} == {"estimate_prior", "estimate_ngram", "train_ilm"}


@pytest.mark.parametrize("corpus", ["librispeech", "loquacious"])
def test_mini(copy, corpus):
    recipe, calls, _ = run(copy, corpus, "--mini", "true")
    configs = [value for call in calls for value in call.values() if value.startswith("conf/")]
    assert all((recipe / value).is_file() for value in configs)
    assert f"conf/{corpus}/mini/train_aed.yaml" in configs
    assert len(by_tag(calls)) == 15  # 14 rows, and the training of the CTC model
    table = yaml.safe_load((recipe / "exp/mini/results_combination.yaml").read_text())
    assert table["cpu_time"] is True


def test_speech_llms_are_in_the_table(copy):
    directory = copy / "egs2/loquacious/asr1/other/asr_sl_LLM"
    for how in ("alone", "joint"):
        (directory / f"decode_{how}/dev").mkdir(parents=True)
        (directory / f"decode_{how}/dev/scores.json").write_text("{}")
    (directory / "config.yaml").write_text("model: speech_llm\n")
    (directory / "decode_joint/tune").mkdir()
    (directory / "decode_joint/tune/scales.json").write_text("{}")
    recipe, _, _ = run(copy, "loquacious", *LOQUACIOUS, "--expdir", "other")
    table = yaml.safe_load((recipe / "other/results_combination.yaml").read_text())
    names = [system["name"] for system in table["systems"]]
    assert names[-2:] == ["speech LLM sl_LLM, alone", "speech LLM sl_LLM, jointly with CTC"]
    alone, joint = table["systems"][-2:]
    assert "scales" not in alone
    assert joint["scales"] == "other/asr_sl_LLM/decode_joint/tune/scales.json"


@pytest.mark.parametrize(
    ("corpus", "arguments", "message"),
    [
        ("loquacious", ["--loquacious", "DIR"], "--system combination needs --llm"),
        (
            "loquacious",
            [*LOQUACIOUS, "--combinations", "ctc x"],
            "--combinations has 'x'; expected",
        ),
        ("mls", ["--mls", "DIR"], "has no configurations for mls"),
    ],
)
def test_mistakes(copy, corpus, arguments, message):
    assert message in run(copy, corpus, *arguments, status=2)
