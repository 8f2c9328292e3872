"""Scores of whole hypotheses against sums written out token by token."""

from types import SimpleNamespace

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.text_scorers import LLMTextScorer, end_tokens, label_scorer
from espnet_llm_plugin.llm import sequence_scores
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from tests.llm.tiny import char_tokens, save_adapted_dir, tiny_model, tiny_tokenizer

TEXTS = ["the cat sat", "", "Reading and singing", "a story"]


def entry(text, ids=()):
    return SimpleNamespace(text=text, token_ids=tuple(ids))


def by_token(model, ids, temperature=1.0):
    """One forward for each token, in double precision from the logits on."""
    total = 0.0
    for end in range(1, len(ids)):
        row = model(torch.tensor([ids[:end]])).logits[0, -1].double() / temperature
        total += float(row.log_softmax(-1)[ids[end]])
    return total


def scored(scorer, texts, **options):
    keys = list(dict.fromkeys(scorer.key(one) for one in texts))
    return dict(pair for batch in scorer.score_batches(keys, **options) for pair in batch)


@pytest.mark.parametrize("family,style", [("llama", "sentencepiece"), ("gpt2", "byte_level")])
@pytest.mark.parametrize("end", ["eos", "newline", "none"])
def test_llm_in_its_own_tokens(family, style, end):
    tokenizer = tiny_tokenizer(style)
    model = tiny_model(family, vocab_size=len(tokenizer) + 5)
    scorer = LLMTextScorer(model, tokenizer, "tiny", end=end, temperature=1.7)
    found = scored(scorer, [entry(text) for text in TEXTS], batch_size=3)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if end == "newline":
            ids = tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]
            if not text:  # by itself, sentencepiece puts a space before it
                ids = tokenizer("a\n", add_special_tokens=False)["input_ids"][1:]
        ids = [tokenizer.bos_token_id, *ids, *[tokenizer.eos_token_id] * (end == "eos")]
        assert found[text] == pytest.approx(by_token(model, ids, 1.7), rel=1e-5)
    if end == "none":
        assert found[""] == 0.0


def test_lower_case_and_spaces_make_one_key():
    tokenizer = tiny_tokenizer("byte_level")
    model = tiny_model("gpt2", vocab_size=len(tokenizer))
    scorer = LLMTextScorer(model, tokenizer, "tiny", lowercase=True)
    assert {scorer.key(entry(text)) for text in ("The  cat", "the cat ", "THE CAT")} == {"the cat"}
    scorer = LLMTextScorer(model, tokenizer, "tiny")
    assert scorer.key(entry("The cat")) == "The cat"


@pytest.mark.parametrize("end", ["eos", "none"])
def test_lm_over_asr_tokens(tmp_path, end):
    tokens = char_tokens()
    llm = save_adapted_dir(tmp_path / "llm", tokens)
    lm = CausalLLM(len(tokens), llm=str(llm), frozen=True).eval()
    scorer = label_scorer(lm, len(tokens), torch.device("cpu"), end=end)
    texts = [(4, 5, 3), (), (7, 2, 9, 9, 4)]
    found = scored(scorer, [entry("", ids) for ids in texts])
    sos = len(tokens) - 1
    for ids in texts:
        expected, state = 0.0, None
        for n, target in enumerate([*ids, *[sos] * (end == "eos")]):
            row, state = lm.score(torch.tensor([sos, *ids[:n]]), state, None)
            expected += float(row[target])
        assert found[ids] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_batches_fit_memory(monkeypatch):
    monkeypatch.setattr(sequence_scores, "LOGITS", 100)
    batches = list(sequence_scores.length_sorted_batches([3, 9, 1, 4, 30], 4, batch_size=3))
    assert batches == [[4], [1, 3], [0, 2]]


def test_what_is_refused():
    tokenizer = tiny_tokenizer("byte_level")
    model = tiny_model("gpt2", vocab_size=len(tokenizer))
    with pytest.raises(UserError, match="temperature 0"):
        LLMTextScorer(model, tokenizer, "tiny", temperature=0)
    scorer = LLMTextScorer(model, tokenizer, "tiny")
    with pytest.raises(UserError, match="the LM sees 20: x x"):
        list(scorer.score_batches(["x " * 20]))
    nothing = SimpleNamespace(eos_token_id=None)
    config = SimpleNamespace(get_text_config=lambda: nothing)
    with pytest.raises(UserError, match="LLM mine has no EOS.*--eos newline or --eos none"):
        end_tokens(nothing, config, "eos", "mine")

    def drops_lines(text, **_):
        return {"input_ids": [ord(c) for c in text.strip()]}

    with pytest.raises(UserError, match="has no line ends; use --eos eos or --eos none"):
        end_tokens(drops_lines, config, "newline", "mine")
    with pytest.raises(UserError, match="over the ASR tokens ends a text with <sos/eos>"):
        label_scorer(SimpleNamespace(), 5, torch.device("cpu"), end="newline")
