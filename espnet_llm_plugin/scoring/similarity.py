"""Do the audio embeddings of a speech LLM lie where the text embeddings do, in the same order?

The cosine similarities of the embeddings that an adapter makes of an utterance and of those of its
transcript, as plotted in arXiv 2307.11795: monotone where the LLM was given something like text,
without order where the audio says nothing to it. Monotonicity is the rank correlation of the
tokens and of the audio positions most similar to them; what it would be by chance shows the same
with the audio of another utterance.

P audio embeddings, U text tokens, D width of the embeddings. All arrays are of numpy.
"""

import io
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np

from espnet_llm_plugin.errors import UserError


def cosine_similarity(audio: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Similarities (P, U) of ``audio`` (P, D) and ``text`` (U, D); 0 for a vector of zeros.

    Raises:
        ValueError: The widths differ.
    """
    if audio.ndim != 2 or text.ndim != 2 or audio.shape[1] != text.shape[1]:
        raise ValueError(f"audio {audio.shape} and text {text.shape} are not (P, D) and (U, D)")
    return _normalised(audio) @ _normalised(text).T


def best_positions(similarity: np.ndarray) -> np.ndarray:
    """For each token of (P, U), P > 0, the audio position most similar to it: (U,).

    Of the tokens, not of the audio positions: each token was spoken somewhere, while silence has
    no token.
    """
    return similarity.argmax(axis=0)


def monotonicity(similarity: np.ndarray) -> Optional[float]:
    """Spearman's correlation of the tokens' order and their best audio positions.

    Args:
        similarity: (P, U).

    Returns:
        -1 to 1; 1: the tokens' positions are in the order of the text. 0 if all tokens have the
        same position. None for fewer than three tokens, of which two are in order half the time,
        or fewer than two audio positions.
    """
    if similarity.shape[0] < 2 or similarity.shape[1] < 3:
        return None
    positions = best_positions(similarity)
    if (positions == positions[0]).all():
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(np.arange(len(positions)), positions).statistic)


@dataclass(frozen=True)
class Alignment:
    """Mean monotonicity over utterances.

    Attributes:
        paired: Of the transcripts with their own audio.
        mismatched: Of the transcripts with the audio of another utterance; what chance gives.
        utterances: Of how many; those too short for a correlation do not count.
    """

    paired: float
    mismatched: float
    utterances: int


def alignment(audio: Sequence[np.ndarray], text: Sequence[np.ndarray]) -> Optional[Alignment]:
    """Compare the order of transcripts in their own audio and in another's.

    Args:
        audio: (P, D) of every utterance.
        text: (U, D) of every utterance.

    Returns:
        None if there are not two utterances, or all are too short.

    Raises:
        ValueError: Not as many texts as audios.
    """
    if len(audio) != len(text):
        raise ValueError(f"{len(audio)} utterances of audio, {len(text)} of text")
    if len(audio) < 2:
        return None
    others = [*audio[1:], audio[0]]
    pairs = [
        (monotonicity(cosine_similarity(own, words)), monotonicity(cosine_similarity(other, words)))
        for own, other, words in zip(audio, others, text)
    ]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return None
    paired, mismatched = np.mean(pairs, axis=0).tolist()
    return Alignment(paired, mismatched, len(pairs))


def similarity_png(
    similarity: np.ndarray, tokens: Sequence[str], frame_ms: Optional[float] = None
) -> bytes:
    """Heat map of (P, U), the best position of every token marked.

    Args:
        similarity: (P, U), P and U > 0.
        tokens: U labels.
        frame_ms: Milliseconds per audio position, for a scale in seconds; None: positions.

    Raises:
        UserError: matplotlib is not installed.
        ValueError: Not as many tokens as columns.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plots need matplotlib: pip install matplotlib") from error

    num_positions, num_tokens = similarity.shape
    if len(tokens) != num_tokens:
        raise ValueError(f"{len(tokens)} tokens for {num_tokens} columns")
    size = (min(4 + 0.06 * num_positions, 16), min(2 + 0.18 * num_tokens, 16))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    draw_similarity(axes, similarity, tokens, frame_ms)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_similarity(
    axes: Any, similarity: np.ndarray, tokens: Sequence[str], frame_ms: Optional[float]
) -> None:
    """Draw what :func:`similarity_png` shows: audio from left to right, text downwards."""
    num_positions, num_tokens = similarity.shape
    width = 1.0 if frame_ms is None else frame_ms / 1000
    image = axes.imshow(
        similarity.T,
        aspect="auto",
        interpolation="nearest",
        extent=(0, num_positions * width, num_tokens - 0.5, -0.5),
    )
    marks = (best_positions(similarity) + 0.5) * width
    axes.plot(marks, np.arange(num_tokens), ".", color="white", markeredgecolor="black")
    # "$" starts a formula in matplotlib's labels
    axes.set_yticks(range(num_tokens), [token.replace("$", r"\$") for token in tokens])
    axes.set_xlabel("audio embedding" if frame_ms is None else "seconds")
    order = monotonicity(similarity)
    if order is not None:
        axes.set_title(f"rank correlation {order:.2f}", loc="left")
    axes.figure.colorbar(image, ax=axes, label="cosine similarity")


def _normalised(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)
