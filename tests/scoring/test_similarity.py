"""Similarity of audio and text embeddings, and its monotonicity."""

import io
import math

import numpy as np
import pytest

from espnet_llm_plugin.scoring.similarity import (
    alignment,
    best_positions,
    cosine_similarity,
    draw_similarity,
    monotonicity,
    similarity_png,
)

WIDTH = 32


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def spoken(rng, text, noise):
    """Audio in which every token lasts two or three positions, with a silence before it."""
    audio = []
    for vector in text:
        audio.append(0.1 * rng.standard_normal(WIDTH))
        audio += [vector + noise * rng.standard_normal(WIDTH)] * int(rng.integers(2, 4))
    return np.stack(audio)


def slow_cosine(audio, text):
    matrix = np.zeros((len(audio), len(text)))
    for p, a in enumerate(audio):
        for u, t in enumerate(text):
            norm = math.sqrt(sum(x * x for x in a) * sum(x * x for x in t))
            matrix[p, u] = sum(x * y for x, y in zip(a, t, strict=True)) / norm if norm else 0.0
    return matrix


def slow_spearman(positions):
    """Pearson's correlation of the ranks; tied positions share their mean rank."""

    def ranks(values):
        return [
            sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2
            for value in values
        ]

    a, b = ranks(range(len(positions))), ranks(positions)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    square_a = sum((x - mean_a) ** 2 for x in a)
    square_b = sum((y - mean_b) ** 2 for y in b)
    return covariance / math.sqrt(square_a * square_b)


def test_cosine_equals_slow_reference(rng):
    audio, text = rng.standard_normal((7, 5)), 3 * rng.standard_normal((4, 5))
    audio[2] = 0.0  # no direction, no NaN
    found = cosine_similarity(audio, text)
    np.testing.assert_allclose(found, slow_cosine(audio, text), atol=1e-12)
    assert found[2].tolist() == [0.0] * 4


def test_half_precision_input(rng):
    audio = (1000 * rng.standard_normal((3, 8))).astype(np.float16)  # squares overflow in float16
    assert cosine_similarity(audio, audio).diagonal() == pytest.approx(1.0)


def test_other_widths_are_refused(rng):
    with pytest.raises(ValueError, match=r"audio \(3, 4\) and text \(2, 5\)"):
        cosine_similarity(rng.standard_normal((3, 4)), rng.standard_normal((2, 5)))


@pytest.mark.parametrize("num_tokens", (3, 6, 15))
def test_monotonicity_equals_slow_reference_with_ties(rng, num_tokens):
    for _ in range(20):
        similarity = rng.standard_normal((4, num_tokens))
        positions = [int(np.argmax(similarity[:, u])) for u in range(num_tokens)]
        assert best_positions(similarity).tolist() == positions
        expected = slow_spearman(positions) if len(set(positions)) > 1 else 0.0
        assert monotonicity(similarity) == pytest.approx(expected)


def test_monotonicity_of_known_paths():
    forward = np.eye(5)
    assert monotonicity(forward) == pytest.approx(1.0)
    assert monotonicity(forward[::-1]) == pytest.approx(-1.0)
    assert monotonicity(forward[[1, 0, 2, 3, 4]]) == pytest.approx(0.9)
    everything_at_one_place = np.zeros((5, 5))
    everything_at_one_place[3] = 1.0
    assert monotonicity(everything_at_one_place) == 0.0


@pytest.mark.parametrize("shape", ((0, 5), (1, 5), (9, 0), (9, 1), (9, 2)))
def test_too_short_for_an_order(shape):
    assert monotonicity(np.ones(shape)) is None


def test_aligned_audio_is_monotone_and_that_of_others_is_not(rng):
    text = [rng.standard_normal((12, WIDTH)) for _ in range(30)]
    found = alignment([spoken(rng, words, noise=0.5) for words in text], text)
    assert found.utterances == 30
    assert found.paired > 0.95
    assert abs(found.mismatched) < 0.2
    deaf = alignment([rng.standard_normal((30, WIDTH)) for _ in text], text)
    assert abs(deaf.paired) < 0.2


def test_alignment_is_the_mean_and_leaves_short_utterances_out(rng):
    text = [rng.standard_normal((n, WIDTH)) for n in (5, 2, 7)]
    audio = [spoken(rng, words, noise=2.0) for words in text]
    found = alignment(audio, text)
    own = [monotonicity(cosine_similarity(audio[n], text[n])) for n in (0, 2)]
    other = [monotonicity(cosine_similarity(audio[m], text[n])) for n, m in ((0, 1), (2, 0))]
    assert found.utterances == 2
    assert (found.paired, found.mismatched) == pytest.approx((np.mean(own), np.mean(other)))


def test_alignment_of_too_little(rng):
    one, short = rng.standard_normal((9, WIDTH)), rng.standard_normal((2, WIDTH))
    assert alignment([one], [one]) is None
    assert alignment([one, one], [short, short]) is None
    with pytest.raises(ValueError, match="2 utterances of audio, 1 of text"):
        alignment([one, one], [one])


def test_picture(rng):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    text = rng.standard_normal((4, WIDTH))
    similarity = cosine_similarity(spoken(rng, text, noise=0.1), text)
    tokens = ["▁a", "b", "$", "ü"]
    assert imread(io.BytesIO(similarity_png(similarity, tokens))).ndim == 3
    axes = Figure().subplots()
    draw_similarity(axes, similarity, tokens, frame_ms=240)
    (marks,) = axes.get_lines()
    seconds = (best_positions(similarity) + 0.5) * 0.24
    np.testing.assert_allclose(marks.get_xydata(), np.stack([seconds, range(4)], 1))
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array(), similarity.T)
    assert image.get_extent() == pytest.approx([0, 0.24 * len(similarity), 3.5, -0.5])
    assert axes.get_xlabel() == "seconds"
    assert "rank correlation 1.00" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match="3 tokens for 4 columns"):
        similarity_png(similarity, tokens[:3])
