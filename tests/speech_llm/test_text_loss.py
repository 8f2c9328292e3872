"""The text's cross-entropy against ESPnet's label smoothing and torch's cross-entropy."""

import math

import pytest
import torch
from espnet.nets.pytorch_backend.nets_utils import th_accuracy
from espnet.nets.pytorch_backend.transformer.label_smoothing_loss import LabelSmoothingLoss

from espnet_llm_plugin.speech_llm.text_loss import text_loss

VOCAB = 9


def batch():
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 5, VOCAB, requires_grad=True)
    return logits, torch.randint(2, VOCAB, (3, 5)), torch.tensor([5, 2, 3])


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_equals_espnet(smoothing, by_length):
    logits, targets, lengths = batch()
    loss = text_loss(logits, targets, lengths, smoothing)
    padded = targets.masked_fill(torch.arange(5) >= lengths[:, None], -1)
    reference = LabelSmoothingLoss(VOCAB, -1, smoothing, normalize_length=by_length)
    expected = reference(logits, padded)
    entropy = -(1 - smoothing) * math.log(1 - smoothing)
    if smoothing:
        entropy -= smoothing * math.log(smoothing / (VOCAB - 1))
    constant = entropy if by_length else entropy * lengths.sum() / 3
    torch.testing.assert_close(loss.reduced(by_length), expected + constant)
    gradients = [
        torch.autograd.grad(value, logits, retain_graph=True)[0]
        for value in (loss.reduced(by_length), expected)
    ]
    torch.testing.assert_close(*gradients)
    if not smoothing:
        ce = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), padded.flatten(), ignore_index=-1
        )
        torch.testing.assert_close(loss.per_token(), ce)
    assert float(loss.accuracy()) == pytest.approx(th_accuracy(logits.view(-1, VOCAB), padded, -1))


def test_padding_has_no_effect():
    logits, targets, lengths = batch()
    inside = torch.arange(5) < lengths[:, None]
    other = text_loss(
        torch.where(inside[..., None], logits, 7.0),
        targets.masked_fill(~inside, 1),
        lengths,
        0.1,
    )
    torch.testing.assert_close(other, text_loss(logits, targets, lengths, 0.1))


def test_half_precision_of_the_model_is_not_that_of_the_loss():
    """A vocabulary of an LLM: the sum of its logits is beyond float16."""
    torch.manual_seed(0)
    logits = (torch.randn(1, 3, 40000) - 4).half()
    targets = torch.tensor([[3, 4, 5]])
    expected = text_loss(logits.float(), targets, torch.tensor([3]), 0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = text_loss(logits, targets, torch.tensor([3]), 0.1)
    assert loss.smoothed.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
