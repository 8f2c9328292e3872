"""egs2/stories --experiment speech_llm: what its rows train and decode, and with which options."""

from pathlib import Path

import pytest
import yaml

from tests.integration.test_stories_recipe import (
    ASR_LLM,
    EXP,
    HERE,
    OPTIONS,
    copy_recipe,
    decodings,
    launch,
    run,
    trainings,
)

pytestmark = pytest.mark.integration

ROWS = [
    [field.strip() for field in line.split("|")]
    for line in (Path(__file__).parents[2] / "egs2/stories/asr1/local/speech_llm_rows.txt").open()
    if not line.startswith("#")
]
SPEECH_LLM = ["--experiment", "speech_llm"]
# also leaves an exported LLM where an LM is trained
STAND_IN = ASR_LLM.replace(
    "[ -n",
    """if [ -n "${lm_tag:-}" ]; then
    mkdir -p "${expdir}/lm_${lm_tag}/llm"
    touch "${expdir}/lm_${lm_tag}/llm/"{config.json,tokens.txt,model.safetensors}
fi
[ -n""",
    1,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, root):
    recipe = copy_recipe(tmp_path_factory.mktemp("speech_llm"), root)
    (recipe.parents[1] / "TEMPLATE/asr1/asr_llm.sh").write_text(STAND_IN)
    return recipe


@pytest.fixture(scope="module")
def all_rows(recipe):
    """(calls of a run of all rows, what else it called)"""
    return run(recipe, *OPTIONS, *SPEECH_LLM, "--rows", "all"), (recipe / "tools").read_text()


def test_every_row_is_a_decoding_of_its_own(all_rows):
    found = decodings(all_rows[0])
    assert len(ROWS) == len({row[0] for row in ROWS}) == len(found)
    for _, _, model, use, weights, _ in ROWS:
        tag = "_".join(["decode", *use.split(), *([weights] if weights != "tuned" else [])])
        place = f"{EXP}/offline_s1" if model == "ctc" else HERE
        call = found[f"{place}/asr_{model}/{tag}"]
        speech_llm = model.startswith("sl_")
        grid = "tune" if weights == "tuned" else f"tune_speech_llm_{weights}"
        assert call["--tune_config"] == f"conf/stories/{grid}.yaml"
        decode = "decode_speech_llm" if speech_llm else "decode"
        assert call["--inference_config"] == f"conf/stories/{decode}.yaml"
        alone = "decode_alone" if weights == "joint" else None
        assert call.get("--alone_tag") == alone
        assert call["--tune_tool"] == ("tune_scales" if speech_llm else "tune_fusion")
        assert call.get("--lm_exp") == (f"{EXP}/lm_{use.split()[-1]}" if use else None)


def test_every_model_is_decoded_alone_and_with_its_ctc():
    for model in {row[2] for row in ROWS if row[2].startswith("sl_")}:
        weights = {row[4] for row in ROWS if row[2] == model and not row[3]}
        assert {"alone", "joint"} <= weights


def test_configurations_are_there(all_rows, root):
    used = {
        value
        for call in all_rows[0]
        for value in call.values()
        if value.startswith("conf/stories/")
    }
    assert all((root / file).is_file() for file in used)
    ours = {
        str(path.relative_to(root))
        for path in (root / "conf/stories").glob("*.yaml")
        if "speech_llm" in path.name or "copy_llama" in path.name
    }
    unused = {f"conf/stories/{name}_speech_llm.yaml" for name in ("results",)}
    assert ours - used == unused | {"conf/stories/tune_speech_llm_tiny.yaml"}


def test_rows_vary_one_option(all_rows):
    """Every training has the options of the first speech LLM but for what its row is about."""
    found = trainings(all_rows[0])

    def words(model):
        return set(found[f"{HERE}/asr_{model}"]["--asr_args"].split()) - {"--decoder_conf"}

    base = words("sl_lora8")
    assert {"adapter_conf.stack=2", f"llm={EXP}/lm_copy/llm"} <= base
    for model, new, gone in (
        ("sl_frozen", {"tuning=frozen"}, set()),
        ("sl_full", {"tuning=full"}, set()),
        ("sl_lora32", {"lora_conf.r=32", "lora_conf.alpha=64"}, set()),
        ("sl_stack1", {"adapter_conf.stack=1"}, {"adapter_conf.stack=2"}),
        ("sl_stack4", {"adapter_conf.stack=4"}, {"adapter_conf.stack=2"}),
        ("sl_merged", {"interface=merged"}, set()),
        ("sl_cross", {"interface=cross_attention"}, set()),
        ("sl_bidirectional", {"interface_conf.mask=bidirectional"}, set()),
        ("sl_mask", {"--model_conf", "text_mask=0.25"}, set()),
        ("sl_two_stage", set(), set()),
        ("sl_adapted", {f"llm={EXP}/lm_copy_adapted/llm"}, {f"llm={EXP}/lm_copy/llm"}),
        ("sl_native", {f"llm={EXP}/lm_copy_own/native"}, {f"llm={EXP}/lm_copy/llm"}),
        ("sl_no_copying", {f"llm={EXP}/lm_stories/llm"}, {f"llm={EXP}/lm_copy/llm"}),
    ):
        assert (words(model) - base, base - words(model)) == (new, gone), model
    two_stage = found[f"{HERE}/asr_sl_two_stage"]["--asr_config"]
    assert two_stage == "conf/stories/train_speech_llm_two_stage.yaml"


def test_native_units_have_tokens_and_statistics_of_their_own(all_rows, recipe):
    found = trainings(all_rows[0])
    native, base = (found[f"{HERE}/asr_sl_{name}"] for name in ("native", "lora8"))
    llm = f"{EXP}/lm_copy_own/native"
    assert (native["--token_type"], native["--llm"]) == ("hugging_face", llm)
    assert native["--asr_stats_dir"] != base["--asr_stats_dir"]
    # another CTC layer than the CTC model's
    ctc = f"{EXP}/offline_s1/asr_ctc"
    assert native["--pretrained_model"] == f"{ctc}/valid.loss.ave.pth:encoder:encoder"
    assert base["--ctc_init"] == ctc and "--token_type" not in base
    assert any(
        call.get("--stage") == "5" and call.get("--token_type") == "hugging_face"
        for call in all_rows[0]
    )
    # an LLM from elsewhere knows nothing of our token lists
    assert {path.name for path in (recipe / llm).iterdir()} == {
        *(".done", "config.json", "model.safetensors")
    }


def test_copying_llms(all_rows):
    calls, tools = all_rows
    lms = {call["--lm_tag"]: call for call in calls if "--lm_tag" in call}
    assert set(lms) == {"copy", "copy_own", "copy_adapted", "stories"}
    assert lms["copy"]["--lm_config"] == "conf/stories/train_copy_llama.yaml"
    assert "--llm" not in lms["copy"] and lms["copy_own"]["--nbpe"] == "400"
    assert lms["copy_adapted"]["--llm"] == f"{EXP}/lm_copy_own/native"
    for name in ("copy", "copy_own", "copy_adapted"):
        assert f"copy_accuracy\t--llm\t{EXP}/lm_{name}/llm" in tools
    assert tools.count("--require\tacc_copy=0.8") >= 3


def test_table(all_rows, recipe):
    result = launch(
        recipe, *OPTIONS, *SPEECH_LLM, "--rows", "none", python=recipe.parents[2] / "bin"
    )
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((recipe / EXP / "results_speech_llm.yaml").read_text())
    entries = {entry["name"]: entry for entry in config["systems"]}
    assert list(entries) == [row[5] for row in ROWS]
    assert set(config["baseline"]) <= set(entries)
    joint = entries["LoRA 8 + CTC"]
    here = f"{EXP}/offline_e5_s{{seed}}/asr_sl_lora8"
    assert joint["test"] == f"{here}/decode_joint/test"
    assert joint["train_log"] == f"{here}/train.log" and "perplexity" not in joint
    assert f"{EXP}/lm_copy/time.json" in joint["time"]
    assert "--experiment speech_llm " in joint["command"]
    assert entries["CTC + LLM fusion"]["perplexity"] == f"{EXP}/lm_copy/perplexity.json"
    tables = (recipe / "tools").read_text()
    assert f"results_speech_llm.yaml\t--output\tRESULTS_speech_llm.md\t--plot\t{EXP}" in tables


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("shuffled_gap=2.71, loss=1.2", "shuffled-audio gap 2.71\n"),
        ("shuffled_gap=1.4, loss=1.2", "shuffled-audio gap 1.4: it hardly uses the audio\n"),
        ("shuffled_gap=1.000e-04, loss=1.2", "gap 1.000e-04: it IGNORES THE AUDIO\n"),
        ("shuffled_gap=nan, loss=1.2", "gap nan (see train.log)\n"),
        ("loss=1.2", "gap 9.9\n"),
    ],
)
def test_gap_is_reported(tmp_path, root, line, message):
    import subprocess

    log = "2epoch results: [train] loss=1, [valid] loss=2, {}, time=1, total_count=1"
    (tmp_path / "train.log").write_text(
        log.format("shuffled_gap=9.9") + "\n" + log.format(line) + "\n"
    )
    shell = f". local/speech_llm.sh; report_gap {tmp_path}"
    found = subprocess.run(
        ["bash", "-euc", f"size=tiny data=d exp=e; {shell}"],
        cwd=root / "egs2/stories/asr1",
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.endswith(message)


def test_mistakes(recipe):
    assert "--experiment is 'swap'; expected" in run(
        recipe, *OPTIONS, "--experiment", "swap", status=2
    )
    message = run(recipe, *OPTIONS, *SPEECH_LLM, "--rows", "weak", status=2)
    assert "neither a row nor a set 'weak'; see local/speech_llm_rows.txt" in message
