"""bfloat16 for what is trained (``use_amp``), float32 for the loss."""

import pytest
import torch

from tests.transducer.tiny import batch, factorized, rnnt, save_llm


def make(kind, llm):
    if kind == "rnnt":
        return rnnt(acoustic_residual=True, ctc_weight=0.3)
    conf = {"predictor_conf": {"llm": llm}} if kind == "llm" else {}
    return factorized(predictor=kind, model_conf={"ctc_weight": 0.3}, **conf)


def loss_and_gradients(model, dtype):
    model.zero_grad()
    seen = []
    hook = model.encoder.linear.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, stats, _ = model(*batch())
    loss.sum().backward()
    hook.remove()
    assert seen == [dtype]
    return loss, {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["rnnt", "stateless", "lstm", "llm"])
def test_loss_and_gradients_are_those_of_float32(tmp_path, kind):
    model = make(kind, save_llm(tmp_path) if kind == "llm" else None)
    expected, gradients = loss_and_gradients(model, torch.float32)
    loss, rough = loss_and_gradients(model, torch.bfloat16)
    assert loss.dtype == torch.float32
    # 8 bits of mantissa: a difference of at most some parts in 2^8, and some difference
    assert not torch.equal(loss, expected)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    everything = [torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, rough)]
    assert torch.isfinite(everything[1]).all()
    assert torch.cosine_similarity(*everything, dim=0) > 0.995
    for name, value in rough.items():
        assert value.dtype == torch.float32, name
