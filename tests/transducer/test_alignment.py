"""Best alignments, the blank on them, internal LMs: against slow references."""

import itertools
import math

import numpy as np
import pytest
import torch

from espnet_llm_plugin.transducer.alignment import AlignmentSums, best_alignment, transitions
from espnet_llm_plugin.transducer.base_model import trim
from espnet_llm_plugin.transducer.lattice import lattice_nll
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.unweighted_scores import lm_log_probs
from tests.transducer.tiny import batch, factorized, rnnt

MODELS = {
    "rnnt": rnnt,
    "residual": lambda: rnnt(acoustic_residual=True),
    "lstm": lambda: factorized(predictor="lstm"),
    "softmax": lambda: factorized(predictor="stateless", blank_norm="softmax", lm_scale=0.6),
}


def path_score(blank, label, frames):
    """log P of the alignment that emits the labels at these frames, cell by cell."""
    total, position = 0.0, 0
    for t in range(len(blank)):
        while position < len(frames) and frames[position] == t:
            total += label[t, position]
            position += 1
        total += blank[t, position]
    return total


def brute_force(blank, label):
    """The best of all alignments."""
    everything = itertools.combinations_with_replacement(range(len(blank)), label.shape[1])
    return max(everything, key=lambda frames: path_score(blank, label, frames))


@pytest.mark.parametrize("seed", range(12))
def test_best_alignment_is_the_best_of_all(seed):
    generator = np.random.default_rng(seed)
    frames, labels = int(generator.integers(1, 6)), int(generator.integers(0, 5))
    blank = np.log(generator.random((frames, labels + 1)))
    label = np.log(generator.random((frames, labels)))
    if seed % 3 == 0 and frames > 1:
        label[0], blank[-1, :-1] = -np.inf, -np.inf
    found = best_alignment(blank, label)
    assert tuple(found) == brute_force(blank, label)


def small_batch(model):
    speech, frames, text, lengths = batch(frames=(6, 4, 5), labels=((2, 3, 4), (1, 1), ()))
    encoder_out, frame_lengths = model.encode_frames(speech, frames)
    return trim(encoder_out, frame_lengths, text, lengths, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("kind", MODELS)
def test_transitions_make_the_likelihood_and_the_internal_lm(kind):
    model = MODELS[kind]().eval()
    with torch.no_grad():
        lattice = small_batch(model)
        found = transitions(model, lattice)
        nll = lattice_nll(found.blank, found.label, lattice.frame_lengths, lattice.text_lengths)
        torch.testing.assert_close(nll, model.lattice_nll(lattice)[0], atol=1e-4, rtol=1e-4)
    scorer = build_scorer(model)
    tree = PrefixTree(scorer.prefixes(), scorer.num_labels)
    texts = [
        tuple((row[:length] - 1).tolist())
        for row, length in zip(lattice.text, lattice.text_lengths.tolist())
    ]
    assert found.lm.tolist() == pytest.approx(lm_log_probs(tree, texts), abs=1e-4)


def test_sums_of_a_lattice_with_one_sensible_alignment():
    """Two labels in frame 1, one in frame 3, of five frames."""
    emit = [1, 1, 3]
    blank = np.full((5, 4), math.log(0.9))
    label = np.full((5, 3), math.log(0.001))
    for position, frame in enumerate(emit):
        blank[frame, position] = math.log(0.1 * (position + 1))
        label[frame, position] = math.log((1 - 0.1 * (position + 1)) * 0.5)
    sums = AlignmentSums()
    assert best_alignment(blank, label).tolist() == emit
    sums.add(blank, label, lm=-6.0, words=2)
    sums.add(np.log([[0.5], [0.7]]), np.zeros((2, 0)), lm=0.0, words=0)  # nothing was said
    report = sums.report()
    assert report["alignment"]["blank_at_labels"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert report["alignment"]["blank_elsewhere"] == pytest.approx((3 * 0.9 + 0.5 + 0.7) / 5)
    assert report["alignment"]["label_log_prob"] == pytest.approx(math.log(0.5))
    assert report["alignment"]["other_frames"] == 5
    assert report["internal_lm"] == {"word_perplexity": pytest.approx(math.exp(3)), "words": 2}
    assert AlignmentSums().report()["alignment"]["blank_elsewhere"] is None
