"""Counting over a test set, scoring units, summaries."""

import math

import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.report import percentage_cells, round_half_up, speaker_tables
from espnet_llm_plugin.scoring.units import CER, TER, WER, build_tokenizers, unknown_tokens
from espnet_llm_plugin.scoring.wer import score


def words(**texts):
    return {key: text.split() for key, text in texts.items()}


def scored(refs, hyps, speakers=None, **options):
    return score(refs, hyps, speakers or dict.fromkeys(refs, "spk"), **options)


def test_sums_of_speakers_are_the_total():
    refs = words(a="x y z", b="x", c="p q r s", d="u v")
    hyps = words(a="x z", b="x", c="p q q r t", d="")
    result = scored(refs, hyps, {"a": "one", "b": "two", "c": "two", "d": "one"})
    speakers = result.by_speaker()
    assert list(speakers) == ["one", "two"]
    total = result.summary()
    for n in range(4):
        assert sum(s.counts[n] for s in speakers.values()) == total.counts[n]
    assert total.counts == (6, 1, 3, 1)
    assert (total.sentences, total.sentence_errors) == (4, 3)
    assert total.rate == pytest.approx(50)
    assert result.words.tolist() == [3, 1, 4, 2]
    assert result.errors.tolist() == [1, 0, 2, 2]


def test_case():
    refs, hyps = words(a="A É"), words(a="a é")
    assert scored(refs, hyps).summary().counts == (1, 1, 0, 0)  # ASCII only, as sclite
    assert scored(refs, hyps, case_sensitive=True).summary().counts == (0, 2, 0, 0)


def test_utterances_must_agree():
    with pytest.raises(UserError, match="b, c"):
        scored(words(a="x", c="y"), words(a="x", b="y"))


def test_no_reference_word():
    with pytest.raises(UserError, match="no word"):
        scored(words(a=""), words(a="x"))


def test_speaker_without_reference_words():
    """sclite prints numbers with an asterisk and leaves the speaker out of mean and median."""
    result = scored(words(a="", b="p q"), words(a="x y z", b="p"), {"a": "silent", "b": "talking"})
    silent = result.by_speaker()["silent"]
    assert percentage_cells(silent) == ["1", "0", "0*", "0*", "0*", "3*", "3*", "100.0"]
    assert math.isnan(silent.rate)
    text = speaker_tables(result, "title")
    assert "* no reference word" in text
    mean = next(line for line in text.split("\n") if "Mean" in line)
    assert "50.0" in mean and "nan" not in text
    assert "no reference word" not in speaker_tables(scored(words(a="x"), words(a="x")), "title")


@pytest.mark.parametrize(("value", "text"), [(6.25, "6.3"), (0.04, "0.0"), (99.95, "100.0")])
def test_rounding(value, text):
    assert round_half_up(value) == text


class TestUnits:
    def test_words_and_characters(self, tmp_path):
        symbols = tmp_path / "nlsyms.txt"
        symbols.write_text("<noise>\n")
        tokenizers = build_tokenizers(non_linguistic_symbols=str(symbols))
        assert set(tokenizers) == {WER, CER}
        assert tokenizers[WER]("a <noise> b") == ["a", "b"]
        assert tokenizers[CER]("a b<noise>") == ["a", "<space>", "b"]
        assert build_tokenizers()[WER]("a <noise> b") == ["a", "<noise>", "b"]

    @pytest.mark.parametrize(
        ("line", "characters"),
        [
            ("Élan 10:30 it's", "É l a n <space> 1 0 : 3 0 <space> i t ' s"),
            ("日本 語", "日 本 <space> 語"),
            ("", ""),
        ],
    )
    def test_as_espnet(self, line, characters):
        """As ``espnet2.bin.tokenize_text``, which asr.sh calls before sclite, prints them."""
        tokenizers = build_tokenizers()
        assert " ".join(tokenizers[CER](line)) == characters
        assert " ".join(tokenizers[WER](line)) == line

    def test_pieces(self, shared_data):
        model = str(shared_data / "llm" / "llama2_tokenizer" / "tokenizer.model")
        pieces = build_tokenizers(model)[TER]("hello world")
        assert "".join(pieces) == "▁hello▁world" and len(pieces) < 11

    @pytest.mark.parametrize("option", ["bpemodel", "non_linguistic_symbols"])
    def test_missing_file(self, option):
        with pytest.raises(UserError, match=f"--{option} nowhere"):
            build_tokenizers(**{option: "nowhere"})

    def test_bad_model(self, tmp_path):
        (tmp_path / "bpe.model").write_text("not a model")
        with pytest.raises(UserError, match="not a SentencePiece model"):
            build_tokenizers(str(tmp_path / "bpe.model"))

    @pytest.mark.parametrize(
        ("token_type", "unknown", "total"),
        [("char", {"c": 1, "<noise>": 2}, 6), ("word", {"a<noise>": 1, "bc": 1, "<noise>": 1}, 3)],
    )
    def test_unknown_tokens(self, tmp_path, token_type, unknown, total):
        (tmp_path / "tokens.txt").write_text("a\nb\n<space>\n")
        (tmp_path / "nlsyms.txt").write_text("<noise>\n")
        found = unknown_tokens(
            ["a<noise> bc", "<noise>"],
            str(tmp_path / "tokens.txt"),
            token_type,
            non_linguistic_symbols=str(tmp_path / "nlsyms.txt"),
        )
        assert found == (unknown, total)

    def test_unknown_pieces(self, tmp_path, shared_data):
        model = str(shared_data / "llm" / "llama2_tokenizer" / "tokenizer.model")
        (tmp_path / "tokens.txt").write_text("▁hello\n")
        unknown, total = unknown_tokens(["hello world"], str(tmp_path / "tokens.txt"), "bpe", model)
        assert (unknown, total) == ({"▁world": 1}, 2)
        with pytest.raises(UserError, match="needs --bpemodel"):
            unknown_tokens(["hello"], str(tmp_path / "tokens.txt"), "bpe")
        with pytest.raises(UserError, match="--token_list nowhere"):
            unknown_tokens(["hello"], "nowhere", "char")
