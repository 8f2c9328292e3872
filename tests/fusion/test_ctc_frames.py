"""Merged frames and kept labels against plain loops over the definitions."""

import pytest
import torch

from espnet_llm_plugin.fusion.ctc_frames import compress_frames, keep_labels
from espnet_llm_plugin.fusion.ctc_prefix_scorer import CTCPrefixScorer


def peaky(shape, seed=0):
    """Posteriors with runs of one label, sure and unsure."""
    generator = torch.Generator().manual_seed(seed)
    batch, frames, labels = shape
    runs = torch.randint(labels, (batch, -(-frames // 3)), generator=generator)
    best = runs.repeat_interleave(3, 1)[:, :frames]
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    height = torch.rand((batch, frames, 1), generator=generator, dtype=torch.float64) * 8
    logits.scatter_add_(2, best[:, :, None], height)
    return logits.log_softmax(-1)


def segments_by_the_book(probabilities, threshold):
    """Lists of the frames of each segment, for one utterance (T, V)."""
    segments = [[0]] if len(probabilities) else []
    best = [(int(row.argmax()), float(row.max()) >= threshold) for row in probabilities]
    for t in range(1, len(best)):
        same_label = best[t][0] == best[t - 1][0]
        if same_label and best[t][1] and best[t - 1][1]:
            segments[-1].append(t)
        else:
            segments.append([t])
    return segments


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("length", [40, 22, 1, 0])
def test_compression_by_the_book(threshold, length):
    log_probs = peaky((1, 40, 6))[0, :length]
    compressed = compress_frames(log_probs, threshold)
    expected = segments_by_the_book(log_probs.exp(), threshold)
    assert compressed.shape == (len(expected), 6)
    for row, frames in zip(compressed, expected):
        best = log_probs[frames].exp().amax(0)
        torch.testing.assert_close(row.exp(), best / best.sum())
    assert len(expected) < length or length < 2


def test_a_threshold_that_nothing_reaches_changes_nothing():
    log_probs = peaky((1, 10, 5))[0].clamp(min=-20).log_softmax(-1)
    torch.testing.assert_close(compress_frames(log_probs, 1.0), log_probs)


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("length", [12, 5])
def test_kept_labels_by_the_book(top_k, length):
    log_probs = peaky((1, 12, 10), seed=3)[0, :length]
    before = log_probs.clone()
    kept, labels = keep_labels(log_probs, top_k, (2, 9))
    highest = log_probs.amax(0).tolist()
    order = sorted(set(range(10)) - {2, 9}, key=lambda v: -highest[v])
    assert labels.tolist() == sorted([*order[:top_k], 2, 9])
    part = log_probs[:, labels].exp()
    torch.testing.assert_close(kept, (part / part.sum(-1, keepdim=True)).log())
    torch.testing.assert_close(log_probs, before, rtol=0, atol=0)


def test_a_frame_without_any_kept_label_is_impossible():
    log_probs = torch.full((3, 6), -torch.inf)
    log_probs[[0, 2], 1] = 0.0
    log_probs[1, [3, 4]] = torch.tensor([0.6, 0.4]).log()
    kept, labels = keep_labels(log_probs, 1, (0, 5))
    assert labels.tolist() == [0, 1, 5]
    assert kept[:, 1].tolist() == [0.0, -float("inf"), 0.0]
    scorer = CTCPrefixScorer(log_probs[None], torch.tensor([3]), top_k=1)
    scores = scorer.next_log_probs(scorer.initial_state())
    assert not scores.isnan().any()
    state = scorer.extend(scorer.initial_state(), torch.tensor([0]), torch.tensor([1]))
    assert scorer.end_log_probs(state).item() == -float("inf")


def test_as_many_labels_as_there_are_leave_the_posteriors_alone():
    log_probs = peaky((2, 8, 6))
    scorer = CTCPrefixScorer(log_probs, torch.tensor([8, 5]), top_k=4)
    assert scorer.log_probs is log_probs
    assert scorer.labels.tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_reductions_equal_the_scorer_of_reduced_posteriors(dtype):
    """Compression first, then top-k, then the unreduced scorer on what is left."""
    log_probs = peaky((2, 40, 12)).to(dtype)
    lengths = torch.tensor([40, 31])
    both = CTCPrefixScorer(log_probs, lengths, top_k=4, compress_threshold=0.7)
    assert both.labels.shape == (2, 6)
    assert (both.lengths < lengths).all()
    state = both.extend(both.initial_state(), torch.tensor([0, 1]), both.labels[:, 2])
    scores = both.next_log_probs(state)
    for b in range(2):
        frames = log_probs[b, : lengths[b]].exp()
        segments = segments_by_the_book(frames, 0.7)
        best = torch.stack([frames[s].amax(0) for s in segments])
        best = best / best.sum(-1, keepdim=True)
        highest = best.amax(0).tolist()
        order = sorted(range(1, 11), key=lambda v: -highest[v])
        kept = sorted([0, *order[:4], 11])
        assert both.labels[b].tolist() == kept
        left = best[:, kept] / best[:, kept].sum(-1, keepdim=True)
        plain = CTCPrefixScorer(left.log()[None], torch.tensor([len(segments)]))
        single = plain.extend(plain.initial_state(), torch.tensor([0]), torch.tensor([2]))
        torch.testing.assert_close(scores[b], plain.next_log_probs(single)[0])
