"""The language from the encoder's output."""

import math

import pytest
import torch

from espnet_llm_plugin.speech_llm.language_head import LanguageHead
from espnet_llm_plugin.speech_llm.languages import Languages

CODES = ["en", "de", "to"]


@pytest.fixture
def head():
    return LanguageHead(Languages(CODES), 5)


@pytest.fixture
def outputs():
    return torch.randn(4, 7, 5), torch.tensor([7, 3, 1, 0])


def slow_logits(head, outputs):
    encoder_out, lengths = outputs
    found = torch.zeros(4, 3, dtype=torch.float64)
    for i, n in enumerate(lengths.tolist()):
        for k, code in enumerate(CODES):
            row = getattr(head, f"lang_{code}").detach().double()
            mean = encoder_out[i, :n].double().mean(0) if n else torch.zeros(5).double()
            found[i, k] = (mean * row[:5]).sum() + row[5]
    return found


def test_logits(head, outputs):
    expected = slow_logits(head, outputs)
    found = head(*outputs)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(head.predict(*outputs), expected.argmax(1))
    # in half precision too, whatever is in the padding
    encoder_out, lengths = outputs
    noisy = encoder_out.masked_fill(torch.arange(7)[:, None] >= lengths[:, None, None], math.inf)
    torch.testing.assert_close(head(noisy, lengths), found)


def test_loss_is_that_of_known_languages(head, outputs):
    languages = torch.tensor([2, 3, 0, -1])  # 3: unknown, -1: not given
    loss, accuracy = head.loss(*outputs, languages)
    log_probs = slow_logits(head, outputs).log_softmax(1)
    assert float(loss) == pytest.approx(float(-(log_probs[0, 2] + log_probs[2, 0]) / 2), rel=1e-5)
    best = log_probs.argmax(1)
    assert float(accuracy) == (int(best[0] == 2) + int(best[2] == 0)) / 2


def test_no_language_is_known(head, outputs):
    loss, accuracy = head.loss(*outputs, torch.tensor([3, -1, 3, -1]))
    assert float(loss) == 0.0 and math.isnan(float(accuracy))
    loss.backward()  # distributed training expects a gradient
    assert all(p.grad is not None for p in head.parameters())
