"""Command lines that combine a CTC model or a transducer with a language model and a prior."""

import json
from typing import NamedTuple

import pytest
import torch
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_fusion, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.fusion.word_lm import WordLM
from tests.inference.tiny_asr import KINDS, TOKENS, make_asr, make_audio, make_lm, make_speech_llm
from tests.llm.tiny import save_adapted_dir, save_llm_dir

SECONDS = {"utt-b": 0.9, "utt-a": 0.5, "utt-c": 1.3}
TEXT = {"utt-a": "ab c", "utt-b": "d a b d", "utt-c": "c"}


class FixedPrior(NamedTuple):
    mode: str
    log_prior: torch.Tensor


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in KINDS}
    made["lm"] = make_lm(directory / "lm", "seq_rnn")
    made["llm"] = str(save_llm_dir(directory / "llm"))
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("".join(f"{utt} {line}\n" for utt, line in TEXT.items()))
    made["ngram"] = directory / "ngram.npz"
    ngram = LabelNgram.estimate([[2, 3, 4], [3, 3, 2], [5]], len(TOKENS), 3)
    ngram.save(made["ngram"], TOKENS)
    return made


@pytest.fixture
def run(files, tmp_path):
    """Decode; returns utterance -> n-best entries."""

    def decode(kind, *options):
        asr_inference.main(
            [
                *files[kind].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--output_dir", str(tmp_path / "out")),
                *("--num_workers", "0", "--beam_size", "5", "--nbest", "5"),
                *map(str, options),
            ]
        )
        found = {}
        for line in (tmp_path / "out" / "nbest.jsonl").read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["utt"], []).append(entry)
        return found

    return decode


@pytest.fixture
def prior(monkeypatch, tmp_path):
    """A prior file, and what it is read as."""
    import sys
    import types

    path = tmp_path / "prior.json"
    path.write_text("{}")
    read = FixedPrior("label", torch.arange(len(TOKENS)) * -0.3)
    module = types.ModuleType("espnet_llm_plugin.fusion.prior")
    module.load_prior = lambda file, tokens: read if str(file) == str(path) else None
    monkeypatch.setitem(sys.modules, "espnet_llm_plugin.fusion.prior", module)
    return path, read.log_prior


def llm_options(files, fusion="delayed"):
    return ["--fusion", fusion, "--fusion_llm", files["llm"], "--lm_weight", "0.4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fusion", ["delayed", "rescore"])
def test_llm_with_its_own_vocabulary(run, files, kind, fusion):
    fused = run(kind, *llm_options(files, fusion))
    lm = WordLM(files["llm"])
    for entries in fused.values():
        for entry in entries:
            words = " ".join(entry["text"].split())
            expected = 0.4 * lm.ends([lm.text(words)])[0]
            assert entry["external_lm"] == pytest.approx(expected, abs=1e-3)
            parts = [entry[name] for name in ("acoustic", "lm", "external_lm", "bonus", "prior")]
            assert sum(parts) == pytest.approx(entry["total"], abs=1e-4)
    if fusion == "rescore":
        plain = run(kind)
        for utt, entries in fused.items():
            assert {e["token_int"] for e in entries} == {e["token_int"] for e in plain[utt]}


@pytest.mark.parametrize("kind", KINDS)
def test_ngram_that_stands_in_for_the_llm(run, files, kind):
    """It chooses what the LLM ranks: the n-best list of the n-gram, scored by the LLM alone."""
    options = [*llm_options(files, "rescore"), "--fusion_ngram", files["ngram"]]
    found = run(kind, *options)
    chosen = run(kind, "--ngram_file", files["ngram"], "--ngram_weight", "0.4")
    plain = run(kind)
    lm = WordLM(files["llm"])
    changed = False
    for utt, entries in found.items():
        ids = {entry["token_int"] for entry in entries}
        assert ids == {entry["token_int"] for entry in chosen[utt]}
        changed |= ids != {entry["token_int"] for entry in plain[utt]}
        for entry in entries:
            expected = 0.4 * lm.ends([lm.text(" ".join(entry["text"].split()))])[0]
            assert entry["external_lm"] == pytest.approx(expected, abs=1e-3)
            parts = [entry[name] for name in ("acoustic", "lm", "external_lm", "bonus", "prior")]
            assert sum(parts) == pytest.approx(entry["total"], abs=1e-4)
    assert changed


@pytest.mark.parametrize("kind", KINDS)
def test_ngram_alone(run, files, kind):
    """Without an LLM it is the LM, as --ngram_file, in every way to combine."""
    alone = ["--fusion_ngram", files["ngram"], "--lm_weight", "0.4"]
    same = ["--ngram_file", files["ngram"], "--ngram_weight", "0.4"]
    assert run(kind, *alone) == run(kind, *same) != run(kind)
    scores = {}
    for options in (["--lm_eos", "eos"], ["--fusion", "delayed"], ["--fusion", "rescore"]):
        for entries in run(kind, *alone, *options).values():
            for entry in entries:
                known = scores.setdefault(entry["token_int"], entry["external_lm"])
                assert entry["external_lm"] == pytest.approx(known, abs=1e-4)
    assert len(scores) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_lm_over_the_asr_tokens(run, files, kind):
    """Rescoring and delayed fusion add what label-wise fusion adds, on other hypotheses."""
    lm = [*files["lm"].lm_options(), "--lm_weight", "0.5"]
    scores = {}
    for options in (["--lm_eos", "eos"], ["--fusion", "delayed", "--fusion_interval", "2"],
                    ["--fusion", "rescore"]):  # fmt: skip
        for entries in run(kind, *lm, *options).values():
            for entry in entries:
                known = scores.setdefault(entry["token_int"], entry["external_lm"])
                assert entry["external_lm"] == pytest.approx(known, abs=1e-4)
    assert len(scores) > 5


@pytest.mark.parametrize(
    "options",
    [
        "--fusion_policy shortest",
        "--fusion_policy every_word",
        "--fusion_interval 1",
        "--lm_eos none",
        "--lm_eos newline",
        "--lm_temperature 3.0",
        "--lm_lowercase true",
        "--fusion_llm_dtype bfloat16",
    ],
)
def test_every_option_does_something(run, files, options, monkeypatch):
    """By what the LLM reads or says."""
    read = []
    step = WordLM.scores

    def scores(self, texts):
        read.append(len(texts))
        return step(self, texts)

    monkeypatch.setattr(WordLM, "scores", scores)
    if "lowercase" in options:  # of tokens in lower case nothing changes
        small = run("ctc", *llm_options(files), *options.split())
        assert small == run("ctc", *llm_options(files))
        return
    base = run("ctc", *llm_options(files))
    asked, read[:] = list(read), []
    changed = run("ctc", *llm_options(files), *options.split())
    assert changed != base or read != asked


def test_end_of_the_sentence_of_label_wise_fusion(run, files):
    """CTC scores it unless told otherwise, transducers only if told."""
    lm = [*files["lm"].lm_options(), "--lm_weight", "0.5"]
    for kind, default in (("ctc", "eos"), ("transducer", "none")):
        by_default = run(kind, *lm)
        assert run(kind, *lm, "--lm_eos", default) == by_default
        other = run(kind, *lm, "--lm_eos", "none" if default == "eos" else "eos")
        assert other["utt-a"][0]["external_lm"] != by_default["utt-a"][0]["external_lm"]


def test_temperature_of_an_lm_over_asr_tokens(run, files):
    lm = [*files["lm"].lm_options(), "--lm_weight", "0.5"]
    assert run("ctc", *lm) != run("ctc", *lm, "--lm_temperature", "2.0")


def test_options_of_ctc(run):
    base = run("ctc")
    best = run("ctc", "--recombination", "max")
    for utt, entries in base.items():
        assert best[utt][0]["total"] < entries[0]["total"]
    assert run("ctc", "--top_labels", "1") != base


@pytest.mark.parametrize("fusion", [[], ["--fusion", "rescore"]])
def test_prior(run, files, prior, fusion):
    path, log_prior = prior
    lm = [*files["lm"].lm_options(), "--lm_weight", "0.5", *fusion]
    for entries in run("ctc", *lm, "--prior_file", path, "--prior_weight", "0.7").values():
        for entry in entries:
            ids = [int(i) for i in entry["token_int"].split()]
            assert entry["prior"] == pytest.approx(-0.7 * float(log_prior[ids].sum()), abs=1e-4)


@pytest.mark.parametrize(
    "kind,options,message",
    [
        ("ctc", "--fusion delayed", "it needs an LM"),
        ("ctc", "--fusion_llm LLM", "cannot score single labels"),
        ("ctc", "--fusion_llm LLM LM --fusion delayed", "give one"),
        ("ctc", "--fusion_policy shortest LM", "needs --fusion delayed"),
        ("ctc", "--fusion_interval 3 LM --fusion rescore", "needs --fusion delayed"),
        ("ctc", "--fusion_interval 0 LM --fusion delayed", "at least 1 frame"),
        ("ctc", "--lm_eos newline LM", "knows no newline"),
        ("ctc", "--lm_eos none", "needs an LM"),
        ("ctc", "--lm_temperature 2", "needs an LM"),
        ("ctc", "--lm_temperature 0 LM", "above 0"),
        ("ctc", "--lm_lowercase true LM", "needs --fusion_llm"),
        ("ctc", "--fusion_llm_dtype bfloat16", "needs --fusion_llm"),
        ("ctc", "--fusion_ngram NGRAM LM --fusion delayed", "another LM over the ASR tokens"),
        ("ctc", "--fusion_ngram NGRAM --ngram_file NGRAM", "another LM over the ASR tokens"),
        ("ctc", "--fusion_ngram ./none --fusion_llm LLM --fusion delayed", "--fusion_ngram ./none"),
        ("ctc", "--fusion_ngram NGRAM --search espnet", "it needs --fusion_llm"),
        ("ctc", "--prior_weight 0.3", "needs --prior_file"),
        ("ctc", "--top_labels -1", "expected a number"),
        ("ctc", "--fusion_llm ./none --fusion delayed", "does not exist"),
        ("transducer", "--prior_file PRIOR --prior_weight 0.3", "ilm_weight"),
        ("transducer", "--recombination max", "belongs to CTC"),
        ("transducer", "--top_labels 3", "belongs to CTC"),
        ("transducer", "--search espnet --fusion rescore", "knows no --fusion"),
    ],
)
def test_options_without_a_meaning_are_refused(run, files, kind, options, message, prior):
    words = []
    for word in options.split():
        known = {"LLM": [files["llm"]], "LM": files["lm"].lm_options(), "PRIOR": [str(prior[0])]}
        known["NGRAM"] = [str(files["ngram"])]
        words += known.get(word, [word])
    with pytest.raises(UserError, match=message):
        run(kind, *words)


def test_adapted_llm_is_no_llm_with_its_own_vocabulary(run, tmp_path):
    adapted = save_adapted_dir(tmp_path / "adapted", TOKENS)
    with pytest.raises(UserError, match="adapted to an ASR token list"):
        run("ctc", "--fusion", "delayed", "--fusion_llm", adapted)


def test_speech_llms_refuse_them(files, tmp_path):
    adapted = save_adapted_dir(tmp_path / "llm", TOKENS)
    model = make_speech_llm(tmp_path / "speech_llm", adapted)
    options = [
        *model.asr_options(),
        *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
        *("--output_dir", str(tmp_path / "out"), "--recombination", "max"),
    ]
    with pytest.raises(UserError, match="--recombination"):
        asr_inference.main(options)
    with pytest.raises(UserError, match="--recombination"):
        tune_scales.main([*options, "--text", str(files["text"])])


# ----------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize(
    "command,kind,nj",
    [(tune_scales, "ctc", "1"), (tune_fusion, "ctc", "1"), (tune_fusion, "transducer", "2")],
)
def test_tuning_with_delayed_fusion(files, tmp_path, prior, command, kind, nj):
    options = ["--fusion", "delayed", "--fusion_llm", files["llm"], "--fusion_interval", "3"]
    options += ["--fusion_ngram", str(files["ngram"])]
    if kind == "ctc":
        options += ["--prior_file", str(prior[0]), "--prior_weights", "0", "0.3"]
    common = [
        *files[kind].asr_options(),
        *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
        *options[:8],
    ]
    command.main(
        [
            *common,
            *options[8:],
            *("--text", str(files["text"]), "--output_dir", str(tmp_path / "tune")),
            *("--lm_weights", "0", "0.3", "0.6", "--nj", nj),
        ]
    )
    best = yaml.safe_load((tmp_path / "tune" / "best.yaml").read_text())
    assert best["fusion"] == "delayed" and best["fusion_interval"] == 3
    assert best["fusion_ngram"] == str(files["ngram"])
    assert "lm_weight" in best and ("prior_weight" in best) == (kind == "ctc")
    scales = json.loads((tmp_path / "tune" / "scales.json").read_text())
    assert len(scales["points"]) == (6 if kind == "ctc" else 3)

    # Decoding with what was found gives the error rate that was found.
    asr_inference.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(tmp_path / "out"), "--num_workers", "0"),
            *("--config", str(tmp_path / "tune" / "best.yaml")),
        ]
    )
    import jiwer

    found = dict(
        line.split(" ", 1)
        for line in (tmp_path / "out/1best_recog/text").read_text().split("\n")
        if line
    )
    wer = 100 * jiwer.wer(list(TEXT.values()), [found[utt] for utt in TEXT])
    assert wer == pytest.approx(scales["best"]["wer"])


def test_tuning_needs_weights_for_a_prior(files, tmp_path, prior):
    with pytest.raises(UserError, match="--prior_weights"):
        tune_scales.main(
            [
                *files["ctc"].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--text", str(files["text"]), "--output_dir", str(tmp_path / "tune")),
                *("--prior_file", str(prior[0])),
            ]
        )
