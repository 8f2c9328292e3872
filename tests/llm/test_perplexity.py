"""Word-level perplexity against a sum written out token by token."""

import json
import math

import pytest
import torch

from espnet_llm_plugin.bin.llm_perplexity import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.llm.perplexity import asr_tokenizer, read_text, score_text
from tests.llm.tiny import (
    TEXT,
    char_tokens,
    save_adapted_dir,
    save_llm_dir,
    tiny_model,
    train_sentencepiece,
)

SENTENCES = [[4, 5, 6], [7], [8, 9, 3, 2, 5], []]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("blank", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_sum(family, blank, batch_size):
    model = tiny_model(family)
    expected = 0.0
    for ids in SENTENCES:
        for end, target in enumerate(ids):
            row = model(torch.tensor([[1, *ids[:end]]])).logits[0, -1]
            if blank is not None:
                row[blank] = -torch.inf
            expected += float(row.log_softmax(-1)[target])
    score = score_text(model, SENTENCES, 4, bos=1, blank=blank, batch_size=batch_size)
    assert score.tokens == 9
    assert score.log_prob == pytest.approx(expected, rel=1e-5)
    assert score.word_perplexity == pytest.approx(math.exp(-expected / 4), rel=1e-4)
    assert score.token_perplexity == pytest.approx(math.exp(-expected / 9), rel=1e-4)


class TestReadText:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "text").write_text("u1 one  two\n\nu2 three\nu3\n", encoding="utf-8")
        return tmp_path / "text"

    def test_plain(self, file):
        assert read_text(file) == ["u1 one two", "u2 three", "u3"]

    def test_kaldi(self, file):
        assert read_text(file, has_ids=True) == ["one two", "three"]

    def test_max_lines(self, file):
        assert read_text(file, max_lines=2) == ["u1 one two", "u2 three"]

    def test_empty(self, tmp_path):
        (tmp_path / "text").write_text("\n\n")
        with pytest.raises(UserError, match="has no sentences"):
            read_text(tmp_path / "text")

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="absent cannot be read"):
            read_text(tmp_path / "absent")


class TestAsrTokenizer:
    def test_char(self):
        tokens = char_tokens()
        encode = asr_tokenizer(tokens, "char", None)
        assert [tokens[i] for i in encode("te xt")] == ["t", "e", "<space>", "<unk>", "t"]

    def test_word(self):
        tokens = ["<blank>", "<unk>", "hello", "you", "<sos/eos>"]
        assert asr_tokenizer(tokens, "word", None)("hello to you") == [2, 1, 3]

    def test_bpe_needs_its_model(self, tmp_path):
        model, tokens = train_sentencepiece(tmp_path / "sp", TEXT, 60)
        tokens = tokens.read_text(encoding="utf-8").split()
        ids = asr_tokenizer(tokens, "bpe", model)("the cat")
        assert "".join(tokens[i] for i in ids) == "▁the▁cat"
        with pytest.raises(UserError, match="give --bpemodel"):
            asr_tokenizer(tokens, "bpe", None)

    def test_agrees_with_espnet(self, tmp_path):
        from espnet_llm_plugin.compat import import_quietly

        build = import_quietly("espnet2.train.preprocessor").CommonPreprocessor
        model, tokens = train_sentencepiece(tmp_path / "sp", TEXT, 60)
        preprocessor = build(
            train=False, token_type="bpe", token_list=str(tokens), bpemodel=str(model)
        )
        names = tokens.read_text(encoding="utf-8").split("\n")[:-1]
        for text in (*TEXT, "zebra crossing"):
            expected = preprocessor("u", {"text": text})["text"].tolist()
            assert asr_tokenizer(names, "bpe", model)(text) == expected


def test_llm_in_asr_tokens(tmp_path, capsys):
    """The command line, on a directory as adapt_vocabulary writes it."""
    tokens = char_tokens()
    llm = save_adapted_dir(tmp_path / "llm", tokens)
    (tmp_path / "text").write_text("u1 tea on\nu2 rest\n")
    main(["--llm", str(llm), "--text", f"{tmp_path}/text", "--output", f"{tmp_path}/ppl.json"])
    rows = [[tokens.index("<space>" if c == " " else c) for c in s] for s in ("tea on", "rest")]
    bos = len(tokens) - 1
    expected = score_text(load_causal_lm(llm), rows, 3, bos=bos, blank=0)
    report = json.loads((tmp_path / "ppl.json").read_text())
    assert (report["words"], report["tokens"]) == (3, 10)
    assert report["word_perplexity"] == pytest.approx(expected.word_perplexity)
    assert report["token_perplexity"] == pytest.approx(expected.token_perplexity)
    assert f"word perplexity {expected.word_perplexity:.1f}" in capsys.readouterr().out


def test_llm_in_its_own_tokens(tmp_path):
    llm = save_llm_dir(tmp_path / "llm")
    (tmp_path / "text").write_text("u1 the cat\nu2 a story sat\n")
    output = tmp_path / "ppl.json"
    main(["--llm", str(llm), "--text", str(tmp_path / "text"), "--output", str(output)])
    found = json.loads(output.read_text())
    tokenizer, model = load_tokenizer(llm), load_causal_lm(llm)
    total = 0.0
    for text in ("the cat", "a story sat"):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(float(log_probs[n, token]) for n, token in enumerate(ids[1:]))
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / 5), rel=1e-4)
    encode = asr_tokenizer([], "hugging_face", llm)
    assert encode("the cat") == tokenizer("the cat", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="give it as --bpemodel"):
        asr_tokenizer([], "hugging_face", None)
