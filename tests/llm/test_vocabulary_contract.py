"""The vocabulary contract for LLMs adapted to token lists without a sentencepiece model."""

import json

import pytest
import torch

from espnet_llm_plugin.inference.loading import TextConverter
from espnet_llm_plugin.llm.adaptation import adapt_llm
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.directory import llm_tokens
from espnet_llm_plugin.llm.perplexity import asr_tokenizer
from tests.contracts.sentences import SENTENCES
from tests.contracts.vocabulary_contract import VocabularyContract
from tests.llm.tiny import save_llm_dir

TEXT = [sentence for sentences in SENTENCES.values() for sentence in sentences]


class AdaptedTokenList(VocabularyContract):
    """Text to ids as the perplexity tools do, ids to text as decoding does."""

    kind: str
    units: list[str]

    @pytest.fixture(autouse=True, scope="class")
    def _adapt(self, request, tmp_path_factory):
        cls, directory = request.cls, tmp_path_factory.mktemp(self.kind)
        tokens = ["<blank>", "<unk>", *self.units, "<sos/eos>"]
        (directory / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
        save_llm_dir(directory / "llm", style="byte_level")
        adapt_llm(directory / "llm", directory / "tokens.txt", directory / "out")
        cls.directory = directory / "out"
        cls.lm = CausalLLM(len(tokens), llm=str(cls.directory), frozen=True)

    def tokens(self):
        return llm_tokens(self.directory)

    def encode(self, text):
        return asr_tokenizer(self.tokens(), self.kind, None)(text)

    def decode(self, ids):
        converter = TextConverter(self.tokens(), self.kind, None)
        return converter.text(converter.tokens(ids))

    def log_probs(self, ids):
        rows = torch.tensor([[len(self.tokens()) - 1, *ids]])
        with torch.no_grad():
            return self.lm(rows, None)[0][0].log_softmax(-1)

    def normalised(self, text):
        return text  # these tokenizers change no character

    def test_the_kind_of_the_list_is_found(self):
        report = json.loads((self.directory / "vocabulary_report.json").read_text("utf-8"))
        assert report["token_type"] == self.kind


class TestCharacters(AdaptedTokenList):
    kind = "char"
    units = ["<space>", *sorted(set("".join(TEXT)) - {" "})]


class TestWords(AdaptedTokenList):
    kind = "word"
    units = sorted({word for line in TEXT for word in line.split()})
