"""The decoding command line: ESPnet's layout and options, failures, resuming."""

import argparse
import json

import numpy as np
import pytest
import soundfile
import torch
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference import decode as decode_module
from espnet_llm_plugin.inference.options import espnet_parser, identity
from tests.inference.tiny_asr import (
    KINDS,
    RATE,
    TOKENS,
    make_asr,
    make_audio,
    make_lm,
    read_scp,
)
from tests.llm.tiny import save_adapted_dir

SECONDS = {"utt-b": 0.9, "utt-a": 0.5, "utt-c": 1.3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in (*KINDS, "attention")}
    made["lm"] = make_lm(directory / "lm", "seq_rnn")
    made["wav"] = make_audio(directory / "wav", SECONDS)
    return made


@pytest.fixture
def run(files, tmp_path):
    """Decode into ``tmp_path/out``; returns the directory."""

    def decode(kind, *options, wav=None, out="out"):
        asr_inference.main(
            [
                *files[kind].asr_options(),
                "--data_path_and_name_and_type",
                f"{wav or files['wav']},speech,sound",
                "--output_dir",
                str(tmp_path / out),
                "--num_workers",
                "0",
                *options,
            ]
        )
        return tmp_path / out

    return decode


def nbest_of(directory):
    lines = (directory / "nbest.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_espnet_and_more(run, kind):
    out = run(kind, "--beam_size", "4", "--nbest", "2")
    for n in (1, 2):
        for name in ("token", "token_int", "score", "text"):
            assert list(read_scp(out / f"{n}best_recog" / name)) == list(SECONDS)
    assert not (out / "3best_recog").exists()
    tokens = read_scp(out / "1best_recog" / "token")
    assert all(tokens.values()), "empty hypotheses test nothing"
    text = read_scp(out / "1best_recog" / "text")
    for utt, line in tokens.items():
        assert text[utt] == line.replace(" ", "").replace("<space>", " ")
    entries = nbest_of(out)
    assert [(e["utt"], e["rank"]) for e in entries] == [(u, n) for u in SECONDS for n in (1, 2)]
    for entry in entries:
        parts = entry["acoustic"] + entry["lm"] + entry["external_lm"] + entry["bonus"]
        assert parts == pytest.approx(entry["total"], abs=1e-6)
        assert len(entry["frames"]) == len(entry["token_int"].split())
        score = read_scp(out / f"{entry['rank']}best_recog" / "score")[entry["utt"]]
        assert float(score) == entry["total"]
    summary = json.loads((out / "rtf.json").read_text())
    assert summary["audio_seconds"] == pytest.approx(sum(SECONDS.values()), abs=1e-3)
    assert summary["rtf"] == pytest.approx(
        (summary["encoder_seconds"] + summary["search_seconds"]) / summary["audio_seconds"],
        rel=0.05,
    )
    assert summary["cpu_rtf"] == pytest.approx(
        summary["cpu_seconds"] / summary["audio_seconds"], rel=0.05
    )
    assert summary["failed"] == {} and summary["utterances"] == 3


@pytest.mark.parametrize("kind", ["transducer", "factorized"])
def test_greedy_equals_the_greedy_search_of_espnet(run, kind):
    """ESPnet's emits one label a frame; alpha, beta and the bonus are in decoder_conf."""
    ours = run(kind, "--beam_size", "1", "--max_symbols_per_frame", "1")
    theirs = run(kind, "--beam_size", "1", "--search", "espnet", out="espnet")
    for name in ("text", "token", "token_int"):
        expected = read_scp(theirs / "1best_recog" / name)
        assert read_scp(ours / "1best_recog" / name) == expected
        assert len(set(expected.values())) > 1
    assert {p.name for p in (theirs / "1best_recog").iterdir()} == {
        p.name for p in (ours / "1best_recog").iterdir()
    }


def test_ctc_greedy_is_the_best_path(run, files):
    out = run("ctc", "--beam_size", "1")
    from espnet2.tasks.asr import ASRTask

    model, _ = ASRTask.build_model_from_file(str(files["ctc"].config), str(files["ctc"].model))
    for utt, ids in read_scp(out / "1best_recog" / "token_int").items():
        speech, _ = soundfile.read(files["wav"].parent / f"{utt}.wav", dtype="float32")
        with torch.no_grad():
            lengths = torch.tensor([len(speech)])
            encoded, _ = model.eval().encode(torch.tensor(speech)[None], lengths)
            path = model.ctc.argmax(encoded)[0].unique_consecutive().tolist()
        assert ids.split() == [str(token) for token in path if token != 0]


@pytest.mark.parametrize("kind", KINDS)
def test_external_lm_changes_scores_by_its_weight(run, files, kind):
    out = run(kind, "--beam_size", "4")
    plain, use = nbest_of(out), json.loads((out / "rtf.json").read_text())
    assert use["lm_calls"] == use["lm_tokens"] == 0
    out = run(kind, "--beam_size", "4", "--lm_weight", "0.5", *files["lm"].lm_options())
    fused, use = nbest_of(out), json.loads((out / "rtf.json").read_text())
    assert use["lm_tokens"] >= use["lm_calls"] > 0
    assert all(entry["external_lm"] == 0 for entry in plain)
    assert all(entry["external_lm"] < 0 for entry in fused)
    # ESPnet's default for --lm_weight without an LM is 1: it must not matter
    assert [e["total"] for e in plain] != [e["total"] for e in fused]


def test_scales_of_the_command_line_win_over_the_models(run):
    default = nbest_of(run("factorized", "--beam_size", "4"))
    same = nbest_of(
        run("factorized", "--beam_size", "4", "--alpha", "0.7", "--beta", "0.1", "--penalty", "0.3")
    )
    assert same == default
    for option in ("--alpha", "--beta", "--label_bonus"):
        changed = nbest_of(run("factorized", "--beam_size", "4", option, "0.45"))
        assert [e["total"] for e in changed] != [e["total"] for e in default]


def test_config_files_in_order_then_the_command_line(run, tmp_path):
    (tmp_path / "first.yaml").write_text("beam_size: 4\nnbest: 3\nlabel_bonus: 0.2\n")
    (tmp_path / "best.yaml").write_text("label_bonus: 0.9\nalpha: 0.5\n")
    configs = ["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "best.yaml")]
    out = run("factorized", *configs, "--nbest", "2")
    assert (out / "2best_recog").is_dir() and not (out / "3best_recog").exists()
    for entry in nbest_of(out):
        assert entry["bonus"] == pytest.approx(0.9 * len(entry["frames"]))


def test_labels_a_frame_and_length_normalization(run):
    one = nbest_of(run("transducer", "--beam_size", "4", "--max_symbols_per_frame", "1"))
    assert all(len(set(entry["frames"])) == len(entry["frames"]) for entry in one)
    two = nbest_of(run("transducer", "--beam_size", "4"))
    assert any(len(set(entry["frames"])) < len(entry["frames"]) for entry in two)
    options = ["--beam_size", "8", "--nbest", "8", "--normalize_length", "true"]
    ranked = nbest_of(run("transducer", *options))
    for utt in SECONDS:
        scores = [e["total"] / (len(e["frames"]) + 1) for e in ranked if e["utt"] == utt]
        assert scores == sorted(scores, reverse=True)


def test_swapping_in_the_same_predictor_changes_nothing(run, files):
    plain = nbest_of(run("factorized", "--beam_size", "4"))
    swap = ["--predictor", "stateless", "--predictor_conf", "embed_dim=12"]
    swap += ["--predictor_file", str(files["factorized"].model)]
    assert nbest_of(run("factorized", "--beam_size", "4", *swap)) == plain


def test_key_file_selects_and_orders(run, tmp_path):
    (tmp_path / "keys").write_text("utt-c\nutt-b whatever\n")
    out = run("ctc", "--beam_size", "1", "--key_file", str(tmp_path / "keys"))
    assert list(read_scp(out / "1best_recog" / "text")) == ["utt-c", "utt-b"]


@pytest.fixture
def bad_wav(tmp_path):
    """Good, too short, empty, NaN, another rate, no audio at all, good."""
    scp = make_audio(tmp_path / "bad", {"a-good": 0.6, "b-short": 0.02, "z-good": 0.6})
    cases = {
        "c-empty": (np.zeros(0), RATE),
        "d-nan": (np.full(8000, np.nan), RATE),
        "e-rate": (np.zeros(4000) + 0.1, 8000),
    }
    lines = scp.read_text().splitlines()
    for utt, (samples, rate) in cases.items():
        soundfile.write(scp.parent / f"{utt}.wav", samples, rate, subtype="FLOAT")
        lines.insert(-1, f"{utt} {scp.parent / utt}.wav")
    (scp.parent / "f.wav").write_text("this is not audio")
    lines.insert(-1, f"f-text {scp.parent}/f.wav")
    lines.insert(-1, f"g-missing {scp.parent}/none.wav")
    scp.write_text("\n".join(lines) + "\n")
    return scp


def test_bad_utterances_are_reported_and_the_others_decoded(run, bad_wav, caplog):
    with caplog.at_level("WARNING"):
        out = run("factorized", "--beam_size", "2", wav=bad_wav)
    text = read_scp(out / "1best_recog" / "text")
    assert [utt for utt, line in text.items() if line] == ["a-good", "z-good"]
    failed = json.loads((out / "rtf.json").read_text())["failed"]
    assert list(failed) == ["b-short", "c-empty", "d-nan", "e-rate", "f-text", "g-missing"]
    assert "8000" in failed["e-rate"] and "no samples" in failed["c-empty"]
    assert all(utt in caplog.text for utt in failed)
    assert "6 of 8 utterances failed" in caplog.text


def test_nothing_decoded_is_an_error(run, bad_wav):
    bad_wav.write_text("\n".join(bad_wav.read_text().splitlines()[1:-1]) + "\n")
    with pytest.raises(UserError, match="not one utterance.*b-short"):
        run("factorized", wav=bad_wav)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_utterance_longer_than_the_llms_context_is_decoded(run, tmp_path, caplog, family):
    """The LLM goes on with the last part of the text; said once, not for every utterance."""
    limit = dict(n_positions=8) if family == "gpt2" else dict(max_position_embeddings=8)
    llm = save_adapted_dir(tmp_path / "llm", TOKENS, family, **limit)
    wav = make_audio(tmp_path / "wav", {"long": 3.0, "short": 0.1, "longer": 4.0})
    swap = ["--predictor", "llm", "--predictor_conf", f"llm={llm}", "--beam_size", "2"]
    out = run("factorized", *swap, "--label_bonus", "1", wav=wav)
    summary = json.loads((out / "rtf.json").read_text())
    assert summary["failed"] == {} and summary["lm_tokens"] > summary["lm_calls"] > 0
    lengths = {e["utt"]: len(e["token_int"].split()) for e in nbest_of(out)}
    assert lengths["short"] > 0 and min(lengths["long"], lengths["longer"]) > 16
    assert caplog.text.count("fills the context") == 1


def test_an_error_without_a_message_is_reported_by_its_type(run, monkeypatch):
    def timed(recognizer, batch):
        raise RuntimeError

    monkeypatch.setattr(decode_module, "timed", timed)
    with pytest.raises(UserError, match="utt-b RuntimeError"):
        run("factorized")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_single_utterances_give(run, kind):
    options = ("--beam_size", "4", "--nbest", "2")
    alone = nbest_of(run(kind, *options))
    together = nbest_of(run(kind, *options, "--batch_size", "2", out="batch"))
    for one, other in zip(alone, together, strict=True):
        for name in ("utt", "rank", "text", "token_int", "frames"):
            assert one[name] == other[name]
        assert one["total"] == pytest.approx(other["total"], abs=1e-3)


def test_one_bad_utterance_does_not_cost_its_batch(run, files, tmp_path):
    """Too short for the encoder alone, which padding hides."""
    soundfile.write(tmp_path / "short.wav", np.zeros(90, dtype="float32"), RATE)
    wav = tmp_path / "wav.scp"
    wav.write_text(files["wav"].read_text() + f"utt-d {tmp_path}/short.wav\n")
    out = run("factorized", "--batch_size", "4", wav=wav)
    failed = json.loads((out / "rtf.json").read_text())["failed"]
    assert list(failed) == ["utt-d"]
    text = read_scp(out / "1best_recog" / "text")
    assert text.pop("utt-d") == ""
    assert text == read_scp(run("factorized", out="whole") / "1best_recog" / "text")


def test_blank_scale_and_internal_lm_weight_change_the_scores(run):
    for kind in ("factorized", "transducer"):
        plain = nbest_of(run(kind, "--beam_size", "4"))
        scaled = nbest_of(run(kind, "--beam_size", "4", "--blank_scale", "0.5"))
        assert [e["blank"] for e in scaled] != [e["blank"] for e in plain]
        less = nbest_of(run(kind, "--beam_size", "4", "--ilm_weight", "0.3"))
        assert all(e["lm"] > p["lm"] for e, p in zip(less, plain))
    with pytest.raises(UserError, match="internal LM"):
        run("ctc", "--ilm_weight", "0.3")


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    whole = nbest_of(run("factorized", "--beam_size", "4", out="whole"))
    decoded = []
    original = decode_module.timed

    def timed(recognizer, batch):
        decoded.append(len(batch))
        if len(decoded) == 3:
            raise Killed
        return original(recognizer, batch)

    monkeypatch.setattr(decode_module, "timed", timed)
    with pytest.raises(Killed):
        run("factorized", "--beam_size", "4")
    out = tmp_path / "out"
    assert not (out / "1best_recog").exists() and not (out / "nbest.jsonl").exists()
    partial = out / ".partial.jsonl"
    partial.write_text(partial.read_text() + '{"utt": "utt-c", "nbe')  # cut by the kill
    run("factorized", "--beam_size", "4")
    assert len(decoded) == 4, "only the missing utterance is decoded again"
    assert nbest_of(out) == whole
    assert not partial.exists()
    summary = json.loads((out / "rtf.json").read_text())
    assert summary["audio_seconds"] == pytest.approx(sum(SECONDS.values()), abs=1e-3)


def test_a_killed_run_with_other_options_starts_again(run, tmp_path, monkeypatch):
    calls = []
    original = decode_module.timed

    def timed(recognizer, batch):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(recognizer, batch)

    monkeypatch.setattr(decode_module, "timed", timed)
    with pytest.raises(Killed):
        run("factorized", "--beam_size", "4")
    run("factorized", "--beam_size", "2")
    assert len(calls) == 3 + 3


def retrain(llm, tmp_path):
    """Another LLM under the same path."""
    other = save_adapted_dir(tmp_path / "other", TOKENS, seed=1)
    (other / "model.safetensors").rename(llm / "model.safetensors")


def test_a_killed_run_with_a_retrained_llm_starts_again(run, tmp_path, monkeypatch):
    llm = save_adapted_dir(tmp_path / "llm", TOKENS)
    swap = ["--predictor", "llm", "--predictor_conf", f"llm={llm}", "--beam_size", "2"]
    calls = []
    original = decode_module.timed

    def timed(recognizer, batch):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(recognizer, batch)

    monkeypatch.setattr(decode_module, "timed", timed)
    with pytest.raises(Killed):
        run("factorized", *swap)
    retrain(llm, tmp_path)
    run("factorized", *swap)
    assert len(calls) == 3 + 3


@pytest.mark.parametrize(
    "option, conf",
    [
        (
            "asr_train_config",
            {"decoder_conf": {"predictor": "llm", "predictor_conf": {"llm": "?"}}},
        ),
        ("lm_train_config", {"lm": "causal_llm", "lm_conf": {"llm": "?", "frozen": True}}),
    ],
)
def test_results_depend_on_the_llms_of_trained_models(tmp_path, option, conf):
    llm = save_adapted_dir(tmp_path / "llm", TOKENS)
    config = tmp_path / "config.yaml"
    text = yaml.safe_dump({**conf, "token_list": TOKENS})
    config.write_text(text.replace("'?'", str(llm)))
    args = argparse.Namespace(
        asr_train_config=None, lm_train_config=None, predictor=None, predictor_conf={}
    )
    setattr(args, option, str(config))
    before = identity(args, [])
    assert identity(args, []) == before
    retrain(llm, tmp_path)
    assert identity(args, []) != before


def test_results_of_an_earlier_run_do_not_stay(run):
    run("ctc", "--beam_size", "4", "--nbest", "4")
    out = run("ctc", "--beam_size", "4", "--nbest", "1")
    assert [p.name for p in out.glob("*best_recog")] == ["1best_recog"]


REFUSED = {
    "time_sync": "true",
    "maxlenratio": "0.5",
    "minlenratio": "0.1",
    "ngram_file": "x.arpa",
    "ngram_weight": "0.1",
    "word_lm_train_config": "x.yaml",
    "word_lm_file": "x.pth",
    "model_tag": "someone/model",
    "enh_s2t_task": "true",
    "multi_asr": "true",
    "quantize_asr_model": "true",
    "quantize_lm": "true",
    "quantize_modules": "LSTM",
    "quantize_dtype": "float16",
    "streaming": "true",
    "hugging_face_decoder": "true",
    "hugging_face_decoder_conf": "",
    "transducer_conf": "{search_type: tsd}",
    "lang_prompt_token": "x",
    "nlp_prompt_token": "x",
    "prompt_token_file": "x",
    "partial_ar": "true",
    "threshold_probability": "0.5",
    "max_seq_len": "3",
    "max_mask_parallel": "3",
    "allow_variable_data_keys": "true",
    "batch_size": "0",
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
        *("normalize_length", "batch_size"),
    }
    assert {action.dest for action in espnet_parser()._actions} == honoured | set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_meaning_are_refused(run, name, tmp_path):
    options = [f"--{name}", REFUSED[name]]
    if name == "hugging_face_decoder_conf":  # ESPnet can read it from a file only
        (tmp_path / "conf.yaml").write_text(f"{name}: {{num_beams: 2}}\n")
        options = ["--config", str(tmp_path / "conf.yaml")]
    with pytest.raises(UserError, match=f"--{name}"):
        run("transducer", *options)


@pytest.mark.parametrize(
    "options",
    ["--alpha 0.3", "--alpha 0", "--beta 0.3", "--beta -0.3", "--beta 0.3 --ilm_weight 0.3"],
)
def test_predictor_scales_of_a_model_without_predictor_lm_are_refused(run, options):
    """Not even where they would do what --ilm_weight does, or nothing with it."""
    for kind in ("transducer", "ctc"):
        with pytest.raises(UserError, match="alpha and beta"):
            run(kind, *options.split())


def test_the_internal_lm_of_a_model_without_predictor_lm_is_not_added(run):
    with pytest.raises(UserError, match="--ilm_weight -0.3: the internal LM is subtracted"):
        run("transducer", "--ilm_weight", "-0.3")


@pytest.mark.parametrize("kind", ["transducer", "ctc"])
@pytest.mark.parametrize(
    "option", ["--textlm_weight 0.1", "--length_norm 1.0", "--ctc_top_k 5", "--long_form ctc"]
)
def test_options_of_speech_llms_are_refused(run, kind, option):
    with pytest.raises(UserError, match=f"{option}: it belongs to the search of a speech_llm"):
        run(kind, *option.split())


def test_ctc_weight_of_a_ctc_model_may_be_one_only(run):
    run("ctc", "--beam_size", "1", "--ctc_weight", "1.0")
    with pytest.raises(UserError, match="--ctc_weight"):
        run("ctc", "--ctc_weight", "0.3")


def test_espnet_search_refuses_our_scales(run):
    with pytest.raises(UserError, match="--search espnet knows no --alpha"):
        run("factorized", "--search", "espnet", "--alpha", "0.5")


def test_attention_models_are_left_to_espnet(run):
    with pytest.raises(UserError, match="--search espnet"):
        run("attention")


def test_two_names_of_the_bonus_must_agree(run):
    with pytest.raises(UserError, match="--label_bonus"):
        run("transducer", "--penalty", "0.3", "--label_bonus", "0.4")


def test_bad_files_are_named(run, files, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(files["ctc"].model.read_bytes()[:2000])
    with pytest.raises(UserError, match="cut.pth"):
        run("ctc", "--asr_model_file", str(cut))
    with pytest.raises(UserError, match="none.pth: there is no such file"):
        run("ctc", "--asr_model_file", "none.pth")
    with pytest.raises(UserError, match="checkpoint of another model"):
        run("ctc", "--asr_model_file", str(files["lm"].model))
    with pytest.raises(UserError, match="cannot load"):
        run("factorized", "--asr_model_file", str(files["ctc"].model))
    text = tmp_path / "no.yaml"
    text.write_text("just: words\n")
    with pytest.raises(UserError, match="no.yaml is not the configuration of a training"):
        run("ctc", "--asr_train_config", str(text))
    with pytest.raises(UserError, match="no file .*none.scp"):
        run("ctc", wav=tmp_path / "none.scp")
    keys = tmp_path / "keys"
    keys.write_text("utt-a\nutt-x\n")
    with pytest.raises(UserError, match="utterance utt-x of .*keys is not in"):
        run("ctc", "--key_file", str(keys))
    keys.write_text("utt-a\nutt-a\n")
    with pytest.raises(UserError, match="keys: 1 problem.*\n.*duplicate id .*utt-a"):
        run("ctc", "--key_file", str(keys))
    keys.write_text("utt-a\n\nutt-b\n")
    with pytest.raises(UserError, match="keys:2 has 0, expected 1 or more"):
        run("ctc", "--key_file", str(keys))
    with pytest.raises(UserError, match="bpemodel"):
        run("ctc", "--token_type", "bpe")
    config = tmp_path / "decode.yaml"
    config.write_text(yaml.safe_dump({"beam_sise": 3}))
    with pytest.raises(UserError, match="decode.yaml: unknown option beam_sise"):
        run("ctc", "--config", str(config))


def test_lm_of_other_tokens_is_refused(run, tmp_path):
    lm = make_lm(tmp_path / "lm", "seq_rnn", ["<blank>", "<unk>", "b", "a", "<sos/eos>"])
    with pytest.raises(UserError, match="other tokens.*first difference at id 2"):
        run("transducer", *lm.lm_options())


@pytest.mark.parametrize("module", [asr_inference, tune_scales])
def test_mistakes_of_users_are_one_line_and_exit_code_2(module, monkeypatch, capsys, tmp_path):
    data = ["--data_path_and_name_and_type", "none.scp,speech,sound", "--text", str(tmp_path / "t")]
    (tmp_path / "t").write_text("utt a\n")
    if module is asr_inference:
        data = data[:2]
    monkeypatch.setattr("sys.argv", ["x", "--output_dir", str(tmp_path / "out"), *data])
    with pytest.raises(SystemExit) as exit_code:
        module.cli()
    assert exit_code.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out").exists()
