"""Collecting systems into a table, RESULTS.md and a plot."""

import json
import re
import shutil
import sys

import pytest

from espnet_llm_plugin.bin.results_table import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import plots, results_page
from espnet_llm_plugin.scoring.bootstrap import Difference
from espnet_llm_plugin.scoring.evaluate import evaluate
from espnet_llm_plugin.scoring.results import load_results
from espnet_llm_plugin.scoring.table import markdown, plain

REFERENCES = {f"utt{n}": "one two three four five six" for n in range(30)}

CONFIG = """
command: ./run.sh --size tiny
notes: Synthetic speech.
baseline: weak
systems:
  - name: weak
    test: exp/asr_weak/decode/test
    dev: exp/asr_weak/decode/dev
    scales: {alpha: 1, label_bonus: 0.7}
    dev_nll: exp/nll.json
    time: exp/time.json
  - name: strong | tuned
    test: exp/asr_strong/decode/test
    scales: exp/scales.json
    rtf: exp/rtf.json
    time: [exp/time.json, exp/long.json]
"""


def run(line):
    main(line.split())


def score_set(directory, wrong, references=REFERENCES, **options):
    """Score a system that gets the first ``wrong`` utterances wrong by one substitution."""
    directory.mkdir(parents=True)
    hyps = {
        key: text.replace("one", "won", n < wrong)
        for n, (key, text) in enumerate(references.items())
    }
    for name, table in (("text", references), ("hyp", hyps)):
        lines = "".join(f"{key} {text}\n" for key, text in table.items())
        (directory / name).write_text(lines)
    paths = (str(directory / name) for name in ("text", "hyp"))
    evaluate(*paths, str(directory), resamples=200, **options)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    exp = tmp_path_factory.mktemp("scored") / "exp"
    score_set(exp / "asr_weak" / "decode" / "test", 20)
    score_set(exp / "asr_weak" / "decode" / "dev", 10)
    score_set(exp / "asr_strong" / "decode" / "test", 5)
    return exp


@pytest.fixture
def recipe(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exp = shutil.copytree(scored, tmp_path / "exp")
    files = {
        "scales.json": {
            "points": [],
            "best": {"alpha": 0.2, "beta": 0.4, "lm_weight": 0, "wer": 1},
        },
        "nll.json": {"nll_per_label": 0.91234},
        "rtf.json": {"rtf": 0.0071},
        "time.json": {"seconds": 90},
        "long.json": {"seconds": 7200},
    }
    for name, table in files.items():
        (exp / name).write_text(json.dumps(table))
    (tmp_path / "results.yaml").write_text(CONFIG)
    return tmp_path


def test_table(recipe):
    header, rows = results_page.comparison(load_results("results.yaml"))
    weak, strong = (dict(zip(header, row)) for row in rows)
    assert weak["test WER"] == "11.11" and weak["dev WER"] == "5.56"
    assert weak["ins / del / sub"] == "0.00 / 0.00 / 11.11"
    assert weak["scales"] == "alpha 1, bonus 0.7"
    assert weak["dev NLL/label"] == "0.912" and weak["RTF"] == "-"
    assert weak["training"] == "1.5 min" and strong["training"] == "2.0 h"
    assert strong["scales"] == "alpha 0.2, beta 0.4, LM 0"
    assert (strong["test WER"], strong["dev WER"], strong["RTF"]) == ("2.78", "-", "0.007")
    scores = json.loads((recipe / "exp/asr_weak/decode/test/scores.json").read_text())
    assert weak["95 %"] == "{:.2f}-{:.2f}".format(*scores["wer"]["interval"])


def test_real_time_factor_of_several_jobs(recipe):
    for job, (rtf, audio) in enumerate([(0.1, 30), (0.4, 10)]):
        path = recipe / f"exp/output.{job}.json"
        path.write_text(json.dumps({"rtf": rtf, "audio_seconds": audio}))
    config = CONFIG.replace("exp/rtf.json", "exp/output.*.json")
    (recipe / "results.yaml").write_text(config)
    assert load_results("results.yaml").systems[1].rtf == pytest.approx(7 / 40)


def test_use_of_the_lm_by_utterance(recipe):
    assert load_results("results.yaml").systems[1].lm_calls is None
    for job, (calls, utterances) in enumerate([(30, 2), (10, 3)]):
        table = {"rtf": 0.1, "audio_seconds": 1, "lm_calls": calls, "lm_tokens": 4 * calls}
        path = recipe / f"exp/output.{job}.json"
        path.write_text(json.dumps({**table, "utterances": utterances}))
    config = CONFIG.replace("exp/rtf.json", "exp/output.*.json")
    (recipe / "results.yaml").write_text(config)
    system = load_results("results.yaml").systems[1]
    assert (system.lm_calls, system.lm_tokens) == (8, 32)


def test_times_of_the_cpu_instead_of_the_clock(recipe):
    (recipe / "exp/rtf.json").write_text(json.dumps({"rtf": 0.0071, "cpu_rtf": 0.005}))
    for name, seconds in (("time", 60), ("long", 600)):
        content = {"seconds": 9 * seconds, "cpu_seconds": seconds}
        (recipe / f"exp/{name}.json").write_text(json.dumps(content))
    (recipe / "results.yaml").write_text("cpu_time: true" + CONFIG)
    weak, strong = load_results("results.yaml").systems
    assert (weak.seconds, strong.seconds, strong.rtf) == (60, 660, 0.005)
    (recipe / "exp/long.json").write_text('{"seconds": 600}')
    with pytest.raises(UserError, match="long.json: no cpu_seconds in it; it has seconds"):
        load_results("results.yaml")


def test_memory_of_training_is_the_most_of_any(recipe):
    header, _ = results_page.comparison(load_results("results.yaml"))
    assert "training memory" not in header  # of files that do not know it
    content = {"seconds": 5, "memory_bytes": 3.26e9, "gpu_memory_bytes": 12.3e9}
    (recipe / "exp/long.json").write_text(json.dumps(content))
    header, (weak, strong) = results_page.comparison(load_results("results.yaml"))
    assert header[-1] == "training memory"
    assert (weak[-1], strong[-1]) == ("-", "3.3 GB, GPU 12.3 GB")
    (recipe / "exp/time.json").write_text('{"seconds": 5, "memory_bytes": 4.0e9}')
    _, (weak, strong) = results_page.comparison(load_results("results.yaml"))
    assert (weak[-1], strong[-1]) == ("4.0 GB", "4.0 GB, GPU 12.3 GB")
    (recipe / "exp/long.json").unlink()  # a system whose training is not finished
    (recipe / "results.yaml").write_text("unfinished: true" + CONFIG)
    _, (weak, strong) = results_page.comparison(load_results("results.yaml"))
    assert (weak[-1], strong[-1]) == ("4.0 GB", "-")


def test_columns_that_nobody_fills_are_left_out(recipe):
    (recipe / "results.yaml").write_text("systems: [{name: weak, test: exp/asr_weak/decode/test}]")
    header, _ = results_page.comparison(load_results("results.yaml"))
    assert header == ["system", "test WER", "95 %", "ins / del / sub"]


def test_paired_comparison(recipe):
    results = load_results("results.yaml")
    ((system, pair),) = results.comparisons("test", "weak", None, resamples=500, seed=1)
    assert system.name == "strong | tuned" and isinstance(pair, Difference)
    assert pair.difference == pytest.approx(100 * 15 / 180) and pair.significant
    _, ((_, wer, difference, low_high, relative, better),) = results_page.paired(
        results, "test", "weak", None, resamples=500, seed=1
    )
    assert (wer, difference, relative, better) == ("2.78", "+8.33*", "+75.0 %", "100.0 %")
    assert low_high == f"{pair.low:+.2f} to {pair.high:+.2f}"


def test_page(recipe, capsys):
    run("--config results.yaml --output out/RESULTS.md --plot wer.png --resamples 100")
    page = (recipe / "out" / "RESULTS.md").read_text()
    assert page.index("## Comparison") < page.index("## Environments") < page.index("### WER")
    assert "|strong \\| tuned|-|2.78|" in page
    for part in (
        "Synthetic speech.",
        "command: `./run.sh --size tiny`",
        "espnet2 version: `espnet2 2",
    ):
        assert part in page
    assert f"`{sys.version.split()[0]} " in page
    # ESPnet's blocks: a section an experiment, a line a decoding directory.
    weak = page[page.index("## exp/asr_weak") : page.index("## exp/asr_strong")]
    assert "|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|" in weak and "### CER" in weak
    assert "|decode/dev|30|180|94.4|5.6|0.0|0.0|5.6|33.3|\n" in weak
    assert "|decode/test|30|180|88.9|11.1|0.0|0.0|11.1|66.7|\n" in weak
    out = capsys.readouterr().out
    assert "strong | tuned" in out and "Paired comparison with weak on test" in out
    assert (recipe / "wer.png").read_bytes().startswith(b"\x89PNG")


def test_page_names_the_diagnosis_of_an_experiment(recipe):
    (recipe / "exp" / "asr_weak" / "decode" / "diagnosis.md").write_text("# Diagnosis\n")
    run("--config results.yaml --output RESULTS.md --resamples 10")
    page = (recipe / "RESULTS.md").read_text()
    assert page.count("diagnosis.md") == 1
    weak = page[page.index("## exp/asr_weak") : page.index("## exp/asr_strong")]
    assert "numbers: `exp/asr_weak/decode/diagnosis.md`" in weak


def test_environment_names_the_commit(recipe, monkeypatch):
    answers = {"rev-parse": "abc123", "log": "Fri Nov 20", "status": " M file"}
    monkeypatch.setattr(results_page, "_git", lambda *arguments: answers[arguments[0]])
    text = results_page.environment(None)
    assert "Git hash: `abc123`" in text and "not committed" in text and "command" not in text
    answers["status"] = ""
    assert "not committed" not in results_page.environment(None)


def test_several_test_sets(recipe):
    score_set(recipe / "exp/asr_weak/decode/other", 3)
    config = CONFIG.replace(
        "test: exp/asr_weak/decode/test",
        "test: {clean: exp/asr_weak/decode/test, other: exp/asr_weak/decode/other}",
    ).replace("test: exp/asr_strong/decode/test", "test: {clean: exp/asr_strong/decode/test}")
    (recipe / "results.yaml").write_text(config)
    results = load_results("results.yaml")
    assert results.tests() == ["clean", "other"]
    header, (weak, strong) = results_page.comparison(results)
    column = header.index("other WER")
    assert weak[column : column + 3] == ["1.67", weak[column + 1], "0.00 / 0.00 / 1.67"]
    assert strong[column : column + 3] == ["-", "-", "-"]
    assert len(results.comparisons("clean", "weak", None, 10, 0)) == 1
    assert results.comparisons("other", "weak", None, 10, 0) == []
    run("--config results.yaml --plot wer.png --resamples 10")
    assert (recipe / "wer.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: weak", "baseline: none"), "baseline none is none of weak, strong"),
        (("rtf:", "speed:"), r"system 2: unknown speed; known: command, dev,"),
        (("    test: exp/asr_weak/decode/test\n", ""), r"system 1: test is missing"),
        (("name: strong | tuned", "name: weak"), "names that differ"),
        (
            ("exp/asr_weak/decode/dev", "exp/nowhere"),
            "scores.json: no such file; score exp/nowhere",
        ),
        (("dev_nll: exp/nll.json", "dev_nll: exp/rtf.json"), "rtf.json: no nll_per_label.* rtf"),
        (("{alpha: 1, label_bonus: 0.7}", "{gamma: 1}"), r"\(weak\): no scale in it"),
        (("{alpha: 1, label_bonus: 0.7}", "{alpha: much}"), "alpha is 'much'; expected a number"),
        (("scales: exp/scales.json", "scales: exp/no.json"), "no.json: no such file"),
        (("rtf: exp/rtf.json", "rtf: exp/no*.json"), r"exp/no\*.json: no such file"),
        ((CONFIG, "systems: []"), "at least one"),
        ((CONFIG, "systems: {a: 1}"), "list of mappings"),
        ((CONFIG, "- a"), "expected a mapping"),
        ((CONFIG, "a: [b"), "results.yaml: .*line 1"),
    ],
)
def test_bad_configurations(recipe, change, message):
    (recipe / "results.yaml").write_text(CONFIG.replace(*change))
    with pytest.raises(UserError, match=message):
        run("--config results.yaml --output RESULTS.md")
    assert not (recipe / "RESULTS.md").exists()


def test_systems_on_different_test_sets(recipe):
    fewer = dict(list(REFERENCES.items())[:-1])
    score_set(recipe / "exp/asr_other/decode/test", 0, fewer)
    config = CONFIG.replace("asr_strong", "asr_other").replace("baseline: weak", "")
    (recipe / "results.yaml").write_text(config)
    with pytest.raises(UserError, match="different utterances: utt29"):
        load_results("results.yaml")


def test_damaged_files(recipe):
    path = recipe / "exp/asr_weak/decode/test/scores.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({**scores, "wer": {"words": 3}}))
    with pytest.raises(UserError, match=r"scores.json: not written by .*sentences"):
        load_results("results.yaml")
    path.write_text("{")
    with pytest.raises(UserError, match="scores.json: "):
        load_results("results.yaml")
    path.write_text(json.dumps(scores))
    counts = path.parent / "score_wer" / "utterances.tsv"
    counts.write_text(counts.read_text().replace("utt3\t", "utt3 "))
    with pytest.raises(UserError, match=r"utterances.tsv:5: expected the columns"):
        load_results("results.yaml")
    counts.write_text(counts.read_text().replace("utt3 ", "utt3\t").replace("\t6\t", "\tsix\t"))
    with pytest.raises(UserError, match=r"utterances.tsv:\d+: 'six' is not a number"):
        load_results("results.yaml")


def test_plot_without_matplotlib(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        run("--config results.yaml --plot wer.png")


def test_plot_of_speed(recipe, capsys, monkeypatch):
    """Systems without a real-time factor are left out; without any there is no plot."""
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "annotate", lambda axes, text, place, *args, **kw: drawn.append(text))
    run("--config results.yaml --speed_plot speed.png")
    assert (recipe / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert drawn == ["strong | tuned"]
    drawn.clear()
    monkeypatch.setattr(plots, "_NAMED", 0)  # as if there were many
    listed = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **kw: listed.append(text))
    run("--config results.yaml --speed_plot speed.png")
    assert drawn == ["1"] and listed == ["1  strong | tuned"]
    config = (recipe / "results.yaml").read_text().replace("    rtf: exp/rtf.json\n", "")
    (recipe / "results.yaml").write_text(config)
    with pytest.raises(UserError, match="no system has been scored that has an `rtf`"):
        run("--config results.yaml --speed_plot speed.png")


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_resamples_must_be_positive(recipe, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        run(f"--config results.yaml --resamples {number}")
    assert "argument --resamples: invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (5400, "1.5 h")]
)
def test_duration(seconds, text):
    assert results_page.duration(seconds) == text


def test_tables():
    header, rows = ["name", "n"], [["łódź", "1"], ["日本", "10"], ["e\u0301|", "100"]]
    assert markdown(header, rows).split("\n")[:3] == ["|name|n|", "|---|---|", "|łódź|1|"]
    assert "e\u0301\\||100|" in markdown(header, rows)
    lines = plain(header, rows).rstrip("\n").split("\n")
    assert lines[0] == "name    n" and lines[2] == "łódź    1"
    assert lines[3] == "日本   10"  # as wide as four letters on a terminal
    assert re.fullmatch("-+  -+", lines[1])
