"""The decoding and tuning command lines with a speech LLM."""

import json
import math
import re

import pytest
import torch
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_fusion, tune_scales
from espnet_llm_plugin.errors import UserError, UtteranceError
from espnet_llm_plugin.inference.loading import load_asr
from espnet_llm_plugin.inference.speech_llm import SpeechLLMRecognizer
from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.units import label_units
from tests.inference.tiny_asr import TOKENS, make_audio, make_lm, make_speech_llm, read_scp
from tests.llm.tiny import save_adapted_dir
from tests.speech_llm.tiny_llm import save_native

SECONDS = {"utt-b": 0.9, "utt-a": 0.5, "utt-c": 1.3, "utt-d": 0.7}
TEXT = {"utt-a": "ab c", "utt-b": "d a b d", "utt-c": "c", "utt-d": "a"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    llm = save_adapted_dir(directory / "llm", TOKENS, seed=3)
    made = {
        "speech_llm": make_speech_llm(directory / "speech_llm", llm),
        "no_ctc": make_speech_llm(directory / "no_ctc", llm, ctc_weight=0.0),
        "lm": make_lm(directory / "lm", "seq_rnn"),
        "wav": make_audio(directory / "wav", SECONDS),
    }
    made["text"] = directory / "text"
    made["text"].write_text("".join(f"{utt} {line}\n" for utt, line in TEXT.items()))
    return made


@pytest.fixture
def run(files, tmp_path):
    """Decode into ``tmp_path/out``; returns the n-best entries."""

    def decode(*options, kind="speech_llm", wav=None, out="out", read=True):
        data = f"{wav or files['wav']},speech,sound"
        asr_inference.main(
            [
                *files[kind].asr_options(),
                *("--data_path_and_name_and_type", data, "--num_workers", "0"),
                *("--output_dir", str(tmp_path / out), *options),
            ]
        )
        lines = (tmp_path / out / "nbest.jsonl").read_text().splitlines() if read else ()
        return [json.loads(line) for line in lines]

    return decode


def test_results_have_the_parts_of_the_scores(run, files, tmp_path):
    options = ["--beam_size", "3", "--nbest", "2", "--ctc_weight", "0.3", "--penalty", "0.5"]
    options += ["--textlm_weight", "0.2", "--lm_weight", "0.4", *files["lm"].lm_options()]
    entries = run(*options)
    assert [(e["utt"], e["rank"]) for e in entries] == [(u, n) for u in SECONDS for n in (1, 2)]
    weights = {"decoder": 0.7, "ctc": 0.3, "textlm": 0.2, "lm": 0.4}
    for entry in entries:
        parts = sum(weight * entry[name] for name, weight in weights.items())
        assert entry["total"] == pytest.approx(parts + entry["bonus"], abs=1e-4)
        assert entry["ranking"] == pytest.approx(entry["total"])
        steps = len(entry["token_int"].split()) + entry["ended"]
        assert entry["bonus"] == pytest.approx(0.5 * steps)
        tokens = [TOKENS[int(i)] for i in entry["token_int"].split()]
        assert entry["text"] == "".join(tokens).replace("<space>", " ")
    recognised = read_scp(tmp_path / "out" / "1best_recog" / "text")
    assert list(recognised) == list(SECONDS) and len(set(recognised.values())) > 1


@pytest.mark.parametrize("weight", ["0", "0.4", "1"])
def test_a_batch_gives_what_single_utterances_give(run, weight):
    options = ("--beam_size", "3", "--nbest", "2", "--ctc_weight", weight)
    alone = run(*options)
    together = run(*options, "--batch_size", "3", out="batch")
    for one, other in zip(alone, together, strict=True):
        for name in ("utt", "rank", "text", "token_int"):
            assert one[name] == other[name]
        assert one["total"] == pytest.approx(other["total"], abs=1e-3)


CHANGING = (
    "--ctc_weight 0.2",
    "--textlm_weight 0.3",
    "--penalty 0.4",
    "--length_norm 1",
    "--normalize_length true",
    "--ctc_top_k 2",
    "--ctc_compression 0.3",
    "--maxlenratio -3",
    "--minlenratio -9",
    "--max_tokens_per_second 4",
    "--max_repeats 1",
    "--end_detection generate",
)


@pytest.mark.parametrize("option", CHANGING)
def test_every_option_changes_the_result(run, option):
    """Longest outputs are wanted, so that limits matter."""
    always = ["--beam_size", "2", "--nbest", "2", "--max_repeats", "0", "--penalty", "3"]
    if option == "--end_detection generate":
        always[-1] = "1.2"
        always += ["--ctc_weight", "0", "--maxlenratio", "-30"]
    changed = [*always, *option.split()]
    assert run(*always, out="plain") != run(*changed, out="changed")


def test_length_limits(run):
    never = ["--beam_size", "2", "--penalty", "4", "--max_repeats", "0", "--ctc_weight", "0"]
    for entry in run(*never, "--max_tokens_per_second", "10"):
        # at the limit the end symbol may be the last token, or is left out
        steps = len(entry["token_int"].split()) + entry["ended"]
        assert steps == math.ceil(10 * SECONDS[entry["utt"]])
    for entry in run(*never, "--maxlenratio", "-5"):
        assert len(entry["token_int"].split()) + entry["ended"] == 5


def test_repetition_guard(run):
    options = ["--beam_size", "2", "--penalty", "4", "--maxlenratio", "-20", "--ctc_weight", "0"]
    for entry in run(*options, "--max_repeats", "2"):
        tokens = entry["token_int"].split()
        for n in range(1, 5):
            for i in range(len(tokens) - 3 * n + 1):
                first = tokens[i : i + n]
                assert not first == tokens[i + n : i + 2 * n] == tokens[i + 2 * n : i + 3 * n]


@pytest.mark.parametrize("method", ["silence", "ctc"])
def test_long_audio_is_decoded_in_segments(run, tmp_path, method):
    wav = make_audio(tmp_path / "wav", {"long": 4.0, "short": 0.8}, seed=2)
    cut = ["--long_form", method, "--max_segment_seconds", "1.5", "--segment_overlap", "0.2"]
    options = ["--beam_size", "2", "--nbest", "2", "--penalty", "3", "--maxlenratio", "-4"]
    entries = run(*options, *cut, wav=wav)
    whole = run(*options, wav=wav, out="whole")
    lengths = {e["utt"]: len(e["token_int"].split()) for e in entries if e["rank"] == 1}
    # at most four tokens a segment, and more of these than one
    assert 4 < lengths["long"] <= 6 * 4 and lengths["short"] <= 4
    assert entries[2:] == whole[2:]
    batched = run(*options, *cut, "--batch_size", "4", wav=wav, out="batched")
    assert [e["token_int"] for e in batched] == [e["token_int"] for e in entries]
    best, second = entries[:2]
    assert best["ranking"] >= second["ranking"]
    assert best["text"].count(" ") >= 1  # segments are words of their own


def test_audio_too_short_for_a_frame(run, tmp_path, caplog):
    wav = make_audio(tmp_path / "wav", {"long": 0.9, "short": 0.02, "longer": 1.1})
    entries = run("--beam_size", "1", "--batch_size", "3", wav=wav)
    assert entries[0]["text"] and entries[1]["text"] == "" and entries[2]["text"]
    assert "1 of 3 utterances failed: short" in caplog.text


def test_no_frame_is_an_error(files):
    """Not a search without audio, whose text would be what the LLM likes."""
    recognizer = SpeechLLMRecognizer(
        load_asr(files["speech_llm"].config, files["speech_llm"].model)
    )
    frames = torch.zeros(2, 3, recognizer.asr.model.encoder.output_size())
    with pytest.raises(UtteranceError, match="no frame"):
        recognizer.search(frames, torch.tensor([3, 0]))


def test_audio_beyond_the_context(run, tmp_path, caplog):
    wav = make_audio(tmp_path / "wav", {"long": 9.0, "short": 0.8})
    # the tiny LLM sees 64 tokens
    entries = run("--beam_size", "1", wav=wav)
    assert entries[0]["text"] == "" and entries[1]["text"]
    assert "--long_form silence" in caplog.text
    entries = run("--beam_size", "1", "--long_form", "ctc", "--max_segment_seconds", "2", wav=wav)
    assert entries[0]["text"]


def test_native_tokens(files, tmp_path, run):
    llm = save_native(tmp_path / "llm")
    tokens = native_token_list(str(llm))
    kind = f"hugging_face\nbpemodel: {llm}"
    conf = dict(token_type=kind, decoder_conf=", prompt: short")
    files = {**files, "native": make_speech_llm(tmp_path / "native", llm, tokens, **conf)}
    made = files["native"]
    options = ["--ctc_weight", "0.3", "--textlm_weight", "0.1", "--beam_size", "3"]
    options += ["--asr_train_config", str(made.config), "--asr_model_file", str(made.model)]
    options += ["--maxlenratio", "-12", "--penalty", "2"]
    entries = run(*options)
    units = label_units(str(llm), len(tokens))
    for entry in entries:
        ids = [int(i) for i in entry["token_int"].split()]
        assert ids and units.scored[ids].all() and units.eos not in ids
        assert entry["text"] == units.decode(ids)
    few = run(*options, "--ctc_top_k", "3", out="few")
    assert few != entries


def test_wide_beams_find_what_espnets_search_finds(run, tmp_path):
    """ESPnet's own joint search with the same model as decoder; scores count one start less."""
    options = ["--beam_size", "7", "--ctc_weight", "0.4", "--penalty", "0.3"]
    ours = {entry["utt"]: entry for entry in run(*options, "--max_repeats", "0")}
    theirs = tmp_path / "espnet"
    run(*options, "--search", "espnet", out="espnet", read=False)
    text = read_scp(theirs / "1best_recog" / "text")
    scores = read_scp(theirs / "1best_recog" / "score")
    assert len(set(text.values())) > 1
    for utt, entry in ours.items():
        assert entry["text"] == text[utt]
        found = float(re.sub(r"[^-+.e0-9]", "", scores[utt].removeprefix("tensor")))
        assert entry["total"] == pytest.approx(found, abs=1e-2)


def test_model_without_ctc(run, caplog):
    entries = run("--beam_size", "2", kind="no_ctc")
    assert "ctc" not in entries[0] and "--ctc_weight is 0" in caplog.text
    with pytest.raises(UserError, match="--ctc_weight 0.3: the model has no CTC head"):
        run("--ctc_weight", "0.3", kind="no_ctc")
    with pytest.raises(UserError, match="--long_form silence"):
        run("--ctc_weight", "0", "--long_form", "ctc", kind="no_ctc")


@pytest.mark.parametrize(
    "option",
    [
        *("--alpha 0.3", "--blank_scale 0.5", "--max_symbols_per_frame 2", "--ilm_weight 0.1"),
        "--time_sync true",
    ],
)
def test_options_of_transducers_are_refused(run, option):
    with pytest.raises(UserError, match=option.split()[0]):
        run(*option.split())


@pytest.mark.parametrize(
    "option",
    [
        *("--ctc_weight 1.5", "--ctc_top_k -1", "--ctc_compression 2", "--length_norm -1"),
        *("--max_repeats -1", "--max_tokens_per_second -1", "--segment_overlap 40"),
        *("--beam_size 0", "--length_norm 0.5 --normalize_length true"),
        *("--long_form silence --max_segment_seconds 0", "--penalty 1 --label_bonus 2"),
    ],
)
def test_bad_values_are_refused(run, option):
    with pytest.raises(UserError):
        run(*option.split())


def test_search_espnet_refuses_our_options(run):
    with pytest.raises(UserError, match="--search espnet knows no --textlm_weight"):
        run("--search", "espnet", "--textlm_weight", "0.3")


def tune(files, directory, *options, kind="speech_llm", module=tune_scales):
    module.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--text", str(files["text"]), "--output_dir", str(directory), *options),
        ]
    )
    return json.loads((directory / "scales.json").read_text())


def test_tuned_weights_give_the_same_text_when_decoding(run, files, tmp_path, caplog):
    grid = ["--ctc_weights", "0", "0.5", "--textlm_weights", "0", "0.3", "--label_bonuses", "0.5"]
    grid += ["--lm_weights", "0.2", *files["lm"].lm_options(), "--length_norms", "0", "1"]
    grid += ["--alphas", "0.3", "--beam_size", "3", "--batch_size", "3"]
    result = tune(files, tmp_path / "tune", *grid)
    assert "alphas are left out" in caplog.text
    assert len(result["points"]) == 8
    best = result["best"]
    assert best["wer"] == min(point["wer"] for point in result["points"])
    settings = yaml.safe_load((tmp_path / "tune" / "best.yaml").read_text())
    assert settings["penalty"] == 0.5 and settings["lm_weight"] == 0.2
    assert settings["beam_size"] == 3 and "alpha" not in settings
    found = {}
    for number, point in enumerate(result["points"]):
        weights = [part for name in AXES for part in (f"--{name}", str(point[name]))]
        config = ["--config", str(tmp_path / "tune" / "best.yaml")]
        entries = run(*config, *files["lm"].lm_options(), *weights, out=f"{number}")
        errors = sum(map(words_wrong, (TEXT[e["utt"]] for e in entries), texts(entries)))
        words = sum(len(line.split()) for line in TEXT.values())
        assert point["wer"] == pytest.approx(100 * errors / words)
        found[tuple(texts(entries))] = point
    assert len(found) > 1
    # and once more: the results are there already
    assert tune(files, tmp_path / "tune", *grid) == result


AXES = ("ctc_weight", "textlm_weight", "lm_weight", "penalty", "length_norm")


def texts(entries):
    return [entry["text"] for entry in entries]


def words_wrong(reference, hypothesis):
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(reference.split(), hypothesis.split())


def test_tuning_refuses_what_means_nothing(files, tmp_path):
    with pytest.raises(UserError, match="add --lm_weights"):
        tune(files, tmp_path / "a", *files["lm"].lm_options())
    with pytest.raises(UserError, match="--ctc_weights.*no CTC head"):
        tune(files, tmp_path / "b", "--ctc_weights", "0.5", kind="no_ctc")
    with pytest.raises(UserError, match="--long_form ctc: weights are tuned on utterances"):
        tune(files, tmp_path / "d", "--long_form", "ctc")
    with pytest.raises(UserError, match="tune_scales"):
        tune(files, tmp_path / "c", module=tune_fusion)
