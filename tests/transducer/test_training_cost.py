"""The estimates that configurations state, and the script that they come from."""

import importlib
import re
import sys

import pytest
import torch
import yaml


@pytest.fixture
def cost(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield importlib.import_module("training_cost")
    sys.modules.pop("training_cost")


def test_gpu_hours_and_memory(cost):
    """The rows "CTC" and "FT weak" of egs2/librispeech/asr1/README.md."""
    assert round(cost.gpu_hours(86_000_000, 0.04, 50)) == 6
    assert round(cost.gpu_hours(95_000_000, 0.04, 30)) == 4
    assert cost.gigabytes(362_000_000) == pytest.approx(5.8, abs=0.05)


class Product(torch.nn.Module):
    """Keeps the samples, the product that it casts, and the exponentials."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.linear = torch.nn.Linear(3, 3)  # kept once, whatever the batch

    def forward(self, speech, **batch):
        constant = self.linear(torch.ones(1, 3)).sum()
        return (speech * self.weight).exp().sum() + constant, {}, None


def test_what_autograd_keeps_of_an_utterance(cost):
    assert cost.kept_bytes(Product(), 0.5) == 2 * 4 * 8000


def test_stated_estimates(cost, root):
    """Parameters are checked where the models are built (test_conf.py)."""
    paths = sorted((root / "conf/transducer").glob("*.yaml"))
    assert len(paths) >= 13
    for path in paths:
        text = path.read_text()
        comment = " ".join(re.findall("^# (.*)$", text, re.MULTILINE))
        conf = yaml.safe_load(text)
        parameters = 1e6 * int(re.search(r"(\d+) M parameters", comment)[1])
        found = re.search(
            r"AdamW ([\d.]+) GB, kept for the backward pass (\d+) MB per second of audio, "
            r"(\d+) GB for a batch of (\d+) s .* at least ([\d.]+) GPU hours",
            comment,
        )
        assert found, path.name
        weights, kept, batch, seconds, hours = map(float, found.groups())
        assert weights == pytest.approx(cost.gigabytes(parameters), abs=0.06), path.name
        assert seconds == conf["batch_bins"] / 16000
        assert batch == pytest.approx(kept * seconds / 1000, rel=0.04, abs=0.6), path.name
        expected = cost.gpu_hours(parameters, 0.04, conf["max_epoch"])
        assert hours == pytest.approx(expected, abs=0.06), path.name
