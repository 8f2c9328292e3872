"""FastBloom: prefixes that share keys and values have the logits of the model's own forward."""

import re

import pytest
import torch

from espnet_llm_plugin.llm import fast_bloom
from espnet_llm_plugin.llm.state import PrefixLM
from tests.llm.test_fast_llama import stepwise
from tests.llm.tiny import tiny_model

CASES = {
    "bloom": {},
    "untied": {"tied": False},
    "heads that are no power of two": {"n_head": 3, "hidden_size": 15},
    "one layer": {"n_layer": 1},
    "normed residual": {"apply_residual_connection_post_layernorm": True},
}


def recomputed(model):
    """By the model's own forward over whole prefixes."""
    return PrefixLM(model, use_cache=False)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_models_own_forward(case, monkeypatch, caplog):
    model = tiny_model("bloom", **CASES[case])
    lm = PrefixLM(model)
    assert lm._fast is not None and lm.uses_cache and not caplog.messages
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", None)  # not even called
        found = stepwise(lm)
    assert lm.num_token_forwards == len(found)  # each token of each prefix once
    expected = stepwise(recomputed(model))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_beyond_256(dtype):
    """Which bfloat16 cannot tell apart, as one number."""
    model = tiny_model("bloom")
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(37, (600,), generator=generator)
    with torch.no_grad():
        exact = model(input_ids=row[None]).logits[0]
        model = model.to(dtype)
        own = model(input_ids=row[None]).logits[0].float()
    lm, state, found = PrefixLM(model), None, []
    for token in row.tolist():
        logits, (state,) = lm.step([token], [state])
        found.append(logits[0])
    found = torch.stack(found)
    error, own_error = ((logits - exact).abs().max() for logits in (found, own))
    assert error <= (2 * own_error + 1e-3 if dtype == torch.bfloat16 else 1e-4)
    assert own_error < exact.std()


def test_weights_may_change_between_searches():
    model = tiny_model("bloom")
    lm = PrefixLM(model)
    before = stepwise(lm)
    with torch.no_grad():
        model.transformer.h[1].self_attention.query_key_value.weight.mul_(-2)
    after = stepwise(lm)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, stepwise(recomputed(model)), atol=1e-5, rtol=1e-5)


def lora(model):
    from peft import LoraConfig, get_peft_model

    targets = ["query_key_value"]
    return get_peft_model(model, LoraConfig(target_modules=targets, r=2)).base_model.model


def hooked(model):
    model.transformer.h[0].register_forward_hook(lambda module, args, output: output)
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: tiny_model("llama"), "model type llama"),
        (lambda: lora(tiny_model("bloom")), "query_key_value is a Linear"),
        (lambda: hooked(tiny_model("bloom")), r"hooks on transformer.h.0"),
    ],
)
def test_other_models_run_by_themselves(make, reason):
    assert re.search(reason, fast_bloom.why_not_fast(make()))
