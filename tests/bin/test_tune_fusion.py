"""Tuning by re-ranked lists: what it searches and writes, beside the full grid."""

import json

import pytest
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_fusion, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.tuning import Point
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_lm, read_scp
from tests.llm.tiny import save_adapted_dir

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.4, "utt-d": 0.02}  # the last is too short
TEXT = {"utt-a": "ab c", "utt-b": "d a b d", "utt-c": "c", "utt-d": "a"}
GRID = ["--alphas", "0.2", "0.6", "1", "--betas", "0", "0.4", "--label_bonuses", "0", "1", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in ("ctc", "transducer", "factorized")}
    made["lm"] = make_lm(directory / "lm", "transformer")
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("".join(f"{utt} {line}\n" for utt, line in TEXT.items()))
    return made


@pytest.fixture
def run(files, tmp_path):
    def tune(kind, *options, out="fusion", command=tune_fusion):
        command.main(
            [
                *files[kind].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--text", str(files["text"])),
                *("--output_dir", str(tmp_path / out)),
                *options,
            ]
        )
        return json.loads((tmp_path / out / "scales.json").read_text())

    return tune


def decode(files, kind, directory, *options):
    asr_inference.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(directory), *options),
        ]
    )
    return directory


def test_searched_points_have_the_word_errors_of_the_full_grid(run):
    grid = run("factorized", *GRID, out="grid", command=tune_scales)
    some = run("factorized", *GRID, "--rounds", "2", "--cells", "2")
    assert len(some["points"]) == len(grid["points"]) == 18
    searched = [point for point in some["points"] if "reranked" not in point]
    assert 3 <= len(searched) <= 7
    assert all(point in grid["points"] for point in searched)
    assert some["best"]["wer"] == min(point["wer"] for point in searched)
    assert list(some["failed"]) == ["utt-d"]
    assert set(grid) == set(some)


def test_with_cells_enough_the_best_point_is_that_of_the_full_grid(run):
    grid = run("factorized", *GRID, out="grid", command=tune_scales)
    found = run("factorized", *GRID, "--rounds", "18", "--cells", "18")
    assert found["best"]["wer"] == min(point["wer"] for point in grid["points"])


def test_it_ends_when_a_round_brings_nothing(run, monkeypatch):
    """Points that promise a lower error rate for ever, and from the third on do not keep it."""
    rates = iter([50.0, 40.0, 30.0, 30.0, 10.0])

    def next_points(points, searched, number):
        return [point.scales for point in points if point.scales not in searched][:number]

    def score_grid(points, references, hypotheses):
        rate = next(rates)
        return [Point(scales, rate, 0, 0, 0, 10) for scales in points]

    monkeypatch.setattr("espnet_llm_plugin.fusion.reranking.next_points", next_points)
    monkeypatch.setattr("espnet_llm_plugin.inference.tune_fusion.score_grid", score_grid)
    found = run("factorized", *GRID, "--rounds", "15", "--cells", "1")
    searched = [point["wer"] for point in found["points"] if "reranked" not in point]
    assert sorted(searched) == [30.0, 30.0, 40.0, 50.0, 50.0, 50.0]


def test_the_references_own_scales_are_found(run, files, tmp_path):
    """The transcripts are what one point of 60 decodes."""
    scales = ["--alpha", "0.6", "--beta", "0.4", "--label_bonus", "1", "--beam_size", "4"]
    made = read_scp(decode(files, "factorized", tmp_path / "a", *scales) / "1best_recog" / "text")
    text = tmp_path / "text"
    text.write_text("".join(f"{utt} {made.get(utt) or 'a'}\n" for utt in TEXT))
    grid = {
        "--alphas": [0.2, 0.4, 0.6, 0.8],
        "--betas": [0, 0.2, 0.4, 0.6, 0.8],
        "--label_bonuses": [0, 1, 2],
    }
    options = ["--text", str(text)]
    for name, values in grid.items():
        options += [name, *map(str, values)]
    found = run("factorized", *options)
    assert found["best"]["deletions"] == 1 and found["best"]["substitutions"] == 0  # utt-d
    out = tmp_path / "fusion"
    assert len((out / "table.txt").read_text().splitlines()) == 61
    assert (out / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    again = decode(files, "factorized", tmp_path / "b", "--config", str(out / "best.yaml"))
    again = read_scp(again / "1best_recog" / "text")
    assert {utt: again[utt] for utt in made if utt != "utt-d"} == {
        utt: made[utt] for utt in made if utt != "utt-d"
    }
    lines = [json.loads(line) for line in (out / "nbest.jsonl").read_text().splitlines()]
    assert {line["utt"] for line in lines} == {"utt-a", "utt-b", "utt-c"}
    assert all(len(line["acoustic"]) == 4 and line["lm"] <= 0 for line in lines)


@pytest.mark.parametrize("kind", ["transducer", "ctc"])
def test_models_without_predictor_lm(run, files, kind, tmp_path, caplog):
    options = [*files["lm"].lm_options(), "--lm_weights", "0.1", "0.5", "--label_bonuses", "0", "1"]
    with caplog.at_level("WARNING"):
        found = run(kind, *options, "--ilm_weights", "0", "0.3")
    best = yaml.safe_load((tmp_path / "fusion" / "best.yaml").read_text())
    if kind == "ctc":
        assert "ilm_weights are left out" in caplog.text and "ilm_weight" not in best
        assert len(found["points"]) == 4
    else:
        assert len(found["points"]) == 8
        assert best["ilm_weight"] in (0.0, 0.3)
        full = run(*(kind, *options, "--ilm_weights", "0", "0.3"), out="grid", command=tune_scales)
        assert all(point in full["points"] for point in found["points"] if "reranked" not in point)
    decode(
        *(files, kind, tmp_path / "again", *files["lm"].lm_options()),
        *("--config", str(tmp_path / "fusion" / "best.yaml")),
    )


@pytest.mark.parametrize("kind", ["transducer", "factorized"])
def test_stored_lists(run, files, kind, tmp_path):
    """What asr_inference kept is scored; then only promising points are searched."""
    stored = decode(files, kind, tmp_path / "stored", "--nbest", "4", "--beam_size", "4")
    grid = GRID if kind == "factorized" else ["--label_bonuses", "0", "0.5", "1", "2"]
    options = [*grid, "--nbest_files", str(stored / "nbest.jsonl"), "--rounds", "1"]
    found = run(kind, *options, "--cells", "2")
    searched = [point for point in found["points"] if "reranked" not in point]
    assert len(searched) == 2
    best = min(found["points"], key=lambda point: point["wer"])
    assert found["best"]["wer"] >= best["wer"]
    kept = {json.loads(line)["utt"] for line in (stored / "nbest.jsonl").read_text().splitlines()}
    assert kept >= {"utt-a", "utt-b", "utt-c"}


def test_an_llm_swapped_in(run, tmp_path):
    llm = save_adapted_dir(tmp_path / "llm", TOKENS)
    options = [*GRID, "--predictor", "llm", "--predictor_conf", f"llm={llm}"]
    grid = run("factorized", *options, out="grid", command=tune_scales)
    found = run("factorized", *options)
    searched = [point for point in found["points"] if "reranked" not in point]
    assert len(searched) < 18 and all(point in grid["points"] for point in searched)


def test_processes_and_repetition(run, monkeypatch):
    alone = run("factorized", *GRID)
    shared = run("factorized", *GRID, "--nj", "2", out="shared")
    assert shared["points"] == alone["points"] and shared["failed"] == alone["failed"]
    monkeypatch.setattr("espnet_llm_plugin.inference.tune_fusion.explore", None)
    run("factorized", *GRID)  # has its results
    with pytest.raises(TypeError):
        run("factorized", *GRID, "--cells", "4")


def test_bad_input_is_named(run, files, tmp_path):
    with pytest.raises(UserError, match="--cells 0"):
        run("factorized", "--cells", "0")
    with pytest.raises(UserError, match="--nbest_files nowhere: there is no such file"):
        run("factorized", "--nbest_files", "nowhere")
    lists = tmp_path / "nbest.jsonl"
    lists.write_text('{"utt": "utt-a"}\n')
    with pytest.raises(UserError, match="nbest.jsonl:1 is not a line of asr_inference's"):
        run("factorized", "--nbest_files", str(lists))
    lists.write_text('{"utt": "other", "token_int": "3 4", "acoustic": -1.0}\n')
    with pytest.raises(UserError, match="none of the utterances to tune on"):
        run("factorized", "--nbest_files", str(lists))
    lists.write_text('{"utt": "utt-a", "token_int": "3 99", "acoustic": -1.0}\n')
    with pytest.raises(UserError, match="a token 99, but the model has 8 tokens"):
        run("factorized", "--nbest_files", str(lists))
    keys = tmp_path / "keys"
    keys.write_text("utt-d\n")
    with pytest.raises(UserError, match="not one utterance.*utt-d"):
        run("factorized", "--key_file", str(keys))
    assert not (tmp_path / "fusion").exists()
