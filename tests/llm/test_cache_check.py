"""The check whether prefixes can share keys and values."""

import pytest
import torch

from espnet_llm_plugin.llm.state import PrefixLM
from tests.llm.test_state import full, state_of
from tests.llm.tiny import tiny_model


def test_a_model_that_ignores_its_cache_is_noticed(caplog):
    """Falls back on recomputation when stepwise logits are not those of the full forward."""

    class Ignores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model("llama")
            self.config, self.device, self.dtype = self.inner.config, "cpu", torch.float32

        def forward(self, input_ids, attention_mask=None, use_cache=False, **kwargs):
            return self.inner(input_ids=input_ids, use_cache=False)

    lm = PrefixLM(Ignores())
    assert not lm.uses_cache and "recomputed" in caplog.text
    logits, _ = lm.step([7], [state_of(lm, [3, 5])])
    torch.testing.assert_close(logits[0], full(lm.model.inner, [3, 5, 7]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_cache(dtype):
    model = tiny_model("llama").to(dtype)
    lm = PrefixLM(model)
    assert lm.uses_cache
    logits, _ = lm.step([7], [state_of(lm, [3, 5])])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], full(model, [3, 5, 7]).float(), atol=0.05, rtol=0.05)


def test_dropout_does_not_spoil_the_check():
    model = tiny_model("llama", attention_dropout=0.5).train()
    assert PrefixLM(model).uses_cache
    assert model.training
