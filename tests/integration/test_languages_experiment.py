"""experiment.sh of Indic and MLS: what its rows train and decode, and a run of one of them."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration import test_stories_recipe
from tests.integration.test_stories_recipe import copy_recipe, decodings, trainings

pytestmark = pytest.mark.integration

ROWS = [
    [field.strip() for field in line.split("|")]
    for line in (Path(__file__).parents[2] / "egs2/TEMPLATE/asr1/languages_rows.txt").open()
    if not line.startswith("#")
]
LANGUAGES = {
    "indic": ["hi", "bn", "ta", "te", "ml", "kn", "gu", "mr", "pa", "ur"],
    "mls": ["en", "de", "nl", "fr", "es", "it", "pt", "pl"],
}
LESS = {"indic": ["bn", "te", "kn"], "mls": ["de", "fr", "it"]}
CTC_LOSS = {"ctc_weight": 0.3, "groups.ctc.lr_factor": 0.2}
EXP = "exp/experiment_full"
HERE = f"{EXP}/e8_s1"


launch = functools.partial(test_stories_recipe.launch, script="experiment.sh")
run = functools.partial(test_stories_recipe.run, script="experiment.sh")


@pytest.fixture(scope="module", params=["indic", "mls"])
def corpus(request):
    return request.param


@pytest.fixture(scope="module")
def titles(corpus):
    return [row[4].replace("LESS", ", ".join(LESS[corpus])) for row in ROWS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, root, corpus):
    """A copy in which nothing is trained, with transcripts to count."""
    recipe = copy_recipe(tmp_path_factory.mktemp("experiment"), root).parents[1] / f"{corpus}/asr1"
    for name, count in (("train", 1600), ("train_low", 1060)):
        directory = recipe / "dump/experiment_full/raw" / name
        directory.mkdir(parents=True)
        (directory / "text").write_text("x\n" * count)
    kept = recipe / "dump/experiment_full/raw/train"
    fewer, _, few = LESS[corpus]
    languages = [(fewer, 25), ("hi", 7), (few, 5)]
    (kept / "utt2lang").write_text(
        "".join(f"{lang}_{n} {lang}\n" for lang, count in languages for n in range(count))
    )
    return recipe


@pytest.fixture(scope="module")
def calls(recipe):
    return run(recipe, "--rows", "all")


def test_every_row_is_a_decoding_of_its_own(calls, corpus):
    found = decodings(calls)
    assert len(ROWS) == len({row[0] for row in ROWS}) == len({row[4] for row in ROWS})
    assert len(found) == len(ROWS)
    for _, _, model, decoding, _ in ROWS:
        tag = "decode" if decoding == "utt2lang" else f"decode_{decoding}"
        place = f"{EXP}/s1" if model == "ctc" else HERE
        call = found[f"{place}/asr_{model}/{tag}"]
        tuned = decoding in ("joint", "fusion")
        assert call["--inference_lang"] == ("utt2lang" if tuned else decoding)
        grid = f"conf/{corpus}/experiment/tune_{decoding}.yaml" if tuned else None
        assert call.get("--tune_config") == grid
        assert call.get("--lm_exp") == (f"{EXP}/lm_copy" if decoding == "fusion" else None)
        # asr_llm.sh gives the languages to models whose options say that they have prompts of them
        prompts = "soft_prompt=per_language" in call.get("--asr_args", "")
        assert prompts == ("lang" in model)
        decode = "decode_ctc" if model == "ctc" else "decode"
        decode += "_joint" if decoding == "joint" else ""
        assert call["--inference_config"] == f"conf/{corpus}/experiment/{decode}.yaml"


def test_configurations_are_used_and_there(calls, root, corpus):
    place = f"conf/{corpus}/experiment/"
    used = {v for call in calls for v in call.values() if v.startswith(place)}
    there = {str(p.relative_to(root)) for p in (root / place).iterdir()}
    unused = {f"{place}{name}.yaml" for name in ("results", "tune_joint_tiny", "tune_fusion_tiny")}
    assert there - used == unused and used <= there


def test_rows_vary_one_option(calls, corpus):
    """Every training has the options of the baseline but for what its row is about."""
    found = trainings(calls)

    def options(model):
        words = found[f"{HERE}/asr_{model}"]["--asr_args"].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def auxiliary(loss, tap):
        more = {"predictor_dim": 128, "joint_dim": 256} if loss == "rnnt" else {}
        return [{"loss": loss, "tap": tap, "name": "aux", **more}]

    base = options("frozen")
    assert base["llm"] == f"{EXP}/lm_copy/llm" and base["tuning"] == "frozen"
    assert base["first_cycle_steps"] == "800" and base["warmup_steps"] == "80"
    languages = {
        "soft_prompt": "per_language",
        "soft_prompt_conf.languages": LANGUAGES[corpus],
    }
    rnnt = {"auxiliary": auxiliary("rnnt", "llm_prefix")}
    for model, new in (
        ("frozen_rnnt", rnnt),
        ("frozen_lang", languages),
        ("frozen_rnnt_lang", {**rnnt, **languages}),
        ("frozen_rnnt_w0.1", {"auxiliary": [{**rnnt["auxiliary"][0], "weight": 0.1}]}),
        ("frozen_ctc-encoder", {"auxiliary": auxiliary("ctc", "encoder")}),
        ("frozen_rnnt-adapter", {"auxiliary": auxiliary("rnnt", "adapter")}),
        ("lora", {"tuning": "lora"}),
        ("full_rnnt", {"tuning": "full", **rnnt}),
        ("frozen_small", {"llm": f"{EXP}/lm_copy_small/llm"}),
        ("frozen_rnnt_lang_predict", {**rnnt, **languages, "language_prediction": True}),
        (
            "frozen_lang_drop",
            {**languages, "soft_prompt_conf.language_dropout": 0.3},
        ),
        ("frozen_low", {"first_cycle_steps": 536, "warmup_steps": 53}),
        ("frozen_start_ownctc", CTC_LOSS),
        ("lora_start_ownctc", {"tuning": "lora", **CTC_LOSS}),
    ):
        changed = {key: value for key, value in options(model).items() if base.get(key) != value}
        assert {key: yaml.safe_load(value) for key, value in changed.items()} == new, model


@pytest.mark.parametrize(
    ("word", "new"),
    [
        ("stack1", {"adapter_conf.stack": 1}),
        ("stack4", {"adapter_conf.stack": 4}),
        ("bidirectional", {"interface_conf.mask": "bidirectional"}),
        ("merged", {"interface": "merged"}),
        ("cross", {"interface": "cross_attention"}),
        ("masked", {"text_mask": 0.25}),
        (
            "stages",
            {
                "groups": {
                    "encoder": {"lr_factor": 0.2},
                    "ctc": {"lr_factor": 0.2},
                    "decoder.llm": {"freeze_updates": 200},
                }
            },
        ),
    ],
)
def test_axes_vary_one_option(calls, word, new):
    found = trainings(calls)

    def options(model):
        words = found[f"{HERE}/asr_{model}"]["--asr_args"].split()
        return {k: yaml.safe_load(v) for k, v in (w.split("=", 1) for w in words if "=" in w)}

    base, varied = options("lora_start_ownctc"), options(f"lora_start_ownctc_{word}")
    assert varied == {**base, **new}


def test_a_part_of_some_languages(calls, recipe, corpus):
    found = trainings(calls)
    for directory, call in found.items():
        low = directory.endswith("_low")
        assert call["--train_set"] == ("train_low" if low else "train")
        assert call["--asr_stats_dir"] == f"{EXP}/asr_stats_{call['--train_set']}"
        if "ctc_" not in directory and not directory.endswith("asr_ctc"):
            ctc = f"{EXP}/s1/asr_ctc{'_low' if low else ''}/valid.loss.ave.pth"
            head = f"{ctc}:ctc:ctc " if "_start" in directory else ""
            assert call["--pretrained_model"] == f"{head}{ctc}:encoder:encoder"
    kept = (recipe / "dump/experiment_full/raw/train/utt2lang_low").read_text().split()[::2]
    fewer, _, few = LESS[corpus]
    assert kept == [f"{fewer}_{n}" for n in (0, 10, 20)] + [f"hi_{n}" for n in range(7)] + [
        f"{few}_0"
    ]


def test_the_corpus_is_made_of_its_languages(calls, corpus):
    made = next(call for call in calls if "--local_data_opts" in call)["--local_data_opts"]
    layout = {"indic": "fleurs", "mls": "mls"}[corpus]
    assert f"--{layout} data/experiment_full/corpus" in made
    assert made.split("--langs ")[1].split() == LANGUAGES[corpus]


def test_the_table_has_every_row_that_was_run(recipe, calls, titles):
    for row in ROWS:  # as if
        place = f"{EXP}/s1" if row[2] == "ctc" else HERE
        tag = "decode" if row[3] == "utt2lang" else f"decode_{row[3]}"
        scores = recipe / place / f"asr_{row[2]}" / tag / "test/scores.json"
        scores.parent.mkdir(parents=True, exist_ok=True)
        if row[0] != "axis_cross":
            scores.touch()
    assert launch(recipe, "--rows", "none", python=recipe.parents[2] / "bin").returncode == 0
    config = yaml.safe_load((recipe / EXP / "results.yaml").read_text())
    titles = [title for title in titles if title != "cross attention"]
    assert [entry["name"] for entry in config["systems"]] == titles
    assert set(config["baseline"]) <= set(titles)
    assert config["seeds"] == [1] and config["unfinished"] is True
    low = next(entry for entry in config["systems"] if "tenth" in entry["name"])
    assert low["test"] == f"{EXP}/e8_s{{seed}}/asr_frozen_low/decode/test"
    assert set(low["time"]) == {
        f"{EXP}/{name}/time.json"
        for name in ("e8_s{seed}/asr_frozen_low", "s{seed}/asr_ctc_low", "lm_copy")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "frozen frosen"], "neither a row nor a set 'frosen'"),
        (["--size", "huge"], "--size is 'huge'; expected full or tiny"),
        (["--row", "frozen"], "unknown option --row"),
    ],
)
def test_mistakes_end_in_one_message(recipe, arguments, message):
    assert message in run(recipe, *arguments, status=2)


def test_a_row_from_data_to_table(tmp_path, root):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra `demo`) is not installed")
    pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")
    ignore = shutil.ignore_patterns("exp", "dump", "data")
    shutil.copytree(root / "egs2", tmp_path / "egs2", symlinks=True, ignore=ignore)
    shutil.copytree(root / "conf", tmp_path / "conf")
    recipe = tmp_path / "egs2/indic/asr1"
    arguments = ["--size", "tiny", "--rows", "frozen_rnnt_lang_unk", "--jobs", "2"]
    python = Path(sys.executable).parent
    result = launch(recipe, *arguments, python=python)
    assert result.returncode == 0, result.stdout + result.stderr
    page = (recipe / "exp/experiment_tiny/RESULTS_experiment.md").read_text()
    name = "frozen + RNN-T + languages, unknown"
    assert re.search(rf"^\|{re.escape(name)}\|[\d.]+\|", page, re.MULTILINE)
    assert "|frozen + RNN-T|not run|" in page
    assert "|system|ce_per_token|acc|shuffled_gap|wer_llm|aux_per_label|wer_aux|" in page
    decoded = recipe / "exp/experiment_tiny/e1_s1/asr_frozen_rnnt_lang/decode_unk/test"
    assert json.loads((decoded / "scores.json").read_text())["wer"]["sentences"] == 20
    assert set((decoded / "lang").read_text().split()[1::2]) == {"unk"}
    # only the table again, from the archive alone
    (recipe / "results.tar.xz").unlink(missing_ok=True)
    again = launch(recipe, "--size", "tiny", "--rows", "none", python=python)
    assert again.returncode == 0, again.stderr
