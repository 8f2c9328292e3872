"""Exact corpus likelihoods and their command line."""

import json
import math

import pytest
import torch
from espnet2.asr.espnet_model import ESPnetASRModel

from espnet_llm_plugin.bin import evaluate_nll
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.evaluate import corpus_nll
from tests.inference.tiny_asr import KINDS, make_asr, make_audio
from tests.transducer.tiny import batch, factorized, parts, rnnt

SPEECH_AND_TEXT = ("speech", "speech_lengths", "text", "text_lengths")


def ctc_model():
    torch.manual_seed(0)
    conf = dict(decoder=None, joint_network=None, ctc_weight=1.0)
    return ESPnetASRModel(**parts(), **conf, report_cer=False, report_wer=False)


def as_batches(*datas):
    for number, data in enumerate(datas):
        yield [f"{number}-{i}" for i in range(len(data[0]))], dict(zip(SPEECH_AND_TEXT, data))


@pytest.mark.parametrize("make", [rnnt, lambda: factorized(predictor="lstm")])
def test_sums_over_batches_are_exact(make):
    model = make()
    # nothing is skipped here: more labels than frames only cost likelihood
    first, second = batch(), batch(frames=(2, 3), labels=((1, 2, 3), ()), seed=1)
    report = corpus_nll(model, as_batches(first, second))
    with torch.no_grad():
        total = sum(float(model.utterance_nll(*data).sum()) for data in (first, second))
    assert report.total_nll == pytest.approx(total)
    assert (report.num_labels, report.num_utterances, report.num_impossible) == (9, 5, 0)
    assert report.nll_per_label == pytest.approx(total / 9)
    assert report.nll_per_utterance == pytest.approx(total / 5)
    assert not model.training


def test_ctc():
    model = ctc_model()
    data = batch(frames=(6, 4, 2), labels=((2, 3, 4), (1, 1), (5, 5)))  # 5 5 needs three frames
    report = corpus_nll(model, as_batches(data))
    total = 0.0
    for i in range(2):
        log_probs = model.ctc.log_softmax(model.encode(data[0][i : i + 1], data[1][i : i + 1])[0])
        frames, labels = int(data[1][i]), data[2][i, : data[3][i]]
        total -= brute_force_ctc(log_probs[0, :frames].double(), labels.tolist())
    assert report.total_nll == pytest.approx(total, abs=1e-4)
    assert (report.num_labels, report.num_utterances, report.num_impossible) == (5, 2, 1)


def brute_force_ctc(log_probs, labels):
    """Sum over all monotonic ways to be at a label or blank, by recursion over frames."""
    states = [0]
    for label in labels:
        states += [label, 0]
    alpha = {0: float(log_probs[0, 0])}
    if len(states) > 1:
        alpha[1] = float(log_probs[0, states[1]])
    for row in log_probs[1:]:
        new = {}
        for s, score in alpha.items():
            steps = [s, s + 1]
            if s + 2 < len(states) and states[s] != 0 and states[s + 2] != states[s]:
                steps.append(s + 2)
            for target in steps:
                if target < len(states):
                    value = score + float(row[states[target]])
                    old = new.get(target, -math.inf)
                    new[target] = max(old, value) + math.log1p(math.exp(-abs(old - value)))
        alpha = new
    last = [alpha.get(len(states) - k, -math.inf) for k in (1, 2)]
    return float(torch.tensor(last, dtype=torch.double).logsumexp(0))


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="0 utterances with 0 labels, and 0 that the model"):
        corpus_nll(rnnt(), [])
    with pytest.raises(UserError, match="cannot evaluate a Linear: expected model transducer"):
        corpus_nll(torch.nn.Linear(1, 1), [])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nll")
    made = {kind: make_asr(directory / kind, kind) for kind in KINDS}
    made["wav"] = make_audio(directory / "wav", {"utt-a": 0.9, "utt-b": 0.5, "utt-c": 0.7})
    (directory / "text").write_text("utt-a a b c\nutt-b d\nutt-c ab\n")
    (directory / "keys").write_text("utt-a\nutt-c\n")
    (directory / "rest").write_text("utt-b\n")
    made.update({name: directory / name for name in ("text", "keys", "rest")})
    return made


def run(files, kind, out, *options, text=None):
    evaluate_nll.main(
        [
            *files[kind].asr_options(),
            "--data_path_and_name_and_type",
            f"{files['wav']},speech,sound",
            "--data_path_and_name_and_type",
            f"{text or files['text']},text,text",
            "--num_workers",
            "0",
            "--output_dir",
            str(out),
            *options,
        ]
    )
    return json.loads((out / "nll.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_command_line(files, tmp_path, capsys, kind):
    report = run(files, kind, tmp_path)
    assert json.loads(capsys.readouterr().out) == report
    assert report["num_utterances"] == 3 and report["num_labels"] == 8  # with two spaces
    assert report["nll_per_label"] == pytest.approx(report["total_nll"] / 8)
    totals = []
    for name in ("keys", "rest"):
        part = run(files, kind, tmp_path / name, "--key_file", str(files[name]))
        totals.append(part["total_nll"])
    assert part["num_utterances"] == 1
    assert sum(totals) == pytest.approx(report["total_nll"])
    batched = run(files, kind, tmp_path / "batched", "--batch_size", "3")
    assert batched["num_utterances"] == 3 and batched["num_labels"] == 8


def test_command_line_bad_input(files, tmp_path):
    with pytest.raises(UserError, match="there is no file .*nowhere"):
        run(files, "ctc", tmp_path, text=tmp_path / "nowhere")
    assert not (tmp_path / "nll.json").exists()
    with pytest.raises(UserError, match="gives speech; expected speech and text"):
        evaluate_nll.main(
            [
                *files["ctc"].asr_options(),
                "--data_path_and_name_and_type",
                f"{files['wav']},speech,sound",
                "--output_dir",
                str(tmp_path),
            ]
        )


def test_speech_llm(tmp_path, caplog):
    """Its own likelihood, ends of sentences included; what exceeds its context is left out."""
    from tests.speech_llm.tiny import batch, model, single
    from tests.speech_llm.tiny_llm import save_adapted

    llm = save_adapted(tmp_path / "llm", max_position_embeddings=16)
    tiny = model(llm, model_conf={"ctc_weight": 0.5}).eval()
    data = batch(frames=(9, 5, 14), texts=((3, 4, 4, 5), (6, 3), (7, 3, 4)))
    names = ("speech", "speech_lengths", "text", "text_lengths")
    one_by_one = [([f"u{i}"], dict(zip(names, single(data, i)))) for i in range(3)]
    found = corpus_nll(tiny, one_by_one)
    assert (found.num_utterances, found.num_labels, found.num_impossible) == (2, 5 + 3, 1)
    expected = sum(float(tiny.utterance_nll(*single(data, i))) for i in range(2))
    assert found.total_nll == pytest.approx(expected, rel=1e-5)
    assert found.internal_lm == {} and "u2: the model cannot produce" in caplog.text
