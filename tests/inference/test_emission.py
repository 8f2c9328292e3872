"""When tokens were known: alignments against enumeration, and constructed partial results."""

import itertools

import numpy as np
import pytest
import torch

from espnet_llm_plugin.inference.emission import known_seconds, last_frames
from espnet_llm_plugin.inference.simulate import Piece
from espnet_llm_plugin.inference.streaming import Partial


def enumerate_last_frames(log_probs, tokens):
    """Of the best of all CTC paths that read as ``tokens``."""
    best = (-float("inf"), None)
    for path in itertools.product(range(log_probs.size(1)), repeat=len(log_probs)):
        runs = [(token, list(group)) for token, group in itertools.groupby(enumerate(path), _token)]
        if [token for token, _ in runs if token] != tokens:
            continue
        score = float(sum(log_probs[t, token] for t, token in enumerate(path)))
        if score > best[0]:
            best = (score, [group[-1][0] for token, group in runs if token])
    return best[1]


def _token(item):
    return item[1]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [2, 2], [1, 1, 2], [2, 1, 2], [1, 2, 1, 2, 1, 2]])
def test_alignment_is_the_best_of_all(tokens):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        log_probs = (3 * torch.randn(6, 3, generator=generator)).log_softmax(-1)
        assert last_frames(log_probs, tokens) == enumerate_last_frames(log_probs, tokens)


def test_too_few_frames_and_no_tokens():
    log_probs = torch.zeros(3, 4).log_softmax(-1)
    assert last_frames(log_probs, [1, 1, 2]) is None  # a blank must be between
    assert last_frames(log_probs, [1, 3, 2]) == [0, 1, 2]
    assert last_frames(log_probs, []) == [] == last_frames(log_probs[:0], [])


def piece(given, token_ids, num_stable):
    return Piece(given, 0.0, 0.0, [], Partial(list(token_ids), num_stable, "", ""))


def test_known_for_good_and_stable():
    pieces = [
        piece(0.1, [1], 0),
        piece(0.2, [1, 5], 0),  # 5 is taken back
        piece(0.3, [2, 5, 3], 0),  # and so is 1, for a while
        piece(0.4, [1, 2], 1),
        piece(0.5, [1, 2, 3, 9], 1),
        piece(0.6, [1, 2, 3], 3),
        piece(0.7, [], 0),  # the end of the stream
    ]
    shown, stable = known_seconds(pieces, [1, 2, 3, 4])
    np.testing.assert_array_equal(shown, [0.4, 0.4, 0.5, 0.7])
    np.testing.assert_array_equal(stable, [0.4, 0.6, 0.6, 0.7])
    assert known_seconds(pieces, [])[0].size == 0
