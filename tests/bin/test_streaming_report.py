"""The streaming report on tiny models."""

import json

import pytest

from espnet_llm_plugin.bin import asr_inference, streaming_report
from espnet_llm_plugin.errors import UserError
from tests.inference.tiny_asr import make_asr, make_audio, read_scp
from tests.inference.tiny_streaming import make_streaming_asr

SETS = {"test_one": {"a": 0.9, "b": 0.6}, "test_two": {"c": 0.7, "short": 0.01}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    made = {k: make_streaming_asr(directory / k, "emformer", k) for k in ("ctc", "transducer")}
    made["factorized"] = make_streaming_asr(
        directory / "factorized", "emformer", "factorized", "model_conf: {ctc_weight: 0.3}\n"
    )
    made["offline"] = make_asr(directory / "offline", "ctc")
    made["data"] = directory / "dump"
    for name, seconds in SETS.items():
        make_audio(made["data"] / name, seconds)
        text = "".join(f"{utt} ab c\n" for utt in seconds)
        (made["data"] / name / "text").write_text(text)
    return made


@pytest.fixture
def run(files, tmp_path):
    def report(kind, *options, sets=tuple(SETS)):
        data = []
        for name in sets:
            directory = files["data"] / name
            data += ["--data_path_and_name_and_type", f"{directory}/wav.scp,speech,sound"]
            data += ["--text", f"{directory}/text"]
        streaming_report.main(
            [*files[kind].asr_options(), *data, "--output_dir", str(tmp_path / "out"), *options]
        )
        return tmp_path / "out"

    return report


def test_report(run, files, tmp_path, caplog):
    out = run("ctc", "--beam_size", "2")
    results = json.loads((out / "results.json").read_text())
    expected = [(name, chunk) for name in SETS for chunk in (80, 160, 320, 640)]
    assert [(r["test"], r["chunk_ms"]) for r in results] == expected
    for r in results:
        assert r["latency_ms"] == pytest.approx(r["chunk_ms"] + 40 + 7.5625)
        assert r["rtf"] > 0 and r["compute_ms"]["max"] >= r["compute_ms"]["median"] > 0
        assert r["stable_ms"]["median"] >= r["shown_ms"]["median"]
        assert r["aligned_tokens"] > 0
    # the utterance without a frame has no alignment, but an empty result
    assert [r["unaligned_utterances"] for r in results] == [0] * 4 + [1] * 4
    assert (out / "wer_latency.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "RESULTS.md").read_text()
    assert page.count("|test_one|") == page.count("|test_two|") == 4
    # the error rate is that of the decoding command
    asr_inference.main(
        [
            *files["ctc"].asr_options(),
            *["--data_path_and_name_and_type", f"{files['data']}/test_one/wav.scp,speech,sound"],
            *["--output_dir", str(tmp_path / "offline"), "--num_workers", "0"],
            *["--beam_size", "2", "--chunk_ms", "320"],
        ]
    )
    from espnet_llm_plugin.scoring.wer import score

    hypotheses = read_scp(tmp_path / "offline" / "1best_recog" / "text")
    scored = score(
        {utt: ["ab", "c"] for utt in hypotheses},
        {utt: text.split() for utt, text in hypotheses.items()},
        {utt: utt for utt in hypotheses},
    )
    assert results[2]["wer"] == pytest.approx(scored.summary().rate)


def test_transducer_with_ctc_branch(run):
    few = ["--max_symbols_per_frame", "1", "--label_bonus", "-3"]
    out = run("factorized", "--chunks_ms", "160", "40", *few, sets=["test_one"])
    results = json.loads((out / "results.json").read_text())
    assert [r["chunk_ms"] for r in results] == [40, 160]
    assert all(r["aligned_tokens"] > 0 for r in results)
    # one alignment, different delays
    assert results[0]["shown_ms"] != results[1]["shown_ms"]


def test_model_without_ctc_branch(run, caplog):
    out = run("transducer", "--chunks_ms", "80", sets=["test_one"])
    (found,) = json.loads((out / "results.json").read_text())
    assert found["shown_ms"] == {} and found["unaligned_utterances"] == 2
    assert "no CTC branch" in caplog.text and "|-|-|" in (out / "RESULTS.md").read_text()


def align_options(files):
    return [option.replace("--asr_", "--align_asr_") for option in files.asr_options()]


def test_another_model_aligns(run, files):
    """The model's own CTC, given as another model, and a model that has none."""
    chunks = ["--chunks_ms", "80"]
    found = []
    for options in (chunks, [*chunks, *align_options(files["ctc"])]):
        out = run("ctc", *options, sets=["test_one"])
        found.append(json.loads((out / "results.json").read_text())[0])
    assert found[0]["shown_ms"] == found[1]["shown_ms"] != {}
    out = run("transducer", *chunks, *align_options(files["ctc"]), sets=["test_one"])
    (aligned,) = json.loads((out / "results.json").read_text())
    assert aligned["aligned_tokens"] > 0 and aligned["stable_ms"]


def test_a_model_that_cannot_align(run, files):
    for kind, message in (
        ("transducer", "the model has no CTC"),
        ("offline", "its frames .* must be those of the model"),
    ):
        with pytest.raises(UserError, match=message):
            run("transducer", *align_options(files[kind]), sets=["test_one"])
    with pytest.raises(UserError, match="--align_asr_model_file is missing"):
        run("transducer", *align_options(files["ctc"])[:2], sets=["test_one"])
    with pytest.raises(UserError, match="needs --align_asr_train_config"):
        run("transducer", *align_options(files["ctc"])[2:], sets=["test_one"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--chunks_ms", "80", "90"], "must be a multiple"),
        (["--chunks_ms", "inf"], "give chunk_ms"),
        (["--text", "x"], "3 --text"),
    ],
)
def test_bad_options(run, options, message):
    with pytest.raises(UserError, match=message):
        run("ctc", *options)


def test_bad_data(run, files, tmp_path):
    with pytest.raises(UserError, match="two test sets have one name"):
        run("ctc", sets=["test_one", "test_one"])
    with pytest.raises(UserError, match="TransformerEncoder"):
        run("offline")
    broken = tmp_path / "dump" / "broken"
    make_audio(broken, {"a": 0.5})
    (broken / "text").write_text("b x\n")
    with pytest.raises(UserError, match="no transcript of 1 utterances: a"):
        run("ctc", sets=[str(broken)])
    (broken / "text").write_text("a x\n")
    (broken / "a.wav").write_text("no audio")
    with pytest.raises(UserError, match="a cannot be read.*take it out"):
        run("ctc", sets=[str(broken)])
