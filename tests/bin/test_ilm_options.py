"""Internal LMs and n-grams as options of decoding and tuning."""

import json
import math

import pytest

from espnet_llm_plugin.bin import asr_inference, estimate_ngram, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.nbest_dirs import read_nbest_dir
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_lm

SECONDS = {"utt-a": 0.5, "utt-b": 0.7}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    kinds = ("ctc", "transducer", "factorized")
    made = {kind: make_asr(directory / kind, kind) for kind in kinds}
    made["lm"] = make_lm(directory / "lm", "seq_rnn")
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("utt-a ab c\nutt-b d aa\n")
    made["bigram"] = directory / "bigram.npz"
    tokens = made["transducer"].config.parent / "tokens.txt"
    options = f"--text {made['text']} --token_list {tokens} --order 2 --output {made['bigram']}"
    estimate_ngram.main(options.split())
    return made


def decode(files, kind, directory, *options):
    asr_inference.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(directory), "--nbest", "4", "--beam_size", "4", *options),
        ]
    )
    return read_nbest_dir(directory)


def test_bigram_is_subtracted(files, tmp_path):
    from espnet_llm_plugin.fusion.label_ngram import LabelNgram

    bigram = LabelNgram.load(files["bigram"], TOKENS)
    options = ["--ilm", "bigram", "--ilm_file", str(files["bigram"])]
    found = decode(files, "transducer", tmp_path / "a", *options, "--ilm_weight", "0.5")
    own = decode(files, "transducer", tmp_path / "b", "--ilm_weight", "0.5")
    assert found != own
    for entries in found.values():
        for entry in entries:
            tokens = [len(TOKENS) - 1, *entry.token_ids]
            expected = sum(_log_prob(bigram, a, b) for a, b in zip(tokens, tokens[1:]))
            assert entry.parts["lm"] == pytest.approx(-0.5 * expected, abs=1e-4)


def _log_prob(bigram, before, label):
    import torch

    return float(bigram.rows(torch.tensor([[before]]))[0, label])


def test_bigram_weights_are_tuned(files, tmp_path):
    tune_scales.main(
        [
            *files["transducer"].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--text", str(files["text"]), "--output_dir", str(tmp_path / "out")),
            *("--ilm", "bigram", "--ilm_file", str(files["bigram"]), "--ilm_weights", "0", "0.5"),
        ]
    )
    content = json.loads((tmp_path / "out" / "scales.json").read_text())
    assert {point["ilm_weight"] for point in content["points"]} == {0.0, 0.5}
    assert str(files["bigram"]) in content["identity"]["files"]


def test_ngram_is_an_external_lm(files, tmp_path):
    pytest.importorskip("kenlm", reason="kenlm is optional")
    arpa = tmp_path / "unigram.arpa"  # kenlm wants a bigram: one of no effect
    words = {"<unk>": -2, "<s>": -99, "</s>": -1, "<space>": -0.7, "a": -0.5, "b": -0.8}
    words.update(c=-0.6, d=-1.1)
    lines = "".join(f"{p}\t{w}\n" for w, p in words.items())
    arpa.write_text(
        f"\\data\\\nngram 1={len(words)}\nngram 2=1\n\n\\1-grams:\n{lines}\n"
        "\\2-grams:\n-2\t<s> <unk>\n\n\\end\\\n"
    )
    options = ["--ngram_file", str(arpa), "--ngram_weight", "0.3"]
    for kind in ("ctc", "transducer", "factorized"):
        for entries in decode(files, kind, tmp_path / kind, *options).values():
            for entry in entries:
                scored = [*entry.tokens, *["</s>"] * (kind == "ctc")]  # its search scores the end
                expected = 0.3 * math.log(10) * sum(words[token] for token in scored)
                assert entry.parts["external_lm"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="the search has one external LM"):
        decode(files, "ctc", tmp_path / "both", *options, *files["lm"].lm_options())


def test_bad_input_is_named(files, tmp_path):
    out, bigram = tmp_path / "out", ["--ilm", "bigram", "--ilm_file", str(files["bigram"])]
    with pytest.raises(UserError, match="--ilm_file is missing: bigram written by"):
        decode(files, "transducer", out, "--ilm", "bigram")
    with pytest.raises(UserError, match="needs --ilm bigram"):
        decode(files, "transducer", out, "--ilm_file", str(files["bigram"]))
    with pytest.raises(UserError, match="is for an RNN-T; this model is CTC"):
        decode(files, "ctc", out, *bigram)
    with pytest.raises(
        UserError, match="is a factorized_transducer|a factorized_transducer, whose"
    ):
        decode(files, "factorized", out, *bigram)
