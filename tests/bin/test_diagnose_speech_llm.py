"""The page of a speech LLM: decoded, scored and measured as the recipes do, on tiny models."""

import json
import re
from pathlib import Path

import pytest

from espnet_llm_plugin.bin import asr_inference, diagnose, evaluate_audio_use, score
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.evaluate import SCORES
from espnet_llm_plugin.scoring.training_log import Epoch
from tests.bin.test_diagnose import EPOCH
from tests.inference.tiny_asr import TOKENS, make_audio, make_speech_llm, read_scp
from tests.llm.tiny import save_adapted_dir

SECONDS = {"utt-a": 0.5, "utt-b": 0.9, "utt-c": 0.6}
DATA = "--data_path_and_name_and_type"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experiment")
    llm = save_adapted_dir(directory / "llm", TOKENS, seed=3)
    model = make_speech_llm(directory / "speech_llm", llm)
    wav, text = make_audio(directory / "wav", SECONDS), directory / "text"
    speech = (DATA, f"{wav},speech,sound")
    made = {"log": directory / "train.log"}
    epochs = [EPOCH.format(n=n, train=9 - n, valid=8 - n) for n in (1, 2)]
    rates = "loss={valid}, wer_llm=60.1, wer_llm_prefix_rnnt=20.2"
    epochs[1] = epochs[1].replace("loss=6", rates.format(valid=6))
    made["log"].write_text("".join(epochs))
    decodings = {
        "alone": ("0", "2", "--penalty", "6"),
        "joint": ("0.4", "2"),
        "wider": ("0.4", "6"),
    }
    best = {}
    for name, (weight, beam, *more) in decodings.items():
        made[name] = str(directory / f"decode_{name}" / "dev")
        options = ["--ctc_weight", weight, "--beam_size", beam, "--nbest", "2", *more]
        output = ("--output_dir", f"{made[name]}/logdir/output.1")
        asr_inference.main([*model.asr_options(), *speech, *output, *options])
        best[name] = Path(made[name], "logdir/output.1/1best_recog")
    # random models recognise nothing; of what they said some is made right
    said = [read_scp(best[name] / "text") for name in ("joint", "wider", "wider")]
    lines = [f"{utt} a {words[utt]} b\n" for utt, words in zip(SECONDS, said)]
    text.write_text("".join(lines))
    for name in decodings:
        hyp = ("--hyp", str(best[name] / "text"), "--output_dir", made[name])
        score.main(["--ref", str(text), *hyp])
    made["ids_joint"] = str(best["joint"] / "token_int")
    options = ["--output_dir", str(directory / "decode_joint/audio_use"), "--num_workers", "0"]
    options += [*speech, DATA, f"{text},text,text", "--token_int", made["ids_joint"]]
    evaluate_audio_use.main([*model.asr_options(), *options])
    made["audio_use"] = str(directory / "decode_joint/audio_use/audio_use.json")
    return made


def run(out, *options):
    diagnose.main(["--output_dir", str(out), "--resamples", "200", *options])
    return json.loads((Path(out) / "diagnosis.json").read_text())


def test_everything_is_on_the_page(files, capsys):
    out = Path(files["joint"]).parent
    found = run(
        *(out, "--scored", files["joint"], "--audio_use", files["audio_use"]),
        *("--alone", files["alone"], "--wider", files["wider"], "--train_log", str(files["log"])),
    )
    said, page = capsys.readouterr().out, (out / "diagnosis.md").read_text()
    assert len(found["findings"]) == 13
    assert "Greedy WER 60.1 by the LLM, 20.2 by llm_prefix_rnnt. The prefix has the text" in page
    for one in found["findings"]:
        assert one["statement"].replace("|", "\\|") in page and one["signature"] in said
    unknown = {f["signature"] for f in found["findings"] if f["verdict"] == "not measured"}
    assert unknown == {
        "hypotheses without support in the audio",  # by a random CTC layer
        "insertions in few utterances",  # three utterances
        "deletions grow with length",
        "tuning ends at the edge of the grid",
    }
    evidence = found["evidence"]
    assert evidence["audio"] == json.loads(Path(files["audio_use"]).read_text())
    assert evidence["epochs"] == [list(Epoch(n, 9.0 - n, 8.0 - n)) for n in (1, 2)]
    rates = {}
    for name in ("alone", "joint", "wider"):
        scores = json.loads(Path(files[name], SCORES).read_text())
        rates[name] = scores["wer"]["rate"]
        counts = [scores["wer"][kind] for kind in ("insertions", "deletions", "substitutions")]
        row = "|".join(f"{100 * n / scores['wer']['words']:.2f}" for n in counts)
        assert name == "wider" or f"|{rates[name]:.2f}|{row}|" in page
    assert evidence["joint"]["first"] == pytest.approx(rates["alone"]) != rates["joint"]
    assert evidence["joint"]["second"] == pytest.approx(rates["joint"])
    assert evidence["wider"]["second"] == pytest.approx(rates["wider"])
    signs = evidence["hallucination"]
    assert (
        signs
        == json.loads(Path(files["joint"], SCORES).read_text())["diagnostics"]["hallucination"]
    )
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert page.count("![") == 2 and "(audio_use/similarity.png)" in page
    assert "P(blank)" not in page and "blank" not in said


@pytest.mark.parametrize("option", ["audio_use", "alone", "wider"])
def test_each_part_by_itself(files, tmp_path, option):
    found = run(tmp_path, "--scored", files["joint"], f"--{option}", files[option])
    verdicts = {f["signature"]: f["verdict"] for f in found["findings"]}
    measured = {
        "audio_use": "LLM ignores the audio",
        "alone": "joint decoding hides the LLM's errors",
        "wider": "collapse at a large beam",
    }
    for name, signature in measured.items():
        assert (verdicts[signature] == "not measured") == (name != option)
    assert verdicts["loops"] != "not measured"


def test_directories_of_an_earlier_version(files, tmp_path):
    scores = json.loads(Path(files["joint"], SCORES).read_text())
    del scores["diagnostics"]["hallucination"]
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / SCORES).write_text(json.dumps(scores))
    found = run(tmp_path, "--scored", str(tmp_path / "dev"), "--audio_use", files["audio_use"])
    (loops,) = (f for f in found["findings"] if f["signature"] == "loops")
    assert loops["verdict"] == "not measured" and "bin/score again" in loops["statement"]
    assert "## Hallucination" not in (tmp_path / "diagnosis.md").read_text()


def test_bad_input_is_named(files, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--weak is about the predictor of a transducer"):
        run(out, "--scored", files["joint"], "--alone", files["alone"], "--weak", files["alone"])
    with pytest.raises(UserError, match="none.json: no such file"):
        run(out, "--scored", files["joint"], "--audio_use", "none.json")
    with pytest.raises(UserError, match="nowhere/scores.json: no such file"):
        run(out, "--scored", files["joint"], "--alone", "nowhere")
    assert not out.exists()
