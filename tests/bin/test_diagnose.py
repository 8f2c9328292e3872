"""The page of an experiment: from decoding and scoring of tiny models, and from made files."""

import json
from pathlib import Path

import pytest

from espnet_llm_plugin.bin import asr_inference, diagnose, evaluate_nll, score, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.training_log import Epoch, read_epochs
from tests.inference.tiny_asr import make_asr, make_audio

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.4}
TEXT = {"utt-a": "ab c", "utt-b": "d a b d", "utt-c": "c"}
EPOCH = (
    "[vm] 2026-11-20 (trainer:394) INFO: {n}epoch results: [train] iter_time=0.003, "
    "loss_transducer={train}, nll_per_label=1.9, loss={train}, backward_time=0.09, "
    "[valid] loss_transducer={valid}, loss={valid}, time=2 seconds, [att_plot] time=0.3 seconds\n"
)


def scored(files, directory, kind, *options):
    """Decode and score as the recipe does; returns the scored directory."""
    asr_inference.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(directory / "logdir" / "output.1"), *options),
        ]
    )
    hyp = directory / "logdir" / "output.1" / "1best_recog" / "text"
    score.main(["--ref", str(files["text"]), "--hyp", str(hyp), "--output_dir", str(directory)])
    return str(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experiment")
    made = {kind: make_asr(directory / kind, kind) for kind in ("ctc", "transducer", "factorized")}
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("".join(f"{utt} {line}\n" for utt, line in TEXT.items()))
    speech, text = f"{made['wav']},speech,sound", f"{made['text']},text,text"
    for kind in ("ctc", "transducer", "factorized"):
        data = ["--data_path_and_name_and_type", speech, "--data_path_and_name_and_type", text]
        out = ["--output_dir", str(directory / f"nll_{kind}"), "--num_workers", "0"]
        evaluate_nll.main([*made[kind].asr_options(), *data, *out])
        made[f"nll_{kind}"] = str(directory / f"nll_{kind}" / "nll.json")
    tune_scales.main(
        [
            *made["factorized"].asr_options(),
            *("--data_path_and_name_and_type", speech, "--text", str(made["text"])),
            *("--output_dir", str(directory / "tune"), "--label_bonuses", "0", "1", "2"),
        ]
    )
    made["scales"] = str(directory / "tune" / "scales.json")
    made["log"] = directory / "train.log"
    lines = [EPOCH.format(n=n, train=9 - n, valid=8 - n) for n in (1, 2, 3)]
    made["log"].write_text("other line, loss=1\n" + "".join(lines))
    lists = ["--nbest", "4", "--beam_size", "4"]
    made["dev"] = scored(files=made, directory=directory / "decode/dev", kind="factorized")
    made["test"] = scored(made, directory / "decode/test", "factorized", *lists)
    made["weak"] = scored(made, directory / "weak/test", "factorized", "--alpha", "0.1")
    return made


def run(out, *options):
    diagnose.main(["--output_dir", str(out), "--resamples", "200", *options])
    return json.loads((out / "diagnosis.json").read_text())


def test_everything_that_is_measured_is_on_the_page(files, tmp_path, capsys):
    found = run(
        *(tmp_path, "--scored", files["test"], files["dev"], "--nll", files["nll_factorized"]),
        *("--scales", files["scales"], "--train_log", str(files["log"])),
        *("--weak", files["weak"], "--untuned", files["weak"]),
        *("--weak_nll", files["nll_transducer"]),
    )
    said = capsys.readouterr().out
    page = (tmp_path / "diagnosis.md").read_text()
    verdicts = {one["signature"]: one["verdict"] for one in found["findings"]}
    assert len(verdicts) == 9 and "![" in page
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    for one in found["findings"]:
        cells = [one[name].replace("|", "\\|") for name in ("statement", "rule")]
        assert all(cell in page for cell in cells) and one["signature"] in said
        assert one["verdict"] in ("shows", "does not show", "not measured")
    unknown = [name for name, verdict in verdicts.items() if verdict == "not measured"]
    assert unknown == ["deletions grow with length", "vocabulary adaptation mismatch"]
    evidence = found["evidence"]
    nll = json.loads(Path(files["nll_factorized"]).read_text())
    assert evidence["nll_per_label"] == nll["nll_per_label"]
    assert evidence["blank_at_labels"] == nll["alignment"]["blank_at_labels"]
    assert 0 < evidence["blank_at_labels"] < 1
    assert evidence["word_perplexity"] == nll["internal_lm"]["word_perplexity"] > 1
    scores = json.loads(Path(files["test"], "scores.json").read_text())
    assert evidence["length_ratio"] == scores["diagnostics"]["length_ratio"]
    # sclite's alignments may have more errors than Levenshtein's
    assert evidence["nbest"]["oracle"][0] == pytest.approx(
        100 * scores["wer"]["jiwer"]["errors"] / scores["wer"]["words"]
    )
    assert evidence["tuned"]["second"] == pytest.approx(scores["wer"]["rate"])
    dev = found["sets"][files["dev"]]
    assert len(dev["nbest"]["oracle"]) == 1  # decoded without --nbest


def test_a_model_trained_after_the_swap(files, tmp_path):
    """Weak LM, strong LM untuned and tuned, and the trained model, side by side."""
    swapped = str(tmp_path / "swapped/test")  # without an error
    reference = str(files["text"])
    score.main(["--ref", reference, "--hyp", reference, "--output_dir", swapped])
    weak = ["--weak", files["weak"], "--untuned", files["dev"]]
    evidence = run(tmp_path, "--scored", files["test"], *weak, "--swapped", swapped)["evidence"]
    steps = {name: Path(files[name], "scores.json") for name in ("weak", "dev", "test")}
    steps["swapped"] = Path(swapped, "scores.json")
    rates = {name: json.loads(path.read_text())["wer"]["rate"] for name, path in steps.items()}
    assert rates["swapped"] != rates["test"]
    pairs = {"untuned": ("weak", "dev"), "tuned": ("weak", "swapped")}
    for name, pair in {**pairs, "trained": ("swapped", "test")}.items():
        found = (evidence[name]["first"], evidence[name]["second"])
        assert found == pytest.approx([rates[one] for one in pair])
    page = (tmp_path / "diagnosis.md").read_text()
    assert f"|strong LM, trained further|{rates['test']:.2f}|" in page


@pytest.mark.parametrize("kind", ["ctc", "transducer"])
def test_models_without_predictor_lm(files, tmp_path, kind):
    directory = scored(files, tmp_path / "decode" / "test", kind, "--nbest", "3")
    found = run(tmp_path, "--scored", directory, "--nll", files[f"nll_{kind}"])
    evidence = found["evidence"]
    assert (evidence["blank_at_labels"] is None) == (kind == "ctc")
    assert (evidence["word_perplexity"] is None) == (kind == "ctc")
    assert evidence["nbest"]["effective"] > 1


def test_without_lists_and_anything_else(files, tmp_path):
    score.main(
        [
            *("--ref", str(files["text"]), "--hyp", str(files["text"])),
            *("--output_dir", str(tmp_path / "decode" / "test")),
        ]
    )
    found = run(tmp_path, "--scored", str(tmp_path / "decode" / "test"))
    assert found["evidence"]["nbest"] is None
    assert "None of the failure signatures shows" in (tmp_path / "diagnosis.md").read_text()


def test_vocabulary_report(files, tmp_path):
    report = tmp_path / "vocabulary_report.json"
    report.write_text('{"word_perplexity_before": 1.0}')
    nll = ["--nll", files["nll_factorized"], "--vocabulary_report", str(report)]
    found = run(tmp_path, "--scored", files["test"], *nll)
    verdicts = {one["signature"]: one["verdict"] for one in found["findings"]}
    assert verdicts["vocabulary adaptation mismatch"] == "shows"


def test_losses_of_a_log(tmp_path):
    log = tmp_path / "train.log"
    lines = [(1, 5.0, 6.0), (2, 4.0, 5.0), (2, 3.5, 4.5), (3, "nan", 4.0)]
    log.write_text("".join(EPOCH.format(n=n, train=t, valid=v) for n, t, v in lines))
    epochs = read_epochs(log)
    assert epochs[:2] == [Epoch(1, 5.0, 6.0), Epoch(2, 3.5, 4.5)]
    assert epochs[2].number == 3 and epochs[2].train != epochs[2].train


def test_bad_input_is_named(files, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nowhere/scores.json: no such file; score nowhere first"):
        run(out, "--scored", "nowhere")
    with pytest.raises(UserError, match="no.json: no such file"):
        run(out, "--scored", files["test"], "--nll", "no.json")
    with pytest.raises(UserError, match="train_log no.log: no such file"):
        run(out, "--scored", files["test"], "--train_log", "no.log")
    for option in ("--untuned", "--swapped"):
        with pytest.raises(UserError, match=f"the {option[2:]} system .* give --weak too"):
            run(out, "--scored", files["test"], option, files["weak"])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="broken.json is not a JSON file"):
        run(out, "--scored", files["test"], "--nll", str(broken))
    assert not out.exists()
