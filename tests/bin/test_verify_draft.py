"""Draft and verify as a command, on tiny models."""

import json

import pytest

from espnet_llm_plugin.bin import asr_inference, estimate_prior, verify_draft
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.nbest_dirs import read_nbest_dir
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_lm, read_scp
from tests.llm.tiny import save_adapted_dir, save_llm_dir

SECONDS = {"utt-b": 0.7, "utt-a": 0.5, "utt-c": 0.4, "utt-d": 0.02}  # the last is too short


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in ("ctc", "attention", "transducer")}
    made["lm"] = make_lm(directory / "lm", "transformer")
    made["llm"] = save_adapted_dir(directory / "llm", TOKENS)
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("".join(f"{utt} ab c\n" for utt in SECONDS))
    return made


def run(files, kind, output, *options, lm="llm"):
    given = ["--llm", str(files["llm"])] if lm == "llm" else files["lm"].lm_options()
    verify_draft.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(output), "--num_workers", "0", *given, *options),
        ]
    )
    return json.loads((output / "verification.json").read_text())


@pytest.mark.parametrize("kind", ["ctc", "transducer"])
def test_threshold_infinity_is_greedy_decoding(files, kind, tmp_path):
    asr_inference.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(tmp_path / "greedy"), "--beam_size", "1"),
        ]
    )
    content = run(files, kind, tmp_path / "draft", "--thresholds", "inf")
    for name in ("text", "token", "token_int"):
        expected = read_scp(tmp_path / "greedy" / "1best_recog" / name)
        assert read_scp(tmp_path / "draft" / name) == expected
    assert list(content["failed"]) == ["utt-d"] and content["utterances"] == 3
    assert content["audio_seconds"] == pytest.approx(1.62, abs=0.001)


@pytest.mark.parametrize("lm", ["llm", "espnet"])
def test_sweep(files, tmp_path, lm):
    options = ["--thresholds", "inf", "1", "all", "--text", str(files["text"]), "--lm_weight", "2"]
    rows = run(files, "attention", tmp_path / "out", *options, lm=lm)["thresholds"]
    assert [row["threshold"] for row in rows] == ["inf", "1.0", "-inf"]
    assert rows[0]["opened"] == 0 < rows[1]["opened"] <= rows[2]["opened"] == rows[2]["slots"]
    assert rows[0]["lm_tokens"] < rows[1]["lm_tokens"] <= rows[2]["lm_tokens"]
    assert all(row["deletions"] >= 2 for row in rows)  # utt-d
    table = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert table[0].split()[:2] == ["threshold", "WER"] and len(table) == 5
    assert [line.split()[0] for line in table[2:]] == ["inf", "1", "all"]
    content = json.loads((tmp_path / "out" / "verification.json").read_text())
    for row, line in zip(rows, table[2:]):
        expected = (content["draft_seconds"] + row["seconds"]) / content["audio_seconds"]
        assert row["rtf"] == pytest.approx(expected, abs=1e-3)
        assert float(line.split()[-1]) == pytest.approx(row["rtf"], abs=1e-4)
    assert (tmp_path / "out" / "speed.png").read_bytes()[:4] == b"\x89PNG"
    totals = [
        sum(entries[0].score for entries in read_nbest_dir(tmp_path / "out" / name).values())
        for name in ("threshold_inf", "threshold_-inf")
    ]
    assert totals[0] < totals[1]


def test_prior_is_subtracted(files, tmp_path):
    estimate_prior.main(
        [
            *files["ctc"].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--num_workers", "0", "--output", str(tmp_path / "prior.json")),
        ]
    )
    prior = json.loads((tmp_path / "prior.json").read_text())["log_prior"]
    plain = run(files, "ctc", tmp_path / "a", "--thresholds", "inf")
    options = ("--prior", str(tmp_path / "prior.json"), "--prior_weight", "0.5")
    run(files, "ctc", tmp_path / "b", "--thresholds", "inf", *options)
    assert plain["thresholds"][0]["opened"] == 0
    before, after = read_nbest_dir(tmp_path / "a"), read_nbest_dir(tmp_path / "b")
    for utt, (entry,) in before.items():
        expected = entry.score - 0.5 * sum(prior[i] for i in entry.token_ids)
        assert after[utt][0].score == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="--prior is for CTC drafts"):
        run(files, "transducer", tmp_path / "c", *options)


def test_bad_input_is_named(files, tmp_path):
    native = save_llm_dir(tmp_path / "native")
    with pytest.raises(UserError, match="has its own tokens.*adapt it.*rescore"):
        run(files, "ctc", tmp_path / "out", "--llm", str(native))
    other = save_adapted_dir(tmp_path / "other", [*TOKENS[:3], "x", *TOKENS[4:]])
    with pytest.raises(UserError, match="another token list"):
        run(files, "ctc", tmp_path / "out", "--llm", str(other))
    with pytest.raises(UserError, match="--prior_weight 1.0, but no --prior"):
        run(files, "ctc", tmp_path / "out", "--prior_weight", "1")
    text = tmp_path / "text"
    text.write_text("utt-a a\n")
    with pytest.raises(UserError, match="no transcript of 3 utterances"):
        run(files, "ctc", tmp_path / "out", "--text", str(text))
