"""Rescoring of what ESPnet's and our decoders write, with tiny models."""

import json
import math

import pytest
import yaml

from espnet_llm_plugin.bin import asr_inference, estimate_prior, rescore
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.nbest_dirs import read_nbest_dir
from espnet_llm_plugin.inference.score_store import ScoreStore
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_lm, read_scp
from tests.llm.tiny import save_adapted_dir, save_llm_dir

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in ("ctc", "attention", "transducer")}
    made["lm"] = make_lm(directory / "lm", "transformer")
    made["adapted"] = save_adapted_dir(directory / "adapted", TOKENS)
    made["llm"] = save_llm_dir(directory / "llm")
    wav = make_audio(directory / "wav", SECONDS)
    for kind in ("ctc", "attention", "transducer"):
        made[f"{kind}_lists"] = directory / f"{kind}_lists"
        options = ["--nbest", "4", "--beam_size", "4"]
        if kind == "attention":
            options += ["--search", "espnet", "--maxlenratio", "0.3", "--ctc_weight", "0.3"]
        asr_inference.main(
            [
                *made[kind].asr_options(),
                *("--data_path_and_name_and_type", f"{wav},speech,sound"),
                *("--output_dir", str(made[f"{kind}_lists"] / "logdir" / "output.1"), *options),
            ]
        )
    # the transcripts are some other hypothesis than the first
    made["text"] = directory / "text"
    lists = read_nbest_dir(made["ctc_lists"])
    made["text"].write_text("".join(f"{u} {e[-1].text or 'a'}\n" for u, e in lists.items()))
    made["prior"] = directory / "prior.json"
    estimate_prior.main(
        [
            *made["ctc"].asr_options(),
            *("--data_path_and_name_and_type", f"{wav},speech,sound", "--num_workers", "0"),
            *("--output", str(made["prior"])),
        ]
    )
    return made


def run(files, kind, output, *options):
    rescore.main(
        ["--nbest_dir", str(files[f"{kind}_lists"]), "--output_dir", str(output), *options]
    )
    return read_nbest_dir(output)


@pytest.mark.parametrize("kind", ["ctc", "attention", "transducer"])
def test_each_decoders_lists_by_an_llm_in_its_own_tokens(files, kind, tmp_path):
    before = read_nbest_dir(files[f"{kind}_lists"])
    after = run(files, kind, tmp_path / "out", "--llm", str(files["llm"]), "--lm_weight", "0.7")
    assert list(after) == list(before)
    scores = dict(
        json.loads(line) for line in (tmp_path / "out/lm_scores.jsonl").read_text().splitlines()[1:]
    )
    for utt, entries in before.items():
        totals = {e.token_ids: e.score + 0.7 * scores[" ".join(e.text.split())] for e in entries}
        assert [e.token_ids for e in after[utt]] == sorted(totals, key=lambda ids: -totals[ids])
        for entry in after[utt]:
            assert entry.score == pytest.approx(totals[entry.token_ids])
            parts = [entry.parts[name] for name in ("acoustic", "lm", "external_lm", "prior")]
            assert entry.score == pytest.approx(sum(parts) + entry.parts["bonus"])
    assert read_scp(tmp_path / "out/text") == {u: e[0].text for u, e in after.items()}
    summary = json.loads((tmp_path / "out/rescoring.json").read_text())
    assert summary["hypotheses"] == sum(map(len, before.values())) >= summary["scored"]


def test_lms_over_the_asr_tokens(files, tmp_path):
    first = read_nbest_dir(files["ctc_lists"])
    adapted = run(files, "ctc", tmp_path / "a", "--llm", str(files["adapted"]))
    yaml_file, checkpoint = (files["adapted"] / f"espnet_lm.{end}" for end in ("yaml", "pth"))
    options = ("--lm_train_config", str(yaml_file), "--lm_file", str(checkpoint))
    assert run(files, "ctc", tmp_path / "b", *options) == adapted
    other = run(files, "ctc", tmp_path / "c", *files["lm"].lm_options())
    assert other != adapted
    nothing = run(files, "ctc", tmp_path / "d", *files["lm"].lm_options(), "--lm_weight", "0")
    assert nothing == first


def test_weights_tuned_on_one_set_serve_on_another(files, tmp_path):
    options = ["--llm", str(files["llm"]), "--prior", str(files["prior"]), "--eos", "none"]
    run(
        *(files, "ctc", tmp_path / "dev", *options, "--text", str(files["text"])),
        *("--lm_weights", "0", "0.5", "1", "--prior_weights", "0", "0.5"),
    )
    out = tmp_path / "dev"
    content = json.loads((out / "scales.json").read_text())
    assert len(content["points"]) == 3 * 2 * 9
    assert content["best"]["wer"] == min(p["wer"] for p in content["points"])
    assert content["best"]["wer"] <= content["first_pass"]["wer"]
    assert (out / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "table.txt").read_text().splitlines()) == 55
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["eos"] == "none"
    again = run(files, "ctc", tmp_path / "test", *options[:4], "--config", str(out / "best.yaml"))
    assert again == read_nbest_dir(out)


def test_prior_and_bonus_enter_the_sum(files, tmp_path):
    options = ["--llm", str(files["llm"]), "--prior", str(files["prior"])]
    options += ["--prior_weight", "0.3", "--length_bonus", "2", "--bonus_unit", "label"]
    prior = json.loads(files["prior"].read_text())["log_prior"]
    for entries in run(files, "ctc", tmp_path / "out", *options).values():
        for entry in entries:
            expected = -0.3 * sum(prior[i] for i in entry.token_ids)
            assert entry.parts["prior"] == pytest.approx(expected, abs=1e-5)
            assert entry.parts["bonus"] == 2 * len(entry.token_ids)


def test_internal_lm_of_an_attention_decoder(files, tmp_path):
    options = ["--llm", str(files["llm"]), "--ilm", "zero_context", "--ilm_weight", "0.3"]
    after = run(files, "attention", tmp_path / "out", *options, *files["attention"].asr_options())
    assert all(entry.parts["lm"] > 0 for entries in after.values() for entry in entries)
    with pytest.raises(UserError, match="attention decoder; this is a ESPnetASRModel.*CTC only"):
        run(files, "ctc", tmp_path / "ctc", *options, *files["ctc"].asr_options())


def test_scores_are_kept(files, tmp_path, monkeypatch):
    options = ["--llm", str(files["llm"])]
    first = run(files, "ctc", tmp_path / "out", *options)
    store = tmp_path / "out" / "lm_scores.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:-1]) + lines[-1][:5])  # killed while it wrote
    assert run(files, "ctc", tmp_path / "out", *options) == first
    assert sorted(store.read_text().splitlines()) == sorted(map(str.strip, lines))
    monkeypatch.setattr("espnet_llm_plugin.fusion.text_scorers.sequence_log_probs", None)
    run(files, "ctc", tmp_path / "out", *options, "--lm_weight", "1")
    with pytest.raises(TypeError):
        run(files, "ctc", tmp_path / "out", *options, "--eos", "newline")


def test_score_store_of_something_else_begins_anew(tmp_path):
    store = ScoreStore(tmp_path / "s", {"lm": 1})
    store.add([((1, 2), -0.5), ("text", -math.pi)])
    again = ScoreStore(tmp_path / "s", {"lm": 1})
    assert again.missing(["text", (1, 2), (3,), (3,)]) == [(3,)]
    assert again[(1, 2)] == -0.5 and again["text"] == -math.pi
    assert ScoreStore(tmp_path / "s", {"lm": 2}).missing(["text"]) == ["text"]


def test_bad_input_is_named(files, tmp_path):
    out, llm = tmp_path / "out", ["--llm", str(files["llm"])]
    with pytest.raises(UserError, match="give one LM"):
        run(files, "ctc", out)
    with pytest.raises(UserError, match="over the ASR tokens"):
        run(files, "ctc", out, "--llm", str(files["adapted"]), "--eos", "newline")
    with pytest.raises(UserError, match="--lm_lowercase true"):
        run(files, "ctc", out, "--llm", str(files["adapted"]), "--lm_lowercase", "true")
    other = save_adapted_dir(tmp_path / "other", [*TOKENS[:3], *"wxyz", TOKENS[-1]])
    with pytest.raises(
        UserError, match="another token list than the LM: token . is '[abcd]'.*'[wxyz]' there"
    ):
        run(files, "ctc", out, "--llm", str(other))
    with pytest.raises(UserError, match="--prior_weight 0.5, but no --prior"):
        run(files, "ctc", out, *llm, "--prior_weight", "0.5")
    frame = json.loads(files["prior"].read_text())
    (tmp_path / "frame.json").write_text(json.dumps({**frame, "mode": "frame"}))
    with pytest.raises(UserError, match="is a frame prior.*n-best lists know no frames"):
        run(files, "ctc", out, *llm, "--prior", str(tmp_path / "frame.json"))
    with pytest.raises(UserError, match="no acoustic score.*use total"):
        run(files, "attention", out, *llm, "--first_pass_score", "acoustic")
    text = tmp_path / "text"
    text.write_text("utt-a a\n")
    with pytest.raises(UserError, match="no transcript of 2 utterances: utt-b"):
        run(files, "ctc", out, *llm, "--text", str(text))
    with pytest.raises(UserError, match="name another"):
        run(files, "ctc", files["ctc_lists"], *llm)


def test_hypotheses_that_are_nothing_to_the_llm(files, tmp_path, monkeypatch, caplog):
    from espnet_llm_plugin.fusion.text_scorers import LLMTextScorer

    words = LLMTextScorer.words
    some = sorted({e.text for es in read_nbest_dir(files["ctc_lists"]).values() for e in es})[-1]
    monkeypatch.setattr(
        LLMTextScorer, "words", lambda self, key: [] if key == some else words(self, key)
    )
    with caplog.at_level("WARNING"):
        run(files, "ctc", tmp_path / "out", "--llm", str(files["llm"]))
    assert "no tokens of 1 of" in caplog.text and repr(some) in caplog.text
    monkeypatch.setattr(LLMTextScorer, "words", lambda self, key: [])
    with pytest.raises(UserError, match="makes no tokens of any hypothesis"):
        run(files, "ctc", tmp_path / "out", "--llm", str(files["llm"]))
