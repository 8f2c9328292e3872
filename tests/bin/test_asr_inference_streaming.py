"""The streaming decoding command: the offline command's results, and what was known when."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.bin import asr_inference, asr_inference_streaming, streaming_report
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference import decode, decode_streaming
from espnet_llm_plugin.inference.options import espnet_streaming_parser
from tests.inference.tiny_asr import KINDS, RATE, make_asr, make_audio, make_lm, read_scp
from tests.inference.tiny_streaming import make_streaming_asr

SECONDS = {"utt-b": 0.9, "utt-a": 0.5, "utt-c": 1.3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_streaming_asr(directory / kind, "emformer", kind) for kind in KINDS}
    made["offline"] = make_asr(directory / "offline", "factorized")
    made["lm"] = make_lm(directory / "lm", "seq_rnn")
    made["wav"] = make_audio(directory / "wav", SECONDS)
    return made


@pytest.fixture
def run(files, tmp_path):
    """Decode into ``tmp_path/out``; returns the directory."""

    def decode(kind, *options, wav=None, out="out", command=asr_inference_streaming):
        command.main(
            [
                *files[kind].asr_options(),
                *["--data_path_and_name_and_type", f"{wav or files['wav']},speech,sound"],
                *["--output_dir", str(tmp_path / out), "--num_workers", "0"],
                *options,
            ]
        )
        return tmp_path / out

    return decode


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_the_offline_command(run, kind):
    options = ["--beam_size", "4", "--nbest", "2", "--chunk_ms", "160", "--dtype", "float64"]
    ours = run(kind, *options, "--sim_chunk_length", "1111")
    whole = run(kind, *options, out="whole", command=asr_inference)
    for name in ("token", "token_int", "text"):
        for n in (1, 2):
            expected = read_scp(whole / f"{n}best_recog" / name)
            assert read_scp(ours / f"{n}best_recog" / name) == expected
            assert all(expected.values()) and list(expected) == list(SECONDS)
    for one, other in zip(lines_of(ours / "nbest.jsonl"), lines_of(whole / "nbest.jsonl")):
        assert one["total"] == pytest.approx(other["total"], abs=1e-4)
        assert one["frames"] == other["frames"]
    # and the chunk is not ignored
    default = run(kind, *options[:4], out="default", command=asr_inference)
    assert (default / "nbest.jsonl").read_text() != (whole / "nbest.jsonl").read_text()


def test_partial_results_and_times_of_every_piece(run):
    out = run("factorized", "--beam_size", "4", "--sim_chunk_length", "1600")
    lines = lines_of(out / "streaming.jsonl")
    final = read_scp(out / "1best_recog" / "text")
    for utt, seconds in SECONDS.items():
        pieces = [line for line in lines if line["utt"] == utt]
        given = [0.1 * n for n in range(1, round(10 * seconds) + 1)]
        assert [p["given_seconds"] for p in pieces] == pytest.approx([*given, seconds])
        assert all(p["compute_seconds"] > 0 for p in pieces)
        stable = ""
        for piece in pieces[:-1]:
            assert piece["stable"].startswith(stable) and piece["ended"] == []
            stable = piece["stable"]
        assert stable and final[utt].startswith(stable.rstrip())
        assert (pieces[-1]["stable"], pieces[-1]["tail"]) == ("", "")
        (ended,) = pieces[-1]["ended"]
        assert ended["text"].rstrip() == final[utt].rstrip() and ended["begin_seconds"] == 0
        assert ended["end_seconds"] == pytest.approx(seconds, abs=1e-3)
    summary = json.loads((out / "rtf.json").read_text())
    used = summary["encoder_seconds"] + summary["search_seconds"]
    assert used == pytest.approx(sum(line["compute_seconds"] for line in lines), abs=0.01)
    assert summary["audio_seconds"] == pytest.approx(sum(SECONDS.values()))


def test_one_piece_by_default(run):
    out = run("ctc", "--beam_size", "2")
    assert len(lines_of(out / "streaming.jsonl")) == 2 * len(SECONDS)  # and the end of each


def test_endpoints(run):
    rules = ["--endpoint", "true", "--rule3_min_utterance_length", "0.4"]
    out = run("factorized", "--beam_size", "2", *rules, "--sim_chunk_length", "4000")
    lines = lines_of(out / "streaming.jsonl")
    ended = [e for line in lines if line["utt"] == "utt-c" for e in line["ended"]]
    assert len(ended) == 4
    assert ended[1]["begin_seconds"] == pytest.approx(ended[0]["end_seconds"])
    text = read_scp(out / "1best_recog" / "text")["utt-c"]
    assert text.split() == [word for e in ended for word in e["text"].split()]
    with pytest.raises(UserError, match="--nbest 2 with --endpoint true"):
        run("factorized", *rules, "--nbest", "2")
    with pytest.raises(UserError, match="must be above 0"):
        run("factorized", "--endpoint", "true", "--rule1_min_trailing_silence", "0")


@pytest.mark.parametrize(
    "option, value",
    [
        ("--rule1_min_trailing_silence", "0.1"),
        ("--rule2_min_trailing_silence", "0.05"),
        ("--min_segment_length", "0.5"),
    ],
)
def test_every_rule_has_an_effect(run, monkeypatch, option, value):
    rules = []
    original = decode_streaming.StreamingRecognizer

    def keep(recognizer, found):
        rules.append(found)
        return original(recognizer, found)

    monkeypatch.setattr(decode_streaming, "StreamingRecognizer", keep)
    run("ctc", "--beam_size", "1", "--endpoint", "true")
    run("ctc", "--beam_size", "1", "--endpoint", "true", option, value)
    run("ctc", "--beam_size", "1", option, value)
    assert rules[0] != rules[1] and len(rules[1]) == 3 and rules[2] == ()


def test_external_lm(run, files):
    lm = ["--lm_weight", "0.5", *files["lm"].lm_options()]
    options = ["--beam_size", "4", "--dtype", "float64", "--sim_chunk_length", "3000"]
    fused = lines_of(run("transducer", *options, *lm) / "nbest.jsonl")
    whole = lines_of(run("transducer", *options[:4], *lm, command=asr_inference) / "nbest.jsonl")
    for one, other in zip(fused, whole):
        assert one["external_lm"] == pytest.approx(other["external_lm"], abs=1e-4)
        assert one["external_lm"] < 0


def test_streams_that_cannot_be_decoded_are_empty(run, files, tmp_path, caplog):
    lines = files["wav"].read_text()
    soundfile.write(tmp_path / "two.wav", np.zeros((4000, 2)), RATE)
    soundfile.write(tmp_path / "short.wav", np.zeros(80), RATE)
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), RATE)
    for name in ("two", "short", "silence", "missing"):
        lines += f"{name} {tmp_path}/{name}.wav\n"
    (tmp_path / "wav.scp").write_text(lines)
    out = run("transducer", "--beam_size", "2", wav=tmp_path / "wav.scp")
    text = read_scp(out / "1best_recog" / "text")
    assert list(text) == [*SECONDS, "two", "short", "silence", "missing"]
    assert text["two"] == text["short"] == text["missing"] == ""
    failed = json.loads((out / "rtf.json").read_text())["failed"]
    assert list(failed) == ["two", "missing"]  # a stream may be closed at once
    assert "one channel" in failed["two"]
    assert "two has the shape (4000, 2)" in caplog.text


def test_a_killed_run_goes_on(run, monkeypatch):
    expected = run("ctc", "--beam_size", "2", "--sim_chunk_length", "2000")
    before = {n: (expected / n).read_text() for n in ("nbest.jsonl", "1best_recog/text")}
    pieces = len(lines_of(expected / "streaming.jsonl"))
    original, calls = decode_streaming.simulate, []

    def killed(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(decode_streaming, "simulate", killed)
        with pytest.raises(KeyboardInterrupt):
            run("ctc", "--beam_size", "2", "--sim_chunk_length", "2000")
    assert not (expected / "streaming.jsonl").exists()
    calls.clear()
    out = run("ctc", "--beam_size", "2", "--sim_chunk_length", "2000")
    assert {n: (out / n).read_text() for n in before} == before
    assert len(lines_of(out / "streaming.jsonl")) == pieces


def test_models_that_cannot_stream_are_refused(run):
    with pytest.raises(UserError, match="TransformerEncoder.*emformer, streaming_conformer"):
        run("offline")
    with pytest.raises(UserError, match="chunk_ms 80 is given"):
        run("offline", "--chunk_ms", "80", command=asr_inference)
    with pytest.raises(UserError, match="give chunk_ms"):
        run("ctc", "--chunk_ms", "inf")


@pytest.mark.parametrize("command", [asr_inference_streaming, streaming_report])
def test_a_speech_llm_is_refused(files, run, monkeypatch, command, tmp_path):
    monkeypatch.setattr(decode, "load_asr", lambda *_, **__: SimpleNamespace(is_speech_llm=True))
    with pytest.raises(UserError, match="cannot stream: decode it with .*asr_inference"):
        if command is asr_inference_streaming:
            run("ctc")
        (tmp_path / "text").touch()
        data = ["--data_path_and_name_and_type", f"{files['wav']},speech,sound"]
        text = ["--text", str(tmp_path / "text"), "--output_dir", str(tmp_path)]
        command.main([*files["ctc"].asr_options(), *data, *text])


REFUSED = {
    "maxlenratio": "0.5",
    "minlenratio": "0.1",
    "word_lm_train_config": "x.yaml",
    "word_lm_file": "x.pth",
    "disable_repetition_detection": "true",
    "encoded_feat_length_limit": "100",
    "decoder_text_length_limit": "100",
    "allow_variable_data_keys": "true",
    "batch_size": "2",
    "ngpu": "2",
    "dtype": "float16",
    "ctc_weight": "0.3",
    "lm_file": "x.pth",
}


def test_every_option_of_espnet_is_honoured_or_refused():
    honoured = {
        *("help", "config", "log_level", "output_dir", "seed", "num_workers", "key_file"),
        *("data_path_and_name_and_type", "asr_train_config", "asr_model_file", "lm_train_config"),
        *("nbest", "beam_size", "penalty", "lm_weight", "token_type", "bpemodel"),
        *("normalize_length", "sim_chunk_length"),
    }
    assert {a.dest for a in espnet_streaming_parser()._actions} == honoured | set(REFUSED)


@pytest.mark.parametrize("name", [*REFUSED, "sim_chunk_length"])
def test_options_without_meaning_are_refused(run, name):
    with pytest.raises(UserError, match=f"--{name}"):
        run("transducer", f"--{name}", REFUSED.get(name, "-1"))


def test_alpha_of_a_model_without_lm_is_refused(run):
    with pytest.raises(UserError, match="alpha and beta"):
        run("transducer", "--alpha", "0.3")
