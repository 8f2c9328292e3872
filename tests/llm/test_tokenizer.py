"""The Hugging Face tokenizer over ASR ids against sentencepiece itself, on text."""

import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.tokenizer import build_tokenizer, check_bpemodel, load_sentencepiece
from espnet_llm_plugin.token_list import read_token_list
from tests.contracts.sentences import SENTENCES
from tests.llm.tiny import TEXT, train_sentencepiece

ALL = [sentence for sentences in SENTENCES.values() for sentence in sentences]
UNSEEN = ["Ω unseen ☃ signs", "two  spaces", " around ", "ﬁ ligature № 5", "", "a"]


def assert_equal_segmentation(model, tokens_file, texts, tmp_path):
    from transformers import AutoTokenizer

    tokens = read_token_list(tokens_file)
    processor = load_sentencepiece(model)
    built, reason = build_tokenizer(model, tokens)
    assert reason is None
    built.save_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    index = {token: i for i, token in enumerate(tokens)}
    for text in texts:
        pieces = processor.encode(text, out_type=str)
        expected = [index.get(piece, 1) for piece in pieces]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
        if 1 not in expected:
            assert tokenizer.decode(expected) == processor.decode(pieces)
    last = len(tokens) - 1
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (last, last, 0) and tokenizer.unk_token_id == 1
    assert len(tokenizer) == len(tokens)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["<noise>"]},
    ],
)
def test_equals_sentencepiece(options, tmp_path):
    size = 1100 if "byte_fallback" in options else 800
    model, tokens = train_sentencepiece(
        tmp_path / "sp", ALL, size, hard_vocab_limit=False, **options
    )
    assert_equal_segmentation(model, tokens, [*ALL, *UNSEEN], tmp_path)


def test_equals_sentencepiece_on_real_text(shared_data, tmp_path):
    texts = []
    for file in sorted((shared_data / "text" / "ntrex").glob("??.txt")):
        texts += file.read_text(encoding="utf-8").splitlines()[:60]
    assert len(texts) > 1000
    model, tokens = train_sentencepiece(
        tmp_path / "sp", texts, 3000, character_coverage=0.999, byte_fallback=True
    )
    assert_equal_segmentation(model, tokens, texts, tmp_path)


def test_other_models_have_none(tmp_path):
    model, tokens = train_sentencepiece(tmp_path / "sp", TEXT, 60, model_type="bpe")
    tokenizer, reason = build_tokenizer(model, read_token_list(tokens))
    assert tokenizer is None and reason.endswith("of type bpe, not unigram")


class TestBadModels:
    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="absent.model does not exist"):
            load_sentencepiece(tmp_path / "absent.model")

    def test_damaged(self, tmp_path):
        (tmp_path / "bpe.model").write_bytes(b"not a model")
        with pytest.raises(UserError, match="bpe.model is not a sentencepiece model"):
            load_sentencepiece(tmp_path / "bpe.model")

    def test_of_another_token_list(self, tmp_path):
        model, tokens = train_sentencepiece(tmp_path / "sp", TEXT, 60)
        processor = load_sentencepiece(model)
        good = read_token_list(tokens)
        check_bpemodel(processor, good, "m")
        without = [t for t in good if t not in (good[3], good[5])]
        with pytest.raises(UserError, match="m has 2 pieces that are not in the token list"):
            check_bpemodel(processor, without, "m")
