"""Sampling texts: from the model's distribution, the same for a seed, up to an end token."""

import itertools

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.sampling import Sample, sample_batches
from tests.llm.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def llm():
    tokenizer = tiny_tokenizer("sentencepiece")
    return tiny_model("llama", vocab_size=len(tokenizer)), tokenizer


def batches(llm, count, **options):
    options = {"seed": 3, "batch_size": 4, "max_tokens": 12, **options}
    return list(itertools.islice(sample_batches(*llm, **options), count))


def test_the_same_for_a_seed_and_another_for_another(llm):
    first = batches(llm, 3)
    assert [len(batch) for batch in first] == [4, 4, 4]
    torch.rand(7)  # what else the process draws does not matter
    assert batches(llm, 3) == first
    assert len({str(batch) for batch in first + batches(llm, 3, seed=4)}) == 6


def test_a_run_can_be_continued(llm):
    assert batches(llm, 2, first=1) == batches(llm, 3)[1:]


def test_the_process_generator_is_left_alone(llm):
    state = torch.random.get_rng_state()
    batches(llm, 1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_first_tokens_follow_the_models_distribution(llm, temperature):
    """Frequencies of 4,000 draws against softmax(logits / temperature), all tokens included."""
    model, tokenizer = llm

    class Ids:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        @staticmethod
        def decode(ids, skip_special_tokens):
            return str(ids[0]) if ids else "end"

    (samples,) = itertools.islice(
        sample_batches(model, Ids, seed=0, temperature=temperature, max_tokens=1, batch_size=4000),
        1,
    )
    logits = model(torch.tensor([[Ids.bos_token_id]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    ends = [Ids.bos_token_id, Ids.eos_token_id]
    counts = torch.zeros_like(expected)
    for sample in samples:
        counts[ends[1] if sample.text == "end" else int(sample.text)] += 1
    expected[ends[1]] += expected[ends[0]]
    expected[ends[0]] = 0
    error = (counts / 4000 - expected).abs()
    assert (error < 5 * (expected / 4000).sqrt() + 1e-3).all()


def test_texts_end_at_either_end_token(llm):
    """With the model's own beginning-of-sentence token as the end, as llama2.c's models have it."""
    model, tokenizer = llm
    output = model.get_output_embeddings()

    class Fixed(torch.nn.Module):
        """Wants one token, whatever comes before."""

        def __init__(self, token):
            super().__init__()
            self.weight = output.weight
            self.token = token

        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], len(self.weight))
            logits[..., self.token] = 100.0
            return logits

    word = tokenizer("cat", add_special_tokens=False)["input_ids"][0]
    found = {}
    for name, token in (("bos", 1), ("eos", 2), ("word", word)):
        model.set_output_embeddings(Fixed(token))
        found[name] = batches((model, tokenizer), 1, batch_size=1, max_tokens=3)[0][0]
    model.set_output_embeddings(output)
    assert found["bos"] == found["eos"] == Sample("", True)
    assert not found["word"].complete
    assert found["word"].text == tokenizer.decode([word] * 3)


def test_texts_fit_the_context(llm):
    (batch,) = batches(llm, 1, max_tokens=10_000)
    assert len(batch) == 4  # the tiny model has 64 positions


def test_bad_arguments(llm):
    for options, message in (
        ({"temperature": 0}, "temperature must be positive"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            batches(llm, 1, **options)
    tokenizer = tiny_tokenizer("sentencepiece")
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no beginning-of-sentence"):
        batches((llm[0], tokenizer), 1)
