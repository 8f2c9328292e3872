"""Tables over seeds, groups of systems, and systems that are not finished."""

import json
import shutil

import numpy as np
import pytest

from espnet_llm_plugin.bin.results_table import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import results_page
from espnet_llm_plugin.scoring.bootstrap import error_rate_interval, paired_difference
from espnet_llm_plugin.scoring.results import load_results
from espnet_llm_plugin.scoring.table import markdown
from espnet_llm_plugin.scoring.training_log import last_statistics
from tests.scoring.test_results import score_set

CONFIG = """
seeds: [1, 2, 3]
unfinished: true
baseline: [weak, direct]
systems:
  - name: weak
    group: 5 epochs
    command: ./run.sh --rows weak
    test: exp/e5_s{seed}/weak/test
    scales: exp/e5_s{seed}/scales.json
    perplexity: exp/e5_s{seed}/nll.json
    time: ["exp/e5_s{seed}/time.json", exp/lm.json]
  - name: direct
    group: 5 epochs
    test: exp/e5_s{seed}/direct/test
    perplexity: exp/lm.json
    time: exp/e5_s{seed}/none.json
  - name: swap
    group: 5 epochs
    test: exp/e5_s{seed}/swap/test
    time: exp/e5_s{seed}/time.json
  - name: weak
    group: 10 epochs
    test: exp/e10_s{seed}/weak/test
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    exp = tmp_path_factory.mktemp("scored") / "exp"
    for seed, wrong in ((1, 20), (2, 17), (3, 23)):
        score_set(exp / f"e5_s{seed}" / "weak" / "test", wrong)
    score_set(exp / "e5_s1" / "direct" / "test", 12)
    score_set(exp / "e5_s3" / "direct" / "test", 14)
    score_set(exp / "e10_s2" / "weak" / "test", 6)
    for seed, beta in ((1, 0.4), (2, 0.6), (3, 0.4)):
        place = exp / f"e5_s{seed}"
        (place / "scales.json").write_text(json.dumps({"best": {"beta": beta}}))
        (place / "nll.json").write_text(json.dumps({"internal_lm": {"word_perplexity": 10 * seed}}))
        (place / "time.json").write_text(json.dumps({"seconds": 60 * seed}))
    (exp / "lm.json").write_text(json.dumps({"seconds": 60, "word_perplexity": 19.04}))
    return exp


@pytest.fixture
def recipe(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scored, tmp_path / "exp")
    (tmp_path / "results.yaml").write_text(CONFIG)
    return tmp_path


def rows_of(results, group):
    header, rows = results_page.comparison(results, group)
    return [dict(zip(header, row)) for row in rows]


def test_means_and_deviations(recipe):
    weak, direct, swap = rows_of(load_results("results.yaml"), "5 epochs")
    rates = [100 * wrong / 180 for wrong in (20, 17, 23)]
    assert weak["test WER"] == f"{np.mean(rates):.2f}"
    assert weak["sd over seeds"] == f"{np.std(rates, ddof=1):.2f}"
    assert weak["ins / del / sub"] == f"0.00 / 0.00 / {np.mean(rates):.2f}"
    assert (weak["seeds"], direct["seeds"], swap["seeds"]) == ("3", "2", "-")
    assert weak["scales"] == "beta 0.4; beta 0.6"
    assert (weak["LM word PPL"], direct["LM word PPL"]) == ("20.0", "19.0")
    assert (weak["training"], direct["training"]) == ("3.0 min", "-")
    assert (swap["test WER"], swap["95 %"]) == ("not run", "-")


def test_interval_is_that_of_the_mean_over_seeds(recipe):
    weak = load_results("results.yaml").systems[0].tests["test"]
    errors = sum((np.arange(30) < wrong).astype(int) for wrong in (20, 17, 23))
    low, high = error_rate_interval(errors, np.full(30, 18))
    assert (weak.rates["wer"].low, weak.rates["wer"].high) == (low, high)


def test_paired_comparison_over_the_common_seeds(recipe):
    results = load_results("results.yaml")
    ((system, pair),) = results.comparisons("test", "weak", "5 epochs", resamples=300, seed=1)
    first = sum((np.arange(30) < wrong).astype(int) for wrong in (20, 23))
    second = sum((np.arange(30) < wrong).astype(int) for wrong in (12, 14))
    expected = paired_difference(first, second, np.full(30, 12), resamples=300, seed=1)
    assert system.name == "direct" and pair == expected
    assert results.comparisons("test", "weak", "10 epochs", 10, 0) == []
    assert results.comparisons("test", "direct", "10 epochs", 10, 0) == []


def test_page(recipe, capsys):
    main(["--config", "results.yaml", "--output", "RESULTS.md", "--plot", "wer.png"])
    page = (recipe / "RESULTS.md").read_text()
    assert page.index("### 5 epochs") < page.index("Paired comparison with weak on test")
    assert page.index("Paired comparison with direct on test") < page.index("### 10 epochs")
    assert page.count("Paired comparison") == 2
    assert "|5 epochs|weak|`./run.sh --rows weak`|" in page
    assert "|swap|not run|" in page
    # ESPnet's blocks have the numbers of each seed
    for seed, percent in ((1, "11.1"), (2, "9.4"), (3, "12.8")):
        block = page[page.index(f"## exp/e5_s{seed}") :]
        assert block.index(f"|weak/test|30|180|{100 - float(percent):.1f}|{percent}|") < 200
    assert (recipe / "wer.png").read_bytes().startswith(b"\x89PNG")
    assert "not run" in capsys.readouterr().out


def test_seeds_and_single_runs_are_not_paired(recipe):
    config = CONFIG.replace("exp/e5_s{seed}/direct/test", "exp/e5_s1/direct/test")
    (recipe / "results.yaml").write_text(config)
    results = load_results("results.yaml")
    assert rows_of(results, "5 epochs")[1]["seeds"] == "-"
    assert results.comparisons("test", "weak", "5 epochs", 10, 0) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("unfinished: true", ""), "scores.json: no such file; score exp/e5_s2/direct"),
        (("seeds: [1, 2, 3]", ""), "there is {seed} in it, but `seeds` is missing"),
        (("seeds: [1, 2, 3]", "seeds: 3"), "seeds must be a list of integers, not 3"),
        (("seeds: [1, 2, 3]", "seeds: [7]"), "not one of its systems has been scored yet"),
        (("group: 10 epochs", "group: 5 epochs"), "names that differ"),
        (("perplexity: exp/lm.json", "perplexity: exp/e5_s1/time.json"), "no word_perplexity"),
    ],
)
def test_bad_configurations(recipe, change, message):
    (recipe / "results.yaml").write_text(CONFIG.replace(*change))
    with pytest.raises(UserError, match=message):
        load_results("results.yaml")


def test_weights_and_audio_gap_of_a_speech_llm(recipe):
    """The gap is that of the last epoch, a mean over the seeds that were trained."""
    epochs = "{n}epoch results: [train] loss=1, [valid] {gap}loss=1, time=1, [att_plot] time=2\n"
    for seed, gap in ((1, 2.5), (3, 1.5)):
        log = epochs.format(n=1, gap="shuffled_gap=0.1, ")
        log += epochs.format(n=2, gap=f"acc=0.5, shuffled_gap={gap}, ")
        (recipe / f"exp/e5_s{seed}/train.log").write_text(log)
        weights = {"ctc_weight": 0.5, "textlm_weight": 0.25, "lm_weight": 0.1, "penalty": 1.5}
        weights["length_norm"] = 0.0
        (recipe / f"exp/e5_s{seed}/scales.json").write_text(json.dumps({"best": weights}))
    (recipe / "exp/e5_s2/scales.json").unlink()
    config = CONFIG.replace("perplexity: exp/e5_s{", "train_log: exp/e5_s{").replace(
        "{seed}/nll.json", "{seed}/train.log"
    )
    (recipe / "results.yaml").write_text(config)
    row = rows_of(load_results("results.yaml"), "5 epochs")[0]
    assert row["audio gap"] == "2.00"
    assert row["scales"] == "CTC 0.5, LLM without audio 0.25, bonus 1.5, LM 0.1, length norm 0"
    # Other statistics by name: means over the logs that have them.
    (recipe / "results.yaml").write_text("training: [acc, shuffled_gap, no_such]\n" + config)
    page = results_page.summarize(load_results("results.yaml"), 10, 0).text(markdown)
    assert "last epoch of training\n\n|system|acc|shuffled_gap|\n" in page
    assert page.count("|0.500|2.000|\n") == 1
    (recipe / "results.yaml").write_text("training: acc\n" + config)
    with pytest.raises(UserError, match="training must be a list of names"):
        load_results("results.yaml")
    (recipe / "results.yaml").write_text(config)
    (recipe / "exp/e5_s1/train.log").write_text(epochs.format(n=1, gap=""))
    with pytest.raises(UserError, match="no epoch with shuffled_gap"):
        load_results("results.yaml")
    log = recipe / "exp/e5_s1/train.log"
    assert last_statistics(log) == {"loss": 1.0}
    log.write_text("the first epoch is not finished\n")
    assert rows_of(load_results("results.yaml"), "5 epochs")[0]["audio gap"] == "1.50"
    with pytest.raises(UserError, match="no such training log"):
        last_statistics(recipe / "none.log")


def test_a_baseline_to_come_is_left_out(recipe):
    (recipe / "results.yaml").write_text(CONFIG.replace("[weak, direct]", "[later, weak]"))
    assert load_results("results.yaml").baselines == ["weak"]
