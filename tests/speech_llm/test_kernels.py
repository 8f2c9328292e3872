"""Kinds of attention in a whole model: SDPA is used, eager is the same, others are refused."""

import pytest
import torch
from torch.nn import functional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from tests.speech_llm.tiny import batch, decoder, model
from tests.speech_llm.tiny_llm import save_adapted

INTERFACES = {
    "causal": {},
    "left": {"interface_conf": {"padding": "left"}},
    "bidirectional": {"interface_conf": {"mask": "bidirectional"}},
    "merged": {"interface": "merged"},
    "cross attention": {"interface": "cross_attention"},
}
OTHER_MASKS = [name for name in INTERFACES if name not in ("causal", "cross attention")]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


@pytest.fixture
def calls(monkeypatch):
    """Calls of torch's SDPA so far."""
    seen = []
    own = functional.scaled_dot_product_attention

    def counted(*args, **options):
        seen.append(args)
        return own(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    return seen


def trained(made):
    """Gradients of a ragged batch, after which it is in eval mode."""
    loss, _, _ = made.train()(*batch())
    loss.backward()
    made.eval()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@torch.no_grad()
def decoded(made):
    """Logits of three forced tokens of each utterance of a ragged batch, hypotheses branching."""
    speech, lengths, *_ = batch()
    audio = made.decoder.adapt(*made.encode(speech, lengths))
    state = made.decoder.start_after(audio)
    rows = []
    for tokens, parents in (([1, 1, 1], [0, 1, 2]), ([3, 4, 5, 6], [0, 0, 1, 2]), ([7] * 4, None)):
        parents = None if parents is None else torch.tensor(parents)
        logits, state = made.decoder.step(torch.tensor(tokens), state, parents)
        rows.append(logits)
    return torch.cat(rows)


@pytest.mark.parametrize("name", INTERFACES)
def test_sdpa_by_default_and_eager_is_the_same(llm, name, calls):
    made = model(llm, tuning="lora", **INTERFACES[name])
    gradients = trained(made)
    layers = made.decoder.llm.config.num_hidden_layers
    assert len(calls) >= layers  # in training
    calls.clear()
    logits = decoded(made)
    assert len(calls) >= 3 * layers  # and in each step

    other = model(llm, tuning="lora", attn_implementation="eager", **INTERFACES[name])
    assert other.decoder.llm.model().config._attn_implementation == "eager"
    calls.clear()
    expected = trained(other)
    # of these not all attention is the LLM's
    assert bool(calls) == (name in ("merged", "cross attention"))
    assert gradients.keys() == expected.keys() and len(expected) > 4
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, decoded(other), atol=1e-5, rtol=1e-4)


def have_flash():
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


@pytest.mark.parametrize("name", ["flash_attention_2", "no_such_attention"])
def test_an_attention_that_is_not_there(llm, name):
    if name == "flash_attention_2" and have_flash():
        pytest.skip("flash attention is there")
    made = model(llm, attn_implementation=name)
    with pytest.raises(UserError, match=f"{name}' cannot be used here .*CUDA GPU.*`sdpa`"):
        made(*batch())
    small = dict(model_type="llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match=f"{name}' cannot be used here"):
        CausalLLM(20, config=small, attn_implementation=name)


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_masks_that_flash_attention_lacks(llm, name):
    with pytest.raises(UserError, match="'flash_attention_2' knows no masks like those"):
        decoder(llm, attn_implementation="flash_attention_2", **INTERFACES[name])
