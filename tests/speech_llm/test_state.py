"""Keys and values of audio without padding: those that the LLM's own forward makes."""

import pytest
import torch

from espnet_llm_plugin.llm import fast_llama
from espnet_llm_plugin.speech_llm import prefix
from espnet_llm_plugin.speech_llm.interface import build_interface
from espnet_llm_plugin.speech_llm.sequence import length_mask
from tests.llm.test_fast_llama import CASES
from tests.speech_llm.held_llm import held

SIZE = 16
LENGTHS = torch.tensor([4, 6, 0, 3])
WINDOWS = ("mistral", "qwen2 sliding", "qwen3 sliding")


def start(interface):
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(4, 6, SIZE, generator=generator)
    soft = torch.randn(4, 2, SIZE, generator=generator)
    return interface.start(audio, LENGTHS, before=(3, 4), after=(5,), soft=soft)


def own_start(interface):
    """By the forward of the LLM itself."""
    fast, interface._fast = interface._fast, ()
    state = start(interface)
    interface._fast = fast
    return state


def assert_same_keys(found, expected, padding, **tolerance):
    lengths = LENGTHS + 5
    valid = length_mask(lengths, int(lengths.max()))
    valid = valid.flip(1) if padding == "left" else valid
    columns = valid.size(1)
    assert torch.equal(found._seen, valid) and torch.equal(found.positions, expected.positions)
    for mine, theirs in zip(found._keys.layers, expected._keys.layers, strict=True):
        for ours, own in zip(mine, theirs):
            ours, own = (x.transpose(1, 2)[:, :columns][valid] for x in (ours, own))
            torch.testing.assert_close(ours, own, **tolerance)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "as stored"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in WINDOWS])
def test_no_padding_and_no_output_of_the_last_layer(case, fused, monkeypatch):
    family, options = CASES[case]
    if not fused:
        monkeypatch.setattr(fast_llama, "MAX_FUSED_BYTES", 0)
    interface = build_interface("prefix", held(family, **options), {}).eval()
    start(interface)  # which checks the model
    assert interface._fast
    expected = own_start(interface)
    monkeypatch.setattr(prefix, "llm_outputs", None)  # not even called
    widths = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: widths.append(len(x)) or linear(x, *rest)
    )
    found = start(interface)
    assert set(widths) == {int(LENGTHS.sum()) + 4 * 5}
    assert_same_keys(found, expected, "right", atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        interface.step(torch.ones(4, dtype=torch.long), found)[0],
        interface.step(torch.ones(4, dtype=torch.long), expected)[0],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_paddings(mask, padding, dtype):
    llm = held("llama", num_hidden_layers=3)
    llm.model(torch.device("cpu")).to(dtype)
    interface = build_interface("prefix", llm, {"mask": mask, "padding": padding}).eval()
    found = start(interface)
    assert interface._fast
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    expected = own_start(interface)
    assert_same_keys(found, expected, padding, atol=tolerance, rtol=tolerance)


def test_a_training_llm_keeps_its_dropout():
    interface = build_interface("prefix", held("llama", attention_dropout=0.5), {}).eval()
    exact = start(interface)
    interface.llm.model(torch.device("cpu")).train()
    torch.manual_seed(0)
    dropped = start(interface)
    difference = dropped._keys.layers[1][0] - exact._keys.layers[1][0]
    assert difference[:, :, : exact._keys.used].abs().max() > 0.01
