"""A picture of the error rates on the leaderboard's test sets."""

import io
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.scoring.leaderboard import (
    SPLITS,
    Leaderboard,
    average_corpora,
    average_splits,
)


def plot_leaderboard(board: Leaderboard, path: Union[str, Path]) -> None:
    """Draw the WER of each test set and both averages; write a PNG."""
    from matplotlib.figure import Figure

    bars = [(SPLITS[name].title, score.wer, "C0") for name, score in board.scores.items()]
    for what, average in (
        ("splits", average_splits(board.scores)),
        ("corpora", average_corpora(board.scores)),
    ):
        bars.append((f"mean, {len(average.over)} {what}", average.wer, "C7"))
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(bars)), dpi=150)
    axes = figure.subplots()
    for row, (_, wer, color) in enumerate(bars):
        axes.barh(row, wer, 0.7, color=color, alpha=0.8)
        axes.annotate(f"{wer:.2f}", (wer, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [title for title, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(wer for _, wer, _ in bars) or 1)
    axes.set_xlabel("WER in %")
    axes.set_title(board.title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path, "wb") as stream:
        stream.write(picture.getvalue())
