"""FastLlama: the same logits as the model's own forward, over all options of its families."""

import logging
import re

import pytest
import torch

from espnet_llm_plugin.llm import fast_llama
from espnet_llm_plugin.llm.fast_llama import FAMILIES, windows
from espnet_llm_plugin.llm.state import PrefixLM
from tests.llm.tiny import tiny_config, tiny_model

ROWS = ([3, 5, 7, 1, 2, 9, 4, 4, 11, 30, 6, 6], [8, 2, 2, 6, 5, 3], [36], [3, 5, 9, 1])
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
YARN = {**ROPE, "rope_type": "yarn"}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}
DYNAMIC = {**ROPE, "rope_type": "dynamic"}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0],
    "long_factor": [3.0, 4.0],
}
HALF_SLIDING = dict(
    use_sliding_window=True,
    sliding_window=3,
    layer_types=["sliding_attention", "full_attention"],
)

CASES = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tied": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one key/value head": ("llama", {"num_key_value_heads": 1}),
    "no shared heads": ("llama", {"num_key_value_heads": 4}),
    "head size": ("llama", {"head_dim": 8}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": ("qwen2", HALF_SLIDING),
    "qwen3": ("qwen3", {}),
    "qwen3 sliding": ("qwen3", HALF_SLIDING),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "mistral": ("mistral", {}),
    "mistral full": ("mistral", {"sliding_window": None}),
}


def stepwise(lm, rows=ROWS):
    """Logits after every token of every row, the rows side by side: ragged from the second on."""
    states, found = [None] * len(rows), []
    for position in range(max(map(len, rows))):
        live = [i for i, row in enumerate(rows) if position < len(row)]
        live = live[position % 2 :] or live  # the rows differ in length
        logits, new = lm.step([rows[i][position] for i in live], [states[i] for i in live])
        for i, state in zip(live, new):
            states[i] = state
        found.append(logits)
        kept = [i for i in range(len(rows)) if states[i] is not None]
        logits, _ = lm.step([1 + i for i in kept], [states[i] for i in kept])
        found.append(logits)
    return torch.cat(found)


def own_forward(model):
    lm = PrefixLM(model)
    lm._fast = None
    return lm


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "as stored"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_models_own_forward(case, fused, monkeypatch):
    family, options = CASES[case]
    model = tiny_model(family, **options)
    if not fused:
        monkeypatch.setattr(fast_llama, "MAX_FUSED_BYTES", 0)
    lm = PrefixLM(model)
    assert lm._fast is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", None)  # not even called
        found = stepwise(lm)
    expected = stepwise(own_forward(model))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype):
    model = tiny_model(family)
    exact = stepwise(PrefixLM(model))
    model = model.to(dtype)
    lm = PrefixLM(model)
    assert lm._fast is not None
    found, own = stepwise(lm), stepwise(own_forward(model))
    # as near to the exact logits as the model's own forward
    error, own_error = ((logits - exact).abs().max() for logits in (found, own))
    assert error <= 2 * own_error + 1e-3
    assert own_error < 0.5 * exact.std()


def test_no_copy_of_large_models(monkeypatch):
    model = tiny_model("qwen2")
    monkeypatch.setattr(fast_llama, "MAX_FUSED_BYTES", 0)
    held = PrefixLM(model)._fast
    own = {p.data_ptr() for p in model.parameters()}
    used = [held._embedding, held._norm, held._head[0]]
    for layer in held._layers:
        used += [layer.norm, layer.mlp_norm, layer.out[0], layer.down[0]]
        parts = [*layer.qkv, *layer.gate_up]
        used += [tensor for part in parts for tensor in part if tensor is not None]
    assert {tensor.data_ptr() for tensor in used} <= own


def test_weights_may_change_between_searches():
    model = tiny_model("llama")
    lm = PrefixLM(model)
    before = stepwise(lm)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(-2)
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    after = stepwise(lm)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, stepwise(own_forward(model)), atol=1e-5, rtol=1e-5)
    model.to(torch.bfloat16)  # the keys and values in the pool are of another type
    assert torch.isfinite(stepwise(lm)).all()


def test_usable_in_and_out_of_inference_mode():
    model = tiny_model("llama")
    with torch.inference_mode():
        lm = PrefixLM(model)
        inside = stepwise(lm)
    torch.testing.assert_close(stepwise(lm), inside.clone())


def test_dropout_in_training_is_the_models_own():
    model = tiny_model("llama", attention_dropout=0.5)
    lm = PrefixLM(model)
    exact = stepwise(lm)
    model.train()
    torch.manual_seed(0)
    assert (stepwise(lm) - exact).abs().max() > 0.01


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).base_model.model


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: tiny_model("gemma"), "model type gemma"),
        (lambda: tiny_model("gpt2"), "model type gpt2"),
        (lambda: tiny_model("llama", hidden_act="gelu"), "activation gelu"),
        (lambda: lora(tiny_model("llama")), "q_proj is a Linear"),
        (lambda: hooked(tiny_model("llama")), r"hooks on model.layers.0"),
    ],
)
def test_other_models_run_by_themselves(make, reason, caplog):
    model = make()
    assert re.search(reason, fast_llama.why_not_fast(model))
    lm = PrefixLM(model)
    assert lm._fast is None and lm.uses_cache and not caplog.messages
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3, 5, 9]])).logits[0, -1]
    state = None
    for token in (3, 5, 9):
        logits, (state,) = lm.step([token], [state])
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_computes_something_else_is_noticed(caplog):
    """As a version of transformers that gives an option a new meaning would."""
    model = tiny_model("llama")
    plain = type(model.model.norm).forward

    class Scaled(type(model.model.norm)):
        def forward(self, hidden_states):
            return 1.5 * plain(self, hidden_states)

    model.model.layers[1].input_layernorm.__class__ = Scaled
    with caplog.at_level(logging.WARNING):
        lm = PrefixLM(model)
    assert lm._fast is None and lm.uses_cache
    assert "decodes by its own forward: stepwise and full logits differ" in caplog.text


def test_windows():
    assert windows(tiny_config("llama")) == [None, None]
    assert windows(tiny_config("mistral")) == [3, 3]
    assert windows(tiny_config("qwen2")) == [None, None]
    assert windows(tiny_config("qwen3", **HALF_SLIDING)) == [3, None]
