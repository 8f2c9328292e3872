"""The tuning command line: what it writes, its use by asr_inference, processes, bad input."""

import json

import jiwer
import pytest
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_scales
from espnet_llm_plugin.errors import UserError, UtteranceError
from espnet_llm_plugin.inference import tune as tune_module
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_lm, read_scp
from tests.llm.tiny import save_adapted_dir

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.4, "utt-d": 0.02}  # the last is too short
TEXT = {"utt-a": "ab c", "utt-b": "d a b d", "utt-c": "c", "utt-d": "a"}
GRID = ["--alphas", "0.2", "0.6", "--betas", "0", "0.4", "--label_bonuses", "0", "1", "2"]


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
    def tune(kind, *options, out="tune"):
        tune_scales.main(
            [
                *files[kind].asr_options(),
                "--data_path_and_name_and_type",
                f"{files['wav']},speech,sound",
                "--text",
                str(files["text"]),
                "--output_dir",
                str(tmp_path / out),
                *options,
            ]
        )
        return tmp_path / out

    return tune


def scales_of(directory):
    return json.loads((directory / "scales.json").read_text())


def decode(files, kind, directory, *options):
    """1-best texts of :mod:`asr_inference`."""
    asr_inference.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(directory), *options),
        ]
    )
    return read_scp(directory / "1best_recog" / "text")


def test_scales_that_made_the_references_win(run, files, tmp_path, caplog):
    scales = ["--alpha", "0.6", "--beta", "0.4", "--label_bonus", "1", "--beam_size", "4"]
    made = {
        **TEXT,
        **{k: v for k, v in decode(files, "factorized", tmp_path / "a", *scales).items() if v},
    }
    text = tmp_path / "text"
    text.write_text("".join(f"{utt} {line}\n" for utt, line in made.items()))
    with caplog.at_level("WARNING"):
        out = run("factorized", *GRID, "--text", str(text))
    result = scales_of(out)
    assert len(result["points"]) == 12
    rates = [point["wer"] for point in result["points"]]
    best = result["best"]
    assert "lm_weight" not in best  # there is no LM
    assert best["wer"] == min(rates) < max(rates)
    assert (best["alpha"], best["beta"], best["label_bonus"]) == (0.6, 0.4, 1.0)
    assert best["deletions"] == 1 and best["substitutions"] == 0  # utt-d
    assert list(result["failed"]) == ["utt-d"] and "utt-d" in caplog.text
    assert len((out / "table.txt").read_text().splitlines()) == 13
    assert (out / "heat_map.png").read_bytes().startswith(b"\x89PNG")

    settings = yaml.safe_load((out / "best.yaml").read_text())
    assert settings == {
        **{name: best[name] for name in ("alpha", "beta", "label_bonus")},
        **{"beam_size": 4, "max_symbols_per_frame": 3, "normalize_length": False},
    }
    again = decode(files, "factorized", tmp_path / "b", "--config", str(out / "best.yaml"))
    assert again == {**made, "utt-d": ""}


def test_word_errors_are_those_of_decoding(run, files, tmp_path):
    grid = ["--alphas", "0.3", "--betas", "0.1", "--label_bonuses", "0.5", "--beam_size", "2"]
    (point,) = scales_of(run("factorized", *grid))["points"]
    scales = ["--alpha", "0.3", "--beta", "0.1", "--label_bonus", "0.5", "--beam_size", "2"]
    text = decode(files, "factorized", tmp_path / "decode", *scales)
    words = jiwer.process_words(list(TEXT.values()), [text[utt] for utt in TEXT])
    assert point["wer"] == pytest.approx(100 * words.wer)
    assert point["deletions"] == words.deletions


def test_processes_give_the_same_result(run):
    alone = scales_of(run("factorized", *GRID))
    shared = scales_of(run("factorized", *GRID, "--nj", "3", out="shared"))
    assert shared["points"] == alone["points"] and shared["failed"] == alone["failed"]


@pytest.mark.parametrize("kind", ["ctc", "transducer"])
def test_models_without_predictor_lm_tune_lm_weight_and_bonus(run, files, kind, caplog):
    options = [*files["lm"].lm_options(), "--lm_weights", "0.1", "0.5"]
    with caplog.at_level("WARNING"):
        out = run(kind, *GRID, *options)
    assert "alphas and betas are left out" in caplog.text
    result = scales_of(out)
    assert len(result["points"]) == 6
    for point in result["points"]:
        assert set(point) & {"alpha", "beta", "lm_weight", "label_bonus"} == {
            *("lm_weight", "label_bonus")
        }
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["lm_weight"] == result["best"]["lm_weight"]
    assert "alpha" not in best and "beta" not in best


def test_an_lm_weight_of_zero_is_written_too(run, files):
    """asr_inference would take ESPnet's default, 1."""
    out = run("ctc", *files["lm"].lm_options(), "--lm_weights", "0")
    assert yaml.safe_load((out / "best.yaml").read_text())["lm_weight"] == 0.0


def test_config_file_with_the_grid(run, tmp_path):
    config = tmp_path / "tune.yaml"
    config.write_text("alphas: [0.3, 0.4]\nbetas: [0.2]\nbeam_size: 2\n")
    out = run("factorized", "--config", str(config))
    result = scales_of(out)
    # the bonus not given is the model's
    assert [(p["alpha"], p["label_bonus"]) for p in result["points"]] == [(0.3, 0.3), (0.4, 0.3)]
    assert yaml.safe_load((out / "best.yaml").read_text())["beam_size"] == 2
    assert not (out / "heat_map.png").exists()


def test_length_normalization_is_handed_on(run):
    out = run("factorized", "--normalize_length", "true", "--max_symbols_per_frame", "1")
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["normalize_length"] is True and best["max_symbols_per_frame"] == 1


def test_the_same_grid_is_not_searched_again(run, monkeypatch):
    run("factorized", *GRID)
    monkeypatch.setattr(tune_module, "run_part", None)
    run("factorized", *GRID)
    with pytest.raises(TypeError):
        run("factorized", *GRID, "--beam_size", "3")


def test_a_retrained_llm_is_tuned_again(run, tmp_path, monkeypatch):
    llm = save_adapted_dir(tmp_path / "llm", TOKENS)
    options = ["--predictor", "llm", "--predictor_conf", f"llm={llm}", "--beam_size", "2"]
    run("factorized", *options)
    other = save_adapted_dir(tmp_path / "other", TOKENS, seed=1)
    monkeypatch.setattr(tune_module, "run_part", None)
    run("factorized", *options)
    (other / "model.safetensors").rename(llm / "model.safetensors")
    with pytest.raises(TypeError):
        run("factorized", *options)


def test_failed_utterances_are_named_and_the_others_tuned_on(run, monkeypatch):
    errors = [RuntimeError(), UtteranceError("is too long\nfor this LLM")]
    original = tune_module.search_grid

    def search_grid(search, encoded, *args):
        if len(encoded) > 1:
            raise RuntimeError("one of them fails")
        if errors:
            raise errors.pop(0)
        return original(search, encoded, *args)

    monkeypatch.setattr(tune_module, "search_grid", search_grid)
    # utt-d is too short in itself; by length comes utt-c first, then utt-a
    failed = scales_of(run("factorized"))["failed"]
    assert list(failed) == ["utt-a", "utt-c", "utt-d"]
    assert failed["utt-c"] == "RuntimeError" and failed["utt-a"] == "is too long"


def test_lines_of_references_end_at_line_feeds_only(run, tmp_path, monkeypatch):
    """U+0085 and U+2028 are characters of a transcript."""
    scored = []
    original = tune_module.score_grid

    def score_grid(grid, references, hypotheses):
        scored.extend(references)
        return original(grid, references, hypotheses)

    monkeypatch.setattr(tune_module, "score_grid", score_grid)
    text = tmp_path / "text"
    made = {**TEXT, "utt-a": "a\u0085utt-b c", "utt-b": "d\u2028b"}
    text.write_text("".join(f"{utt} {line}\n" for utt, line in made.items()), "utf-8")
    run("factorized", "--text", str(text))
    assert scored == list(made.values())


def test_bad_input_is_named(run, files, tmp_path):
    with pytest.raises(UserError, match="--text none: there is no such file"):
        run("factorized", "--text", "none")
    text = tmp_path / "text"
    text.write_text("utt-a ab\nutt-b b\n")
    with pytest.raises(UserError, match="no transcript of 2 utterances: utt-c"):
        run("factorized", "--text", str(text))
    text.write_text("utt-a ab\n\nutt-b b\nutt-c c\nutt-d d\nutt-a cd\n")
    with pytest.raises(UserError, match="(?s)duplicate id .*utt-a.*") as caught:
        run("factorized", "--text", str(text))
    assert "text:2 has 0, expected 1 or more" in str(caught.value)
    with pytest.raises(UserError, match="none.yaml: there is no such file"):
        run("factorized", "--asr_train_config", "none.yaml")
    with pytest.raises(UserError, match="lm_weights"):
        run("factorized", *files["lm"].lm_options())
    with pytest.raises(UserError, match="--nj 0"):
        run("factorized", "--nj", "0")
    with pytest.raises(UserError, match="--ngpu 2"):
        run("factorized", "--ngpu", "2")
    keys = tmp_path / "keys"
    keys.write_text("utt-d\n")
    with pytest.raises(UserError, match="not one utterance.*utt-d"):
        run("factorized", "--key_file", str(keys))
    with pytest.raises(UserError, match="beam size 0"):
        run("factorized", "--beam_size", "0", "--nj", "2")
    assert not (tmp_path / "tune").exists()


STREAMING = """
encoder: streaming_conformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 16, num_blocks: 1,
  subsampling: 4, subsampling_channels: 4, chunk_size: 8, left_context: 32}
frontend_conf: {n_mels: 40, fs: 16k}
normalize: null
token_type: char
"""


def test_chunk_of_a_streaming_encoder(files, tmp_path):
    """The utterances are encoded in these chunks; decoding in them gives the error rate found."""
    made = {**files, "streaming": make_asr(tmp_path / "asr", "factorized", encoder=STREAMING)}
    for chunk in ("32", "inf"):
        out = tmp_path / chunk
        tune_scales.main(
            [
                *made["streaming"].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--text", str(files["text"]), "--output_dir", str(out), "--chunk_ms", chunk),
                *("--label_bonuses", "0", "2"),
            ]
        )
        # the report of streaming reads best.yaml for all sizes of chunks
        options = ["--config", str(out / "best.yaml"), "--chunk_ms", chunk]
        with_best = decode(made, "streaming", tmp_path / f"with_best_{chunk}", *options)
        words = [with_best[utt] for utt in TEXT]
        wer = 100 * jiwer.wer(list(TEXT.values()), words)
        assert scales_of(out)["best"]["wer"] == pytest.approx(wer)
    with pytest.raises(UserError, match="has no chunks"):
        tune_scales.main(
            [
                *files["ctc"].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--text", str(files["text"]), "--output_dir", str(tmp_path / "no")),
                *("--chunk_ms", "32"),
            ]
        )
