"""egs2/stories --experiment combination: what its rows decode with."""

import pytest
import yaml

from espnet_llm_plugin.bin import tune_fusion
from espnet_llm_plugin.inference.options import parse_with_configs
from tests.integration.test_stories_recipe import EXP, OPTIONS, copy_recipe, decodings, launch, run

pytestmark = pytest.mark.integration

COMBINATION = [*OPTIONS, "--experiment", "combination", "--rows", "all"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, root):
    return copy_recipe(tmp_path_factory.mktemp("combination"), root)


@pytest.fixture(scope="module")
def calls(recipe):
    return run(recipe, *COMBINATION)


def rows(root):
    lines = (root / "egs2/stories/asr1/local/combination_rows.txt").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")] for line in lines if line[0] != "#"]
    return {row[0]: row for row in table}


@pytest.fixture
def settings(calls, recipe, root):
    """Row -> (options of asr_llm.sh, its configuration of tuning, that of decoding)."""
    found = decodings(calls)

    def read(name):
        _, _, model, use, how, _ = rows(root)[name]
        tag = "_".join(["decode", *use.split(), *how.replace("=", "").split()])
        place = "offline_s1" if model == "ctc" else "offline_e5_s1"
        tag = tag.replace("_tuned", "_combination")  # the other experiment has a grid of its own
        call = found[f"{EXP}/{place}/asr_{model}/{tag}"]
        files = (recipe / call[key] for key in ("--tune_config", "--inference_config"))
        return (call, *(yaml.safe_load(file.read_text()) for file in files))

    return read


def test_every_row_is_a_decoding_of_its_own(calls, root):
    assert len(decodings(calls)) == len(rows(root)) == 34
    for call in decodings(calls).values():
        assert call["--tune_tool"] == "tune_fusion"


def test_ways_to_combine(settings):
    plain = settings("label")[1:]
    for name, added in {
        "rescore": {"fusion_llm": f"{EXP}/lm_native/llm", "fusion": "rescore"},
        "raw_delayed10": {
            **{"fusion_llm": "DIR/LLM", "lm_eos": "none"},
            **{"fusion": "delayed", "fusion_interval": 10},
        },
        "shortest": {
            **{"fusion_llm": f"{EXP}/lm_native/llm"},
            **{"fusion": "delayed", "fusion_policy": "shortest"},
        },
        "label_prior": {"prior_file": f"{EXP}/offline_s1/asr_ctc/prior.json"},
        "label_b64": {"beam_size": 64},
        "ngram": {"fusion_ngram": f"{EXP}/lm_stories/ngram4.npz"},
        "delayed10_ngram_b8": {
            **{"fusion_llm": f"{EXP}/lm_native/llm", "fusion": "delayed", "fusion_interval": 10},
            **{"fusion_ngram": f"{EXP}/lm_stories/ngram4.npz", "beam_size": 8},
        },
    }.items():
        for before, after in zip(plain, settings(name)[1:]):
            assert after == {**before, **added}


def test_rows_of_the_other_experiments_are_beside_them(tmp_path, root):
    recipe = copy_recipe(tmp_path, root)
    scored = recipe / EXP / "offline_e5_s1/asr_swap_mwer/decode/test/scores.json"
    scored.parent.mkdir(parents=True)
    scored.touch()
    place = recipe / EXP / "offline_e5_s1/.combination"
    place.touch()
    result = launch(recipe, *COMBINATION[:-1], "none", python=recipe.parents[2] / "bin")
    assert result.returncode == 0, result.stderr
    systems = yaml.safe_load((recipe / EXP / "results_combination.yaml").read_text())["systems"]
    assert systems[-1]["name"] == "swap + MWER" and len(systems) == len(rows(root)) + 1
    assert systems[-1]["test"] == f"{EXP}/offline_e5_s1/asr_swap_mwer/decode/test".replace(
        "_s1", "_s{seed}"
    )
    assert "--experiment" not in systems[-1]["command"]


def test_language_models(settings, calls):
    assert settings("label")[0]["--lm_exp"] == f"{EXP}/lm_stories"
    assert settings("label_adapted")[0]["--lm_exp"] == f"{EXP}/lm_adapted"
    assert "--lm_exp" not in settings("delayed5")[0]
    native, *_ = [call for call in calls if call.get("--lm_tag") == "native"]
    assert native["--llm"] == "DIR/LLM" and native["--lm_token_type"] == "hugging_face"
    assert native["--lm_config"] == "conf/stories/finetune_llm.yaml"


def test_commands_know_the_settings(settings, recipe, root, monkeypatch):
    """Every key is an option of the command that tunes."""
    monkeypatch.chdir(recipe)
    required = ["--asr_train_config", "x", "--asr_model_file", "x", "--text", "x"]
    required += ["--output_dir", "x", "--data_path_and_name_and_type", "x,speech,sound"]
    for name in rows(root):
        config = settings(name)[0]["--tune_config"]
        args = parse_with_configs(tune_fusion.get_parser(), ["--config", config, *required])
        assert args.lm_weights[:2] == [0.0, 0.1]


def test_ngram_is_of_the_llms_text(recipe):
    tools = (recipe / "tools").read_text()
    directory = f"{EXP}/offline_s1/asr_ctc"
    estimate = f"estimate_ngram\t--asr_train_config\t{directory}/config.yaml\t--text"
    estimate += f"\t{EXP}/lm_stats_stories/lm_train.txt\t--output\t{EXP}/lm_stories/ngram4.npz"
    assert estimate in tools


def test_prior_is_estimated_once(recipe):
    tools = (recipe / "tools").read_text()
    directory = f"{EXP}/offline_s1/asr_ctc"
    estimate = f"estimate_prior\t--asr_train_config\t{directory}/config.yaml"
    assert estimate in tools and f"--output\t{directory}/prior.json" in tools
