"""Choose the scales of a search on held-out utterances: the error rate at every point of a grid.

All points of the grid are searched side by side, for several utterances at once: an utterance is
encoded once, predictor and LM run once for a prefix whatever the number of points, and a frame is
one batch of tensors.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional, Protocol, Sequence

import jiwer
import torch
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.search_state import SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.prefix_tree import PrefixTree

AXES = ("alpha", "beta", "lm_weight", "label_bonus")
# Label scores computed at once: rows (utterances x points) x beam x labels; 4 bytes each, and a few
# tensors of this size. Many rows save calls of the predictor.
LABEL_SCORES = 4_000_000


class Search(Protocol):
    """``TransducerSearch`` or ``CTCSearch``."""

    takes_batches: bool
    beam_size: int
    num_labels: int

    def start(
        self,
        scales: Sequence[Scales],
        tree: Optional["PrefixTree"] = None,
        utterances: int = 1,
    ) -> SearchState: ...

    def step(
        self,
        state: SearchState,
        encoder_out: torch.Tensor,
        lengths: Optional[torch.Tensor] = None,
    ) -> SearchState: ...


@dataclass(frozen=True)
class Point:
    """A point of the grid and its word errors on the held-out set."""

    scales: Scales
    wer: float  # per cent
    insertions: int
    deletions: int
    substitutions: int
    words: int

    def as_dict(self, axes: Sequence[str]) -> dict:
        """The scales of ``axes``, and the errors."""
        errors = {name: value for name, value in vars(self).items() if name != "scales"}
        return {**{axis: getattr(self.scales, axis) for axis in axes}, **errors}


def used_axes(points: Sequence[Point], has_lm: bool) -> list[str]:
    """Scales that mean something: no alpha and beta without predictor LM, no weight without LM."""
    predictor = points[0].scales.alpha is not None
    used = {"alpha": predictor, "beta": predictor, "lm_weight": has_lm, "label_bonus": True}
    return [axis for axis in AXES if used[axis]]


def make_grid(
    alphas: Sequence[Optional[float]],
    betas: Sequence[float],
    lm_weights: Sequence[float],
    label_bonuses: Sequence[float],
) -> list[Scales]:
    """Every combination, without repetitions."""
    return [
        Scales(alpha, beta, lm_weight, bonus)
        for alpha, beta, lm_weight, bonus in itertools.product(
            *(dict.fromkeys(values) for values in (alphas, betas, lm_weights, label_bonuses))
        )
    ]


def search_grid(
    search: Search,
    encoded: Sequence[torch.Tensor],
    grid: Sequence[Scales],
    normalize_length: bool = False,
    side_by_side: Optional[int] = None,
) -> list[list[Hypothesis]]:
    """The best hypothesis of every utterance at every point.

    Args:
        search: Of the model.
        encoded: Encoder outputs (T, D) of N utterances.
        grid: P points.
        normalize_length: Rank by the score per symbol.
        side_by_side: Rows (utterances times points) searched at once; default: as many as memory
            allows.

    Returns:
        N lists of P hypotheses.
    """
    if not search.takes_batches and len(encoded) > 1:
        return [search_grid(search, [one], grid, normalize_length)[0] for one in encoded]
    if side_by_side is None:
        side_by_side = LABEL_SCORES // (search.beam_size * search.num_labels)
    lengths = torch.tensor([len(one) for one in encoded])
    padded = pad_sequence(list(encoded), batch_first=True)
    points = max(1, side_by_side // len(encoded))
    best: list[list[Hypothesis]] = [[] for _ in encoded]
    tree = None
    for first in range(0, len(grid), points):
        settings = grid[first : first + points]
        state = search.start(settings, tree, utterances=len(encoded))
        state = search.step(state, padded, lengths)
        tree = state.tree
        lists = state.nbest(1, normalize_length)
        for i, found in enumerate(best):
            found += [hyps[0] for hyps in lists[i * len(settings) : (i + 1) * len(settings)]]
    return best


def score_grid(
    grid: Sequence[Scales], references: Sequence[str], hypotheses: Sequence[Sequence[str]]
) -> list[Point]:
    """Word errors of every point (by jiwer).

    Args:
        grid: P points.
        references: Of N utterances.
        hypotheses: N lists of P texts.

    Raises:
        UserError: The references have no words.
    """
    words = sum(len(reference.split()) for reference in references)
    if words == 0:
        raise UserError("the reference text has no words: scales cannot be tuned on it")
    points = []
    for p, scales in enumerate(grid):
        insertions = deletions = substitutions = 0
        texts = [texts[p] for texts in hypotheses]
        # jiwer refuses empty references: every word of such a hypothesis is an insertion
        filled = [(r, h) for r, h in zip(references, texts) if r.split()]
        insertions = sum(len(h.split()) for r, h in zip(references, texts) if not r.split())
        result = jiwer.process_words(*map(list, zip(*filled)))
        insertions += result.insertions
        deletions, substitutions = result.deletions, result.substitutions
        errors = insertions + deletions + substitutions
        points.append(
            Point(scales, 100 * errors / words, insertions, deletions, substitutions, words)
        )
    return points


def best_point(points: Sequence[Point]) -> Point:
    """Lowest error rate; of equal ones the one whose neighbours in the grid are best.

    A point that wins by chance has bad neighbours.
    """
    lowest = min(point.wer for point in points)
    tied = [point for point in points if point.wer == lowest]
    return min(tied, key=lambda point: _mean_wer_around(point, points))


def _mean_wer_around(centre: Point, points: Sequence[Point]) -> float:
    near = []
    for point in points:
        differing = [
            axis for axis in AXES if getattr(point.scales, axis) != getattr(centre.scales, axis)
        ]
        if not differing or (
            len(differing) == 1 and _are_next(centre, point, differing[0], points)
        ):
            near.append(point.wer)
    return sum(near) / len(near)


def _are_next(a: Point, b: Point, axis: str, points: Sequence[Point]) -> bool:
    values = axis_values(points, axis)
    return abs(values.index(getattr(a.scales, axis)) - values.index(getattr(b.scales, axis))) == 1


def axis_values(points: Sequence[Point], axis: str) -> list:
    """Sorted distinct values of an axis of the grid."""
    return sorted({getattr(point.scales, axis) for point in points})


def edges(best: Point, points: Sequence[Point]) -> list[str]:
    """Axes on which the best point is at an end of the grid: the optimum may lie outside."""
    found = []
    for axis in AXES:
        values = axis_values(points, axis) if getattr(best.scales, axis) is not None else []
        # 0 is a natural end of every scale but the bonus.
        low_is_end = axis != "label_bonus" and bool(values) and values[0] == 0
        if len(values) > 1 and (
            getattr(best.scales, axis) == values[-1]
            or (getattr(best.scales, axis) == values[0] and not low_is_end)
        ):
            found.append(axis)
    return found


def table(points: Sequence[Point]) -> str:
    """All points as text, best first; axes with one value are left out."""
    axes = [axis for axis in AXES if len({getattr(p.scales, axis) for p in points}) > 1]
    rows = [[*axes, "WER", "ins", "del", "sub"]]
    for point in sorted(points, key=lambda point: point.wer):
        rows.append(
            [f"{getattr(point.scales, axis):g}" for axis in axes]
            + [f"{point.wer:.2f}"]
            + [str(n) for n in (point.insertions, point.deletions, point.substitutions)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) + "\n" for row in rows
    )


def heat_map(points: Sequence[Point], best: Point):
    """Matplotlib figure of the WER over two axes at the best values of the others.

    Returns:
        The figure, or None if less than two axes have several values.
    """
    axes = [axis for axis in AXES if len({getattr(p.scales, axis) for p in points}) > 1][:2]
    if len(axes) < 2:
        return None
    from matplotlib.figure import Figure

    rows, columns = axis_values(points, axes[0]), axis_values(points, axes[1])
    others = [axis for axis in AXES if axis not in axes]
    at_best = {
        (getattr(p.scales, axes[0]), getattr(p.scales, axes[1])): p.wer
        for p in points
        if all(getattr(p.scales, axis) == getattr(best.scales, axis) for axis in others)
    }
    figure = Figure(figsize=(1.5 + 0.8 * len(columns), 1.5 + 0.6 * len(rows)), layout="tight")
    plot = figure.add_subplot()
    image = plot.imshow([[at_best[r, c] for c in columns] for r in rows], cmap="viridis_r")
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            weight = "bold" if at_best[r, c] == best.wer else "normal"
            plot.text(j, i, f"{at_best[r, c]:.1f}", ha="center", va="center", weight=weight)
    plot.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    plot.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    plot.set_xlabel(axes[1])
    plot.set_ylabel(axes[0])
    fixed = [
        f"{axis} {getattr(best.scales, axis):g}"
        for axis in others
        if getattr(best.scales, axis) is not None
    ]
    plot.set_title("WER [%], " + ", ".join(fixed), fontsize="medium")
    figure.colorbar(image)
    return figure
