"""Choose the scales of a search on held-out utterances: the error rate at every point of a grid.

All points of the grid are searched side by side, for several utterances at once: an utterance is
encoded once, predictor and LM run once for a prefix whatever the number of points, and a frame is
one batch of tensors.
"""

import itertools
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Collection,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Union,
)

import jiwer
import torch
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.joint_sum import JointWeights
from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.search_state import SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.prefix_tree import PrefixTree

# Of a transducer or CTC, of a speech LLM, of an attention decoder; all name what is tuned in AXES.
AnyScales = Union[Scales, SearchWeights, JointWeights]
ILM_WEIGHT = "ilm_weight"  # beta of an RNN-T, with the other sign
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

    scales: AnyScales
    wer: float  # per cent
    insertions: int
    deletions: int
    substitutions: int
    words: int

    def scales_of(self, axes: Sequence[str]) -> dict[str, float]:
        """The scales of ``axes`` by the names of the options of decoding."""
        return {name_of(axis, self.scales): value_of(axis, self.scales) for axis in axes}

    def as_dict(self, axes: Sequence[str]) -> dict[str, Any]:
        """The scales of ``axes``, and the errors."""
        errors = {name: value for name, value in vars(self).items() if name != "scales"}
        return {**self.scales_of(axes), **errors}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Point":
        """What :meth:`as_dict` made; scales that it lacks have no effect."""
        values = dict(values)
        kind = SearchWeights if "textlm_weight" in values else Scales
        kind = JointWeights if "ctc_weight" in values and kind is Scales else kind
        scales = {name: values.pop(name) for name in kind.AXES if name in values}
        if ILM_WEIGHT in values:
            scales["beta"] = 0.0 - values.pop(ILM_WEIGHT)
        return cls(kind(**scales), **values)


def name_of(axis: str, scales: AnyScales) -> str:
    """The option of decoding: without predictor LM, beta is the internal LM's weight below zero."""
    return ILM_WEIGHT if axis == "beta" and scales.alpha is None else axis


def value_of(axis: str, scales: AnyScales) -> float:
    """The value of that option."""
    value = getattr(scales, axis)
    return value if name_of(axis, scales) == axis else 0.0 - value


def used_axes(points: Sequence[Point], has_lm: bool) -> list[str]:
    """Scales that mean something: no alpha and beta without predictor LM, no weight without LM."""
    used = {"lm_weight": has_lm, "prior_weight": any(_prior_weight(point) for point in points)}
    if isinstance(points[0].scales, Scales):
        predictor = points[0].scales.alpha is not None
        subtracts = any(point.scales.beta for point in points)
        used.update(alpha=predictor, beta=predictor or subtracts)
    return [axis for axis in axes_of(points) if used.get(axis, True)]


def _prior_weight(point: Point) -> float:
    return getattr(point.scales, "prior_weight", 0.0)


def axes_of(points: Sequence[Point]) -> tuple[str, ...]:
    """What can be tuned in points of a grid."""
    return points[0].scales.AXES


def make_grid(
    alphas: Sequence[Optional[float]],
    betas: Sequence[float],
    lm_weights: Sequence[float],
    label_bonuses: Sequence[float],
    prior_weights: Sequence[float] = (0.0,),
) -> list[Scales]:
    """Every combination, without repetitions."""
    return [
        Scales(alpha, beta, lm_weight, bonus, prior_weight=prior_weight)
        for alpha, beta, lm_weight, bonus, prior_weight in itertools.product(
            *map(dict.fromkeys, (alphas, betas, lm_weights, label_bonuses, prior_weights))
        )
    ]


class GridLists(NamedTuple):
    """N-best lists of an utterance at P points, and the prefixes of the search."""

    lists: list[list[Hypothesis]]
    tree: "PrefixTree"


def search_grid(
    search: Search,
    encoded: Sequence[torch.Tensor],
    grid: Sequence[Scales],
    normalize_length: bool = False,
    side_by_side: Optional[int] = None,
) -> list[list[Hypothesis]]:
    """The best hypothesis of every utterance at every point; arguments of :func:`search_lists`.

    Returns:
        N lists of P hypotheses.
    """
    found = search_lists(search, encoded, grid, 1, normalize_length, side_by_side)
    return [[hyps[0] for hyps in utterance.lists] for utterance in found]


def search_lists(
    search: Search,
    encoded: Sequence[torch.Tensor],
    grid: Sequence[Scales],
    nbest: int,
    normalize_length: bool = False,
    side_by_side: Optional[int] = None,
) -> list[GridLists]:
    """The n-best lists of every utterance at every point.

    Args:
        search: Of the model.
        encoded: Encoder outputs (T, D) of N utterances.
        grid: P points.
        nbest: Length of the lists at most; the beam bounds it too.
        normalize_length: Rank by the score per symbol.
        side_by_side: Rows (utterances times points) searched at once; default: as many as memory
            allows.

    Returns:
        Of the N utterances; those searched together share a tree.
    """
    if not search.takes_batches and len(encoded) > 1:
        return [search_lists(search, [one], grid, nbest, normalize_length)[0] for one in encoded]
    if side_by_side is None:
        side_by_side = LABEL_SCORES // (search.beam_size * search.num_labels)
    lengths = torch.tensor([len(one) for one in encoded])
    padded = pad_sequence(list(encoded), batch_first=True)
    points = max(1, side_by_side // len(encoded))
    found: list[list[list[Hypothesis]]] = [[] for _ in encoded]
    tree = None
    for first in range(0, len(grid), points):
        settings = grid[first : first + points]
        state = search.start(settings, tree, utterances=len(encoded))
        state = search.step(state, padded, lengths)
        tree = state.tree
        lists = state.nbest(nbest, normalize_length)
        for i, mine in enumerate(found):
            mine += lists[i * len(settings) : (i + 1) * len(settings)]
    return [GridLists(lists, tree) for lists in found]


def score_grid(
    grid: Sequence[AnyScales], references: Sequence[str], hypotheses: Sequence[Sequence[str]]
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


def best_point(
    points: Sequence[Point], candidates: Optional[Collection[AnyScales]] = None
) -> Point:
    """Lowest error rate; of equal ones the one whose neighbours in the grid are best.

    A point that wins by chance has bad neighbours.

    Args:
        points: Of the grid.
        candidates: The scales to choose from; default: all.
    """
    some = [point for point in points if candidates is None or point.scales in candidates]
    lowest = min(point.wer for point in some)
    tied = [point for point in some if point.wer == lowest]
    return min(tied, key=lambda point: _mean_wer_around(point, points))


def _mean_wer_around(centre: Point, points: Sequence[Point]) -> float:
    near = []
    for point in points:
        differing = [
            axis
            for axis in axes_of(points)
            if getattr(point.scales, axis) != getattr(centre.scales, axis)
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
    for axis in axes_of(points):
        values = axis_values(points, axis) if getattr(best.scales, axis) is not None else []
        value = getattr(best.scales, axis)
        # 0 is a natural end of every scale but the bonus; the internal LM's weight is -beta.
        natural = values[:1] if name_of(axis, best.scales) == axis else values[-1:]
        if not axis.endswith("bonus") and axis != "penalty" and value == 0 and natural == [0]:
            continue
        if len(values) > 1 and value in (values[0], values[-1]):
            found.append(name_of(axis, best.scales))
    return found


def _varied(points: Sequence[Point]) -> list[str]:
    return [axis for axis in axes_of(points) if len(axis_values(points, axis)) > 1]


def table(points: Sequence[Point], reranked: Collection[Scales] = ()) -> str:
    """All points as text, best first; axes with one value are left out.

    Args:
        reranked: Scales whose errors come from n-best lists, marked by ``~`` and listed last.
    """
    axes = _varied(points)
    rows = [[*(name_of(axis, points[0].scales) for axis in axes), "WER", "ins", "del", "sub"]]
    for point in sorted(points, key=lambda point: (point.scales in reranked, point.wer)):
        rows.append(
            [f"{value_of(axis, point.scales):g}" for axis in axes]
            + [("~" if point.scales in reranked else "") + f"{point.wer:.2f}"]
            + [str(n) for n in (point.insertions, point.deletions, point.substitutions)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) + "\n" for row in rows
    )


def heat_map(points: Sequence[Point], best: Point, reranked: Collection[Scales] = ()):
    """Matplotlib figure of the WER over two axes at the best values of the others.

    Args:
        reranked: Scales whose errors come from n-best lists, marked by ``~``.

    Returns:
        The figure, or None if less than two axes have several values.
    """
    axes = _varied(points)[:2]
    if len(axes) < 2:
        return None
    from matplotlib.figure import Figure

    rows, columns = axis_values(points, axes[0]), axis_values(points, axes[1])
    others = [axis for axis in axes_of(points) if axis not in axes]
    at_best = {
        (getattr(p.scales, axes[0]), getattr(p.scales, axes[1])): p
        for p in points
        if all(getattr(p.scales, axis) == getattr(best.scales, axis) for axis in others)
    }
    figure = Figure(figsize=(1.5 + 0.8 * len(columns), 1.5 + 0.6 * len(rows)), layout="tight")
    plot = figure.add_subplot()
    image = plot.imshow([[at_best[r, c].wer for c in columns] for r in rows], cmap="viridis_r")
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            point = at_best[r, c]
            mark = "~" if point.scales in reranked else ""
            weight = "bold" if not mark and point.wer == best.wer else "normal"
            style = {"weight": weight, "color": "white" if image.norm(point.wer) > 0.6 else "black"}
            plot.text(j, i, f"{mark}{point.wer:.1f}", ha="center", va="center", **style)
    plot.set_xticks(
        range(len(columns)), [f"{value_of(axes[1], at_best[rows[0], c].scales):g}" for c in columns]
    )
    plot.set_yticks(
        range(len(rows)), [f"{value_of(axes[0], at_best[r, columns[0]].scales):g}" for r in rows]
    )
    plot.set_xlabel(name_of(axes[1], best.scales))
    plot.set_ylabel(name_of(axes[0], best.scales))
    fixed = [
        f"{name_of(axis, best.scales)} {value_of(axis, best.scales):g}"
        for axis in others
        if getattr(best.scales, axis) is not None
    ]
    title = ", ".join(["WER [%]", *fixed]) + (
        "\n~ re-ranked n-best lists: optimistic" if reranked else ""
    )
    plot.set_title(title, fontsize="medium")
    figure.colorbar(image)
    return figure
