"""LLMs in their own vocabulary: against whole-sequence forwards, with any order of questions."""

import gc

import numpy as np
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.word_lm import WordLM, score_texts
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import FrozenLLM
from espnet_llm_plugin.llm.vocabulary import special_rows
from tests.llm.tiny import char_tokens, save_adapted_dir, save_llm_dir, tiny_tokenizer

TEXTS = ("", "the cat", "the cat sat", "the dog", "a", "the cat sat on the mat", "The Cat")
STYLES = ("sentencepiece", "byte_level")


@pytest.fixture(params=STYLES, scope="module")
def llm(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llm") / "llm"
    save_llm_dir(directory, style=request.param)
    return FrozenLLM(directory)


def whole(llm, text, end, temperature=1.0):
    """log P of a text and its end by one forward, as slow as it is obvious."""
    tokenizer = load_tokenizer(llm.directory)
    bos, eos, _ = special_rows(tokenizer, llm.config)
    ids = tokenizer(text + ("\n" if end == "newline" else ""), add_special_tokens=False)[
        "input_ids"
    ]
    ids = [bos, *ids, *([eos] if end == "eos" else [])]
    logits = llm.model()(input_ids=torch.tensor([ids])).logits[0].double() / temperature
    rows = logits.log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(rows, ids[1:]))


@pytest.mark.parametrize("end", ["eos", "newline", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_word_by_word_equals_the_whole(llm, end, temperature):
    lm = WordLM(llm, end=end, temperature=temperature)
    for text in TEXTS:
        grown = lm.start()
        for word in text.split():
            grown = lm.extend(grown, word)
            score = lm.scores([grown])[0]
            assert score == pytest.approx(whole(llm, grown.words, "none", temperature), abs=1e-4)
        assert grown.words == text
        assert lm.ends([grown])[0] == pytest.approx(whole(llm, text, end, temperature), abs=1e-4)


@pytest.mark.parametrize("end", ["eos", "newline", "none"])
def test_batch_equals_single(llm, end):
    batch = score_texts(WordLM(llm, end=end), TEXTS)
    single = [score_texts(WordLM(llm, end=end), [text])[0] for text in TEXTS]
    assert batch == pytest.approx(single, abs=1e-4)
    assert score_texts(WordLM(llm), TEXTS, ended=False) == pytest.approx(
        score_texts(WordLM(llm, end="none"), TEXTS), abs=1e-5
    )


def test_every_token_is_read_once(llm):
    lm = WordLM(llm)
    score_texts(lm, TEXTS)
    sequences = {()}
    tokenizer = load_tokenizer(llm.directory)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        sequences.update(tuple(ids[: i + 1]) for i in range(len(ids)))
    assert lm.num_tokens == len(sequences)  # BOS, and every token that something follows
    kept = [lm.text(text) for text in TEXTS]  # kept texts keep their tokens
    lm.ends(kept)
    before = lm.num_tokens
    lm.ends(kept)
    assert lm.num_tokens == before


def test_rows_that_were_dropped_are_computed_again(llm):
    lm, small = WordLM(llm), WordLM(llm, max_bytes=1)
    for text in TEXTS:
        for other in TEXTS:
            mine = small.text(text)
            both = small.ends([small.extend(mine, other), mine])
            mine = lm.text(text)
            expected = lm.ends([lm.extend(mine, other), mine])
            np.testing.assert_allclose(both, expected, atol=1e-4)


def test_texts_that_nobody_holds_are_forgotten(llm):
    lm = WordLM(llm, max_bytes=1)
    text = lm.start()
    for word in ["one", "two", "three", "four", "five", "six", "seven"]:
        text = lm.extend(text, word)
        lm.scores([text])
    used = lm.nbytes
    del text
    lm.scores([lm.text("a")])  # the last tokens whose next ones are kept
    gc.collect()
    assert lm.nbytes < used / 3


def test_lower_case(llm):
    assert score_texts(WordLM(llm, lowercase=True), ["The CAT"]) == pytest.approx(
        score_texts(WordLM(llm), ["the cat"]), abs=1e-5
    )


def test_text_that_is_no_token_at_all(llm):
    lm = WordLM(llm)
    assert lm.extend(lm.start(), "  ") is lm.start()
    assert lm.scores([lm.start()])[0] == 0.0


def test_llms_that_cannot_serve_are_refused(tmp_path, llm):
    with pytest.raises(UserError, match="end of sentence"):
        WordLM(llm, end="stop")
    with pytest.raises(UserError, match="temperature"):
        WordLM(llm, temperature=0.0)
    adapted = tmp_path / "adapted"
    save_adapted_dir(adapted, char_tokens())
    with pytest.raises(UserError, match="adapted to an ASR token list"):
        WordLM(str(adapted))


def test_llm_without_end_of_sentence(tmp_path):
    directory = tmp_path / "llm"
    save_llm_dir(directory)
    tokenizer = tiny_tokenizer("sentencepiece")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            import json

            config = json.loads((directory / name).read_text())
            config["eos_token_id"] = None
            (directory / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match="no end-of-sentence token"):
        WordLM(str(directory))
    WordLM(str(directory), end="newline")
