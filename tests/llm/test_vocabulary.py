"""Vocabulary adaptation: what each ASR token is made of, for each kind of tokenizer."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.vocabulary import (
    OOV_INITS,
    SubwordVocabulary,
    adapt,
    map_tokens,
    special_rows,
)
from espnet_llm_plugin.token_list import guess_token_type
from tests.llm.tiny import FAMILIES, TEXT, tiny_model, tiny_tokenizer

TOKENS = [
    "<blank>",
    "<unk>",
    "▁the",
    "ing",
    "▁ringing",
    "▁",
    "s",
    "▁xylo",
    "<0xE2>",
    "é",
    "<sos/eos>",
]
STYLES = ("sentencepiece", "byte_level")


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request):
    return tiny_tokenizer(request.param)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return SubwordVocabulary(tokenizer)


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


class TestSubwordVocabulary:
    def test_style(self, vocabulary, tokenizer):
        expected = "sentencepiece" if "▁the" in tokenizer.get_vocab() else "byte_level"
        assert vocabulary.style == expected

    def test_word_start_and_continuation_are_told_apart(self, vocabulary, tokenizer):
        space = "▁" if vocabulary.style == "sentencepiece" else "Ġ"
        assert words(tokenizer, [vocabulary.exact(" the")]) == [f"{space}the"]
        assert words(tokenizer, [vocabulary.exact("ing")]) == ["ing"]
        assert words(tokenizer, [vocabulary.exact(" ")]) == [space]
        assert vocabulary.exact(" xylo") is None
        parts = words(tokenizer, vocabulary.split(" ringing"))
        assert "".join(parts) == f"{space}ringing" and len(parts) > 1

    def test_split_is_the_tokenizers_own_at_a_word_start(self, vocabulary, tokenizer):
        for sentence in TEXT:
            for word in sentence.split():
                text = f" {word}" if vocabulary.style == "byte_level" else word
                expected = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert vocabulary.split(f" {word}") == expected

    def test_bytes(self, vocabulary, tokenizer):
        byte = vocabulary.exact_byte(0xE2)
        expected = "<0xE2>" if vocabulary.style == "sentencepiece" else "â"
        assert words(tokenizer, [byte]) == [expected]
        # characters that were not in the training text
        assert len(vocabulary.split("é")) == 2
        assert len(vocabulary.split("ठ")) == 3

    def test_special_tokens_are_no_text(self, vocabulary):
        assert vocabulary.exact("<s>") is None and vocabulary.exact("<unk>") is None

    def test_weight_is_the_length(self, vocabulary):
        assert vocabulary.weight(vocabulary.exact(" the")) == 4
        assert vocabulary.weight(vocabulary.exact_byte(0xE2)) == 1

    def test_slow_tokenizer(self):
        with pytest.raises(UserError, match="no `tokenizers` backend"):
            SubwordVocabulary(object())


def test_plain_tokenizer_has_no_spaces():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1, "<s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>"
    )
    vocabulary = SubwordVocabulary(tokenizer)
    assert vocabulary.style == "plain"
    assert vocabulary.exact(" cat") == 1 and vocabulary.split(" dog") == []
    mapping = map_tokens(["<blank>", "<unk>", "▁cat", "▁dog", "▁", "<sos/eos>"], vocabulary)
    assert mapping.sources[2] == [1] and mapping.not_found == ["▁dog", "▁"]


class TestMapTokens:
    def test_sources(self, vocabulary, tokenizer):
        mapping = map_tokens(TOKENS, vocabulary)
        assert mapping.sources[0] == mapping.sources[1] == mapping.sources[-1] == []
        assert mapping.exact == [t in ("▁the", "ing", "▁", "s", "<0xE2>") for t in TOKENS]
        assert mapping.sources[2] == [vocabulary.exact(" the")]
        assert mapping.sources[7] == vocabulary.split(" xylo") and len(mapping.sources[7]) > 1
        assert mapping.not_found == []

    def test_statistics(self, vocabulary):
        mapping = map_tokens(TOKENS, vocabulary)
        figures = mapping.statistics()
        counts = [len(mapping.sources[i]) for i in range(2, 10)]
        assert figures["text_tokens"] == 8
        assert figures["exact_matches"] == sum(mapping.exact)
        assert figures["exact_match_share"] == sum(mapping.exact) / 8
        assert figures["mean_subtokens_per_piece"] == sum(counts) / 8
        split = [c for c, exact in zip(counts, mapping.exact[2:10]) if not exact]
        assert figures["mean_subtokens_per_unmatched_piece"] == sum(split) / len(split)

    def test_without_exact_match_everything_goes_through_the_tokenizer(self, vocabulary):
        mapping = map_tokens(TOKENS, vocabulary, exact_match=False)
        assert not any(mapping.exact)
        assert mapping.sources[2] == vocabulary.split(" the")
        assert mapping.sources[8] == [vocabulary.exact_byte(0xE2)]

    def test_characters(self, vocabulary):
        tokens = ["<blank>", "<unk>", "<space>", "t", "h", "<sos/eos>"]
        assert guess_token_type(tokens) == "char"
        mapping = map_tokens(tokens, vocabulary)
        expected = [vocabulary.exact(text) for text in (" ", "t", "h")]
        assert mapping.sources[2:5] == [[i] for i in expected]
        assert all(mapping.exact[2:5])

    def test_words_stand_after_a_space(self, vocabulary):
        tokens = ["<blank>", "<unk>", "the", "xylophone", "<sos/eos>"]
        assert guess_token_type(tokens) == "word"
        mapping = map_tokens(tokens, vocabulary)
        assert mapping.sources[2] == [vocabulary.exact(" the")]
        assert mapping.sources[3] == vocabulary.split(" xylophone")
        as_pieces = map_tokens(tokens, vocabulary, token_type="bpe")
        assert as_pieces.sources[3] == vocabulary.split("xylophone")

    def test_guess(self):
        assert guess_token_type(TOKENS) == "bpe"
        assert guess_token_type(["<blank>", "<unk>", "a", "b", "<sos/eos>"]) == "char"

    def test_unknown_type(self, vocabulary):
        with pytest.raises(UserError, match="unknown token type 'phn'; expected one of bpe"):
            map_tokens(TOKENS, vocabulary, token_type="phn")

    def test_nothing_found_is_named(self):
        """A tokenizer without byte fallback has only its unknown token for what it never saw."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(
            models.BPE({"<unk>": 0, "▁": 1, "a": 2, "<s>": 3}, [], unk_token="<unk>")
        )
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>"
        )
        tokens = ["<blank>", "<unk>", "▁a", "ठ", "<0xE0>", "<sos/eos>"]
        mapping = map_tokens(tokens, SubwordVocabulary(tokenizer))
        assert mapping.sources[2] == [1, 2]
        assert mapping.not_found == ["ठ", "<0xE0>"]


class TestAdapt:
    """Rows of the new tables against rows of the old ones, one by one."""

    def tables(self, model):
        outputs = model.get_output_embeddings()
        bias = getattr(outputs, "bias", None)
        return [
            None if t is None else t.detach().clone()
            for t in (model.get_input_embeddings().weight, outputs.weight, bias)
        ]

    def adapted(self, tokenizer, family="llama", tied=False, tokens=TOKENS, **options):
        model = tiny_model(family, vocab_size=len(tokenizer) + 5, tied=tied)
        old = self.tables(model)
        mapping = adapt(model, tokenizer, tokens, **options)
        return model, mapping, old, self.tables(model)

    @pytest.mark.parametrize("tied", [True, False])
    def test_mean(self, tokenizer, tied):
        model, mapping, old, new = self.adapted(tokenizer, tied=tied)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        unk = tokenizer.unk_token_id
        for before, after, sos_eos in zip(old[:2], new[:2], (bos, bos if tied else eos)):
            assert after.shape == (len(TOKENS), before.shape[1])
            assert torch.equal(after[0], torch.zeros_like(after[0]))
            assert torch.equal(after[1], before[unk])
            assert torch.equal(after[-1], before[sos_eos])
            for row, source in zip(after[2:-1], mapping.sources[2:-1]):
                torch.testing.assert_close(row, before[source].mean(0))
        assert torch.equal(new[0], new[1]) == tied
        assert model.config.vocab_size == len(TOKENS)
        same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert same == tied

    def test_first(self, tokenizer):
        _, mapping, old, new = self.adapted(tokenizer, oov_init="first")
        for before, after in zip(old[:2], new[:2]):
            assert torch.equal(after[7], before[mapping.sources[7][0]])

    def test_length_weighted_mean(self, tokenizer):
        _, mapping, old, new = self.adapted(tokenizer, oov_init="length_weighted_mean")
        index = TOKENS.index("▁ringing")
        source = mapping.sources[index]
        lengths = torch.tensor([float(len(t)) for t in words(tokenizer, source)])
        assert len(set(lengths.tolist())) > 1
        for before, after in zip(old[:2], new[:2]):
            expected = (before[source] * lengths[:, None]).sum(0) / lengths.sum()
            torch.testing.assert_close(after[index], expected)

    def test_random(self, tokenizer):
        _, mapping, old, new = self.adapted(tokenizer, oov_init="random", seed=1)
        _, _, _, same = self.adapted(tokenizer, oov_init="random", seed=1)
        _, _, _, other = self.adapted(tokenizer, oov_init="random", seed=2)
        assert torch.equal(new[0], same[0]) and torch.equal(new[1], same[1])
        assert not torch.equal(new[0][7], other[0][7])
        assert not torch.equal(new[0][7], new[1][7])
        # exact matches are copied all the same
        assert torch.equal(new[0][2], old[0][mapping.sources[2][0]])
        many = ["<blank>", "<unk>", *(f"▁q{i}z" for i in range(400)), "<sos/eos>"]
        _, _, old, new = self.adapted(tokenizer, oov_init="random", tokens=many)
        trained = old[0][: len(tokenizer)]
        drawn = new[0][2:-1]
        torch.testing.assert_close(drawn.mean(0), trained.mean(0), atol=0.06, rtol=0)
        torch.testing.assert_close(drawn.std(0), trained.std(0), atol=0.05, rtol=0)

    def test_random_without_exact_match_copies_nothing(self, tokenizer):
        _, mapping, old, new = self.adapted(tokenizer, oov_init="random", exact_match=False)
        for row in new[0][2:-1]:
            assert not (old[0] == row).all(-1).any()

    def test_unknown_init(self, tokenizer):
        assert OOV_INITS == ("mean", "length_weighted_mean", "first", "random")
        with pytest.raises(UserError, match="unknown oov_init 'median'; expected one of mean"):
            self.adapted(tokenizer, oov_init="median")

    def test_output_bias(self, tokenizer):
        """GPT-J's output layer has a bias: it masks blank and follows its rows."""
        _, mapping, old, new = self.adapted(tokenizer, family="gptj")
        before, after = old[2], new[2]
        assert after[0] == -1e4
        assert after[-1] == before[tokenizer.eos_token_id]
        torch.testing.assert_close(after[7], before[mapping.sources[7]].mean())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_same_vocabulary_changes_nothing(self, family, tokenizer):
        """Adapted to its own tokens, an LLM gives the same logits for the same text."""
        own = [t for t in tokenizer.get_vocab() if t not in tokenizer.all_special_tokens]
        if SubwordVocabulary(tokenizer).style == "byte_level":
            own = [t.replace("Ġ", "▁") for t in own if t.isascii() or t.startswith("Ġ")]
        tokens = ["<blank>", "<unk>", *own, "<sos/eos>"]
        model = tiny_model(family, vocab_size=len(tokenizer) + 5)
        old_ids = tokenizer(" the cat sat on the mat", add_special_tokens=False)["input_ids"]
        names = [t.replace("Ġ", "▁") for t in words(tokenizer, old_ids)]
        new_ids = [tokens.index(name) for name in names]
        with torch.no_grad():
            before = model(torch.tensor([[tokenizer.bos_token_id, *old_ids]])).logits
            mapping = adapt(model, tokenizer, tokens)
            after = model(torch.tensor([[len(tokens) - 1, *new_ids]])).logits
        assert all(mapping.exact[2:-1])
        torch.testing.assert_close(after[0][:, new_ids], before[0][:, old_ids])

    def test_tokenizer_of_another_model(self, tokenizer):
        model = tiny_model("llama", vocab_size=50)
        with pytest.raises(UserError, match="embedding only 50 rows.*do not belong together"):
            adapt(model, tokenizer, TOKENS)

    def test_further_tables(self, tokenizer):
        model = tiny_model("llama", vocab_size=400)
        model.per_layer = torch.nn.Embedding(400, 3)
        with pytest.raises(UserError, match=r"further tables over its vocabulary \(per_layer\)"):
            adapt(model, tokenizer, TOKENS)


class TestSpecialRows:
    def config(self, **ids):
        from transformers import LlamaConfig

        return LlamaConfig(vocab_size=400, **{"bos_token_id": None, "eos_token_id": None, **ids})

    def test_from_the_tokenizer(self):
        tokenizer = tiny_tokenizer("sentencepiece")
        assert special_rows(tokenizer, self.config(bos_token_id=9)) == (1, 2, 0)

    def test_without_bos_documents_begin_with_their_end(self):
        tokenizer = tiny_tokenizer("byte_level")
        tokenizer.bos_token = None
        assert special_rows(tokenizer, self.config()) == (2, 2, 0)
        assert special_rows(tokenizer, self.config(bos_token_id=7)) == (7, 2, 0)
        tokenizer.eos_token = None
        assert special_rows(tokenizer, self.config(eos_token_id=[8, 9])) == (8, 8, 0)

    def test_end_of_text_is_not_unknown(self):
        tokenizer = tiny_tokenizer("byte_level")
        tokenizer.unk_token = tokenizer.bos_token
        assert special_rows(tokenizer, self.config()) == (1, 2, None)

    def test_neither(self):
        tokenizer = tiny_tokenizer("byte_level")
        tokenizer.bos_token = tokenizer.eos_token = None
        with pytest.raises(UserError, match="neither a BOS nor an EOS"):
            special_rows(tokenizer, self.config())

    def test_unknown_row_without_unknown_token_is_the_mean(self):
        tokenizer = tiny_tokenizer("byte_level")
        tokenizer.unk_token = None
        model = tiny_model("llama", vocab_size=len(tokenizer) + 5)
        # surplus rows were never trained and do not count
        expected = model.get_input_embeddings().weight[: len(tokenizer)].mean(0)
        adapt(model, tokenizer, TOKENS)
        torch.testing.assert_close(model.get_input_embeddings().weight[1], expected)
