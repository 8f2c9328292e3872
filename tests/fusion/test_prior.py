"""Priors: against sums written out, their file, and what they refuse."""

import math

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.prior import (
    PosteriorMean,
    Prior,
    count_labels,
    frame_prior,
    label_prior,
    load_prior,
    most_and_least,
    save_prior,
)

TOKENS = ["<blank>", "<unk>", "a", "b", "<sos/eos>"]


def test_mean_of_posteriors_is_over_real_frames():
    torch.manual_seed(0)
    log_probs = torch.randn(3, 6, 5).log_softmax(-1)
    lengths = [6, 2, 4]
    expected, frames = [0.0] * 5, 0
    for row, length in zip(log_probs.double(), lengths):
        for t in range(length):
            frames += 1
            for v in range(5):
                expected[v] += math.exp(row[t, v])
    estimate = PosteriorMean(5)
    estimate.add(log_probs[:1], torch.tensor(lengths[:1]))
    estimate.add(log_probs[1:], torch.tensor(lengths[1:]))
    assert estimate.frames == frames
    torch.testing.assert_close(
        estimate.mean, torch.tensor(expected, dtype=torch.float64) / frames, rtol=1e-6, atol=0
    )


def test_label_prior_has_no_blank_and_sums_to_one():
    prior = label_prior(torch.tensor([0.9, 0.0, 0.06, 0.03, 0.01]))
    assert prior.mode == "label" and float(prior.log_prior[0]) == 0.0
    assert prior.log_prior[1:].exp().tolist() == pytest.approx([0, 0.6, 0.3, 0.1], abs=1e-6)
    assert prior.of([2, 3, 3]) == pytest.approx(math.log(0.6) + 2 * math.log(0.3), rel=1e-5)


def test_frame_prior_keeps_blank():
    prior = frame_prior(torch.tensor([0.9, 0.0, 0.06, 0.03, 0.01]))
    assert prior.log_prior.exp().tolist() == pytest.approx([0.9, 0, 0.06, 0.03, 0.01], abs=1e-6)


def test_smoothed_counts():
    counts = count_labels([[2, 2, 3], [], [2]], 5)
    assert counts.tolist() == [0, 0, 3, 1, 0]
    prior = label_prior(counts, smoothing=0.1)
    expected = [0.1 / 4, 0.9 * 3 / 4 + 0.1 / 4, 0.9 / 4 + 0.1 / 4, 0.1 / 4]
    assert prior.log_prior[1:].exp().tolist() == pytest.approx(expected, rel=1e-5)


def test_file(tmp_path):
    prior = label_prior(torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0]))
    path = tmp_path / "prior.json"
    save_prior(prior, path, TOKENS, "a test")
    again = load_prior(path, TOKENS)
    assert again.mode == "label"
    torch.testing.assert_close(again.log_prior, prior.log_prior, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"prior.json.*than tokens.txt.*token 3 is 'b' against 'c'"):
        load_prior(path, [*TOKENS[:3], "c", TOKENS[4]], "tokens.txt")
    with pytest.raises(UserError, match="5 tokens against 6"):
        load_prior(path, [*TOKENS, "more"])
    path.write_text("[1")
    with pytest.raises(UserError, match="not a prior"):
        load_prior(path, TOKENS)
    with pytest.raises(UserError, match="not a prior"):
        load_prior(tmp_path / "absent", TOKENS)


def test_most_and_least_are_labels():
    prior = label_prior(torch.tensor([0.9, 0.01, 0.06, 0.03, 0.0]))
    assert most_and_least(prior, TOKENS, 1) == "most a -0.51; least <unk> -2.30"


def test_what_is_refused():
    with pytest.raises(UserError, match="mode 'word'"):
        Prior("word", torch.zeros(3))
    with pytest.raises(UserError, match="finite"):
        Prior("label", torch.tensor([0.0, -math.inf]))
    with pytest.raises(UserError, match="no label has any probability"):
        label_prior(torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(UserError, match="smoothing 2"):
        label_prior(torch.ones(3), smoothing=2)
    with pytest.raises(UserError, match="not one frame"):
        _ = PosteriorMean(3).mean
