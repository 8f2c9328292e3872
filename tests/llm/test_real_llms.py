"""Vocabulary adaptation with real tokenizers, a real LLM and real text (skipped without them)."""

import json
import unicodedata

import pytest
import torch

from espnet_llm_plugin.llm.adaptation import adapt_llm, load_tokenizer
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.directory import llm_tokens
from espnet_llm_plugin.llm.perplexity import asr_tokenizer, read_text, score_text
from espnet_llm_plugin.llm.tokenizer import load_sentencepiece
from espnet_llm_plugin.llm.vocabulary import SubwordVocabulary, adapt
from espnet_llm_plugin.token_list import read_token_list
from tests.contracts.sentences import SENTENCES
from tests.contracts.vocabulary_contract import VocabularyContract
from tests.llm.tiny import save_llm_dir, tiny_model, train_sentencepiece


def ljspeech(shared_data, count):
    """Lower-case sentences without punctuation."""
    text = (shared_data / "text" / "ljspeech" / "text").read_text(encoding="utf-8").lower()
    keep = set("abcdefghijklmnopqrstuvwxyz' ")
    lines = [line.split(maxsplit=1)[1] for line in text.splitlines()[:count]]
    return [" ".join("".join(c if c in keep else " " for c in line).split()) for line in lines]


def report(directory):
    return json.loads((directory / "vocabulary_report.json").read_text(encoding="utf-8"))


class TestStories260K:
    @pytest.fixture(scope="class")
    def llm(self, shared_data):
        return shared_data / "llm" / "stories260K"

    def test_its_own_pieces_keep_its_perplexity(self, llm, shared_data, tmp_path):
        """With the LLM's own pieces as ASR tokens, adaptation changes nothing."""
        own = load_sentencepiece(llm / "tokenizer.model")
        pieces = [own.id_to_piece(i) for i in range(own.get_piece_size())]
        tokens = ["<blank>", "<unk>", *pieces[3:], "<sos/eos>"]
        text = shared_data / "text" / "tinystories" / "tinystories_sample.txt"
        lines = [line for line in read_text(text) if "<|" not in line]
        words = sum(len(line.split()) for line in lines)
        model, tokenizer = load_causal_lm(llm), load_tokenizer(llm)
        native = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
        before = score_text(model, native, words, bos=1)
        mapping = adapt(model, tokenizer, tokens)
        index = {token: i for i, token in enumerate(tokens)}
        ids = [[index[piece] for piece in own.encode(line, out_type=str)] for line in lines]
        after = score_text(model, ids, words, bos=len(tokens) - 1, blank=0)
        assert mapping.statistics()["exact_match_share"] == 1.0
        assert before.tokens == after.tokens > 1000
        assert 20 < before.word_perplexity < 60
        assert after.word_perplexity == pytest.approx(before.word_perplexity, rel=1e-3)

    def test_averaging_beats_chance(self, llm, shared_data, tmp_path):
        """On words of its own domain the mean of sub-tokens is far better than random rows."""
        text = shared_data / "text" / "tinystories" / "tinystories_sample.txt"
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        model, tokens = train_sentencepiece(tmp_path / "sp", lines, 300)
        found = {}
        for init in ("mean", "random"):
            out = tmp_path / init
            adapt_llm(llm, tokens, out, bpemodel=model, oov_init=init, text=tmp_path / "sp.txt")
            found[init] = report(out)
        assert found["mean"]["word_perplexity_before"] == found["random"]["word_perplexity_before"]
        mean, chance = (found[i]["word_perplexity_after"] for i in ("mean", "random"))
        assert mean < chance / 2
        assert 0.3 < found["mean"]["exact_match_share"] < 0.9


class TestLlama2Tokenizer:
    @pytest.fixture(scope="class")
    def tokenizer(self, shared_data):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(shared_data / "llm" / "llama2_tokenizer")

    def test_pieces(self, tokenizer):
        vocabulary = SubwordVocabulary(tokenizer)
        names = tokenizer.convert_ids_to_tokens
        assert vocabulary.style == "sentencepiece"
        assert names([vocabulary.exact(" the"), vocabulary.exact("the")]) == ["▁the", "the"]
        assert names(vocabulary.split(" stories")) == ["▁stories"]
        assert names(vocabulary.split("ठ")) == ["<0xE0>", "<0xA4>", "<0xA0>"]
        assert names([vocabulary.exact_byte(0xE2)]) == ["<0xE2>"]

    def test_adaptation(self, tokenizer, shared_data, tmp_path):
        lines = ljspeech(shared_data, 3000)
        model, tokens = train_sentencepiece(tmp_path / "sp", lines, 2000)
        tiny_model("llama", vocab_size=32000, tied=False).save_pretrained(tmp_path / "llm")
        tokenizer.save_pretrained(tmp_path / "llm")
        (tmp_path / "text").write_text("\n".join(lines[:20]) + "\n")
        adapt_llm(
            tmp_path / "llm", tokens, tmp_path / "out", bpemodel=model, text=tmp_path / "text"
        )
        figures = report(tmp_path / "out")
        assert figures["exact_match_share"] > 0.5
        assert figures["mean_subtokens_per_piece"] < 2 and figures["not_found"] == []
        assert llm_tokens(tmp_path / "out") == read_token_list(tokens)


class AdaptedVocabulary(VocabularyContract):
    """An adapted LLM over a multilingual sentencepiece model."""

    @pytest.fixture(autouse=True)
    def _directory(self, adapted):
        from transformers import AutoTokenizer

        self.directory = adapted
        self.tokenizer = AutoTokenizer.from_pretrained(adapted)
        self._encode = asr_tokenizer(self.tokens(), "bpe", adapted / "bpe.model")
        self.lm = CausalLLM(len(self.tokens()), llm=str(adapted), frozen=True)

    def tokens(self):
        return llm_tokens(self.directory)

    def encode(self, text):
        ids = self._encode(text)
        assert ids == self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def log_probs(self, ids):
        rows = torch.tensor([[len(self.tokens()) - 1, *ids]])
        with torch.no_grad():
            return self.lm(rows, None)[0][0].log_softmax(-1)


def adapt_to(lines, directory, **options):
    model, tokens = train_sentencepiece(directory / "sp", lines, 2500, **options)
    save_llm_dir(directory / "llm", style="byte_level")
    adapt_llm(directory / "llm", tokens, directory / "out", bpemodel=model)
    return directory / "out"


class TestVocabularyOfOwnSentences(AdaptedVocabulary):
    @pytest.fixture(scope="class")
    def adapted(self, tmp_path_factory):
        lines = [sentence for sentences in SENTENCES.values() for sentence in sentences]
        return adapt_to(lines, tmp_path_factory.mktemp("own"))


class TestVocabularyOfNtrex(AdaptedVocabulary):
    """1,140 real sentences of the 19 languages, none of them in the training text."""

    @pytest.fixture(scope="class")
    def texts(self, shared_data):
        files = sorted((shared_data / "text" / "ntrex").glob("??.txt"))
        return {f.stem: f.read_text(encoding="utf-8").splitlines() for f in files}

    @pytest.fixture(scope="class")
    def adapted(self, texts, tmp_path_factory):
        lines = [line for lines in texts.values() for line in lines[60:160]]
        return adapt_to(lines, tmp_path_factory.mktemp("ntrex"), byte_fallback=True)

    @pytest.fixture(autouse=True)
    def _sentences(self, texts):
        self.sentences = {language: lines[:60] for language, lines in texts.items()}

    def normalised(self, text):
        # sentencepiece's default rule (nmt_nfkc) turns the zero-width non-joiner of Telugu,
        # Kannada, Malayalam and Tamil into a space
        normal = unicodedata.normalize("NFKC", text).replace("\u200c", " ")
        return " ".join(normal.split())
