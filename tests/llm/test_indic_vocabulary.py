"""Indic pieces: round trips with joiners, and LLMs that can only write them in bytes."""

import json

import pytest
import torch

from espnet_llm_plugin.data.indic_text import LANGUAGES
from espnet_llm_plugin.data.tokens import make_bpe_list
from espnet_llm_plugin.llm.adaptation import adapt_llm
from espnet_llm_plugin.llm.tokenizer import build_tokenizer
from espnet_llm_plugin.llm.vocabulary import SubwordVocabulary, adapt, map_tokens
from espnet_llm_plugin.token_list import read_token_list
from tests.contracts.sentences import SENTENCES
from tests.llm.test_real_llms import AdaptedVocabulary
from tests.llm.tiny import TEXT, save_llm_dir, tiny_model, tiny_tokenizer, train_sentencepiece

# Within words: zero-width non-joiners, the eyelash ra of Marathi, ya-phala after ra in Bengali.
JOINERS = {
    "te": "ఇన్\u200cస్టాగ్రామ్ చూడు",
    "kn": "ಇನ್\u200cಸ್ಟಾ ನೋಡು",
    "ml": "തമിഴ്\u200cനാട് കാണുക",
    "ta": "க்\u200cஷ பார்",
    "mr": "दर्\u200dया खोल आहेत",
    "bn": "র\u200d্যাব এসেছে",
}
ALL = {
    lang: [*sentences, *([JOINERS[lang]] if lang in JOINERS else [])]
    for lang, sentences in SENTENCES.items()
}
BYTES = ["<blank>", "<unk>", "మ", "ர", "▁the", "ம", "▁the", "<sos/eos>"]


class RecipesPieces(AdaptedVocabulary):
    """Pieces as egs2/indic makes them, over an LLM that writes all of these scripts in bytes."""

    sentences = ALL
    normalization: str

    @pytest.fixture(scope="class")
    def adapted(self, request, tmp_path_factory):
        directory = tmp_path_factory.mktemp("pieces")
        lines = [line for lines in ALL.values() for line in lines]
        (directory / "text").write_text(
            "".join(f"u{i} {line}\n" for i, line in enumerate(lines)), encoding="utf-8"
        )
        make_bpe_list(
            [directory / "text"],
            directory / "bpe",
            nbpe=350,
            normalization=request.cls.normalization,
        )
        save_llm_dir(directory / "llm", style="sentencepiece")
        adapt_llm(
            directory / "llm",
            directory / "bpe/tokens.txt",
            directory / "out",
            bpemodel=directory / "bpe/bpe.model",
        )
        return directory / "out"

    def normalised(self, text):
        return text  # every character comes back, joiners too

    def test_the_report_counts_bytes(self, adapted):
        report = json.loads((adapted / "vocabulary_report.json").read_text("utf-8"))
        assert report["not_found"] == []
        assert 0.5 < report["pieces_in_bytes"] / report["text_tokens"] < 1
        text = (adapted / "vocabulary_report.txt").read_text("utf-8")
        assert f"bytes, at least in part: {report['pieces_in_bytes']} of" in text
        assert ("have the row of another" in text) == bool(report["alike"])


class TestNfkcPieces(RecipesPieces):
    normalization = "nfkc"


class TestIdentityPieces(RecipesPieces):
    normalization = "identity"


def test_all_ten_languages_are_tested():
    assert set(LANGUAGES) < set(ALL)


@pytest.fixture(scope="module", params=["unigram", "bpe", "byte_level"])
def tokenizer(request, tmp_path_factory):
    """English alone: SentencePiece with byte fallback (both kinds of model), GPT-2's style."""
    if request.param == "bpe":
        return tiny_tokenizer("sentencepiece")
    if request.param == "byte_level":
        return tiny_tokenizer("byte_level")
    directory = tmp_path_factory.mktemp("sp")
    model, tokens = train_sentencepiece(
        directory / "sp", TEXT, 330, byte_fallback=True, hard_vocab_limit=False
    )
    return build_tokenizer(model, read_token_list(tokens))[0]


@pytest.mark.parametrize("oov_init", ["mean", "length_weighted_mean"])
def test_rows_are_means_over_bytes(tokenizer, oov_init):
    model = tiny_model("llama", vocab_size=len(tokenizer), tied=False)
    table = model.get_input_embeddings().weight.clone()
    mapping = adapt(model, tokenizer, BYTES, oov_init=oov_init)
    vocabulary = SubwordVocabulary(tokenizer)
    for row, piece in ((2, "మ"), (3, "ர"), (5, "ம")):
        parts = [vocabulary.exact_byte(byte) for byte in piece.encode("utf-8")]
        assert None not in parts and mapping.sources[row] == parts
        expected = torch.stack([table[part] for part in parts]).mean(0)
        torch.testing.assert_close(model.get_input_embeddings().weight[row], expected)


def test_pieces_that_bytes_cannot_tell_apart(tokenizer):
    """E0 B0 AE (Telugu ma) and E0 AE B0 (Tamil ra), but not E0 AE AE (Tamil ma)."""
    mapping = map_tokens(BYTES, SubwordVocabulary(tokenizer))
    assert mapping.in_bytes == [False, False, True, True, False, True, False, False]
    assert mapping.alike == ["మ", "ர"]
    statistics = mapping.statistics()
    assert statistics["pieces_in_bytes"] == 3 and statistics["alike"] == ["మ", "ர"]


def test_real_tokenizer(shared_data):
    """Llama 2 has Tamil ma, but of Telugu only the bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "llm/llama2_tokenizer")
    mapping = map_tokens(BYTES, SubwordVocabulary(tokenizer))
    assert mapping.in_bytes[2] and not mapping.in_bytes[5] and mapping.exact[5]
    assert tokenizer.convert_ids_to_tokens(mapping.sources[2]) == ["<0xE0>", "<0xB0>", "<0xAE>"]
