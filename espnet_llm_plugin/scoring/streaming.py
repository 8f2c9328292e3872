"""What streaming costs: error rate, delay and compute time by chunk size, as table and plot."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence, Union

import numpy as np

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.table import markdown
from espnet_llm_plugin.scoring.wer import Summary

EXPLANATION = """\
Latency: algorithmic, from the beginning of a chunk to the last sample that its first frame depends
on. RTF: compute time per second of audio. Compute: of one chunk of audio. Shown / stable: from the
end of a token in the alignment to the moment when the audio had come that made it appear for good /
made it impossible to change, compute time not included.
"""


@dataclass(frozen=True)
class StreamingResult:
    """One test set at one chunk size.

    Attributes:
        test: Name of the test set.
        chunk_ms: Chunk size.
        latency_ms: Algorithmic latency.
        wer: Word errors.
        audio_seconds: Length of the test set.
        compute_ms: Compute time of each chunk.
        shown_ms: Delay of each aligned token until it was shown for good.
        stable_ms: Delay of each aligned token until it was stable.
        unaligned: Utterances without alignment.
    """

    test: str
    chunk_ms: float
    latency_ms: float
    wer: Summary
    audio_seconds: float
    compute_ms: np.ndarray
    shown_ms: np.ndarray
    stable_ms: np.ndarray
    unaligned: int

    @property
    def rtf(self) -> float:
        """Compute time per second of audio."""
        return float(self.compute_ms.sum()) / 1000 / self.audio_seconds

    def as_dict(self) -> dict[str, Any]:
        """All numbers of the table, comparable as JSON."""
        counts = self.wer.counts
        return {
            "test": self.test,
            "chunk_ms": self.chunk_ms,
            "latency_ms": self.latency_ms,
            "wer": self.wer.rate,
            "substitutions": counts.substitutions,
            "deletions": counts.deletions,
            "insertions": counts.insertions,
            "words": counts.words,
            "rtf": self.rtf,
            "compute_ms": _quantiles(self.compute_ms, maximum=True),
            "shown_ms": _quantiles(self.shown_ms),
            "stable_ms": _quantiles(self.stable_ms),
            "aligned_tokens": len(self.shown_ms),
            "unaligned_utterances": self.unaligned,
        }


def _quantiles(values: np.ndarray, maximum: bool = False) -> dict[str, float]:
    """Median, 95th percentile and perhaps the maximum; nothing of nothing."""
    if not len(values):
        return {}
    found = {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
    return {**found, "max": float(values.max())} if maximum else found


HEADER = (
    "test set",
    "chunk ms",
    "latency ms",
    "WER %",
    "sub / del / ins",
    "RTF",
    "compute ms: median / p95 / max",
    "shown ms: median / p95",
    "stable ms: median / p95",
)


def streaming_table(results: Sequence[StreamingResult]) -> str:
    """A Markdown table with one row a result, and what its columns mean."""

    def cell(quantiles: dict[str, float], digits: int) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in quantiles.values()) or "-"

    rows = []
    for result in results:
        found = result.as_dict()
        rows.append(
            (
                result.test,
                f"{result.chunk_ms:g}",
                f"{result.latency_ms:.5g}",
                f"{result.wer.rate:.2f}",
                f"{found['substitutions']} / {found['deletions']} / {found['insertions']}",
                f"{result.rtf:.4f}",
                cell(found["compute_ms"], 1),
                cell(found["shown_ms"], 0),
                cell(found["stable_ms"], 0),
            )
        )
    return f"{markdown(HEADER, rows)}\n{EXPLANATION}"


def plot_streaming(results: Sequence[StreamingResult], path: Union[str, Path]) -> None:
    """Draw WER against algorithmic latency, a line a test set; write a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(6, 4), dpi=150)
    axes = figure.subplots()
    for test in dict.fromkeys(result.test for result in results):
        points = sorted(
            (result.latency_ms, result.wer.rate, result.chunk_ms)
            for result in results
            if result.test == test
        )
        latencies, rates, chunks = zip(*points)
        axes.plot(latencies, rates, marker="o", label=test)
        for latency, rate, chunk in points:
            axes.annotate(
                f"{chunk:g}", (latency, rate), (0, 6), textcoords="offset points", ha="center"
            )
    axes.set_xlabel("algorithmic latency in ms (at the points: chunk in ms)")
    axes.set_ylabel("WER in %")
    axes.set_ylim(0, 1.15 * max(result.wer.rate for result in results) or 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path, "wb") as stream:
        stream.write(picture.getvalue())
