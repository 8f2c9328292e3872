"""The plots of an experiment's diagnosis."""

import io
from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.signatures import swap_rates

if TYPE_CHECKING:
    from espnet_llm_plugin.scoring.signatures import Evidence

_ABOVE = {"textcoords": "offset points", "ha": "center"}


Panel = Callable[[Any, "Evidence"], None]  # draws into axes


def diagnosis_png(evidence: "Evidence", more: Sequence[Panel] = ()) -> bytes:
    """Panels of what was measured, two in a row.

    Args:
        evidence: What was measured.
        more: Further panels.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plots need matplotlib: pip install matplotlib") from error

    panels: list[Panel] = [errors_by_length, *more]
    if evidence.blank_at_labels is not None:
        panels.append(blank_probability)
    if evidence.nbest is not None and len(evidence.nbest.oracle) > 1:
        panels.append(oracle)
    if evidence.tuned is not None:
        panels.append(weak_and_strong)
    if len(evidence.epochs) > 1:
        panels.append(losses)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3.4 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for panel, where in zip(panels, axes):
        panel(where, evidence)
        where.spines[["top", "right"]].set_visible(False)
    for where in axes[len(panels) :]:
        where.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def errors_by_length(axes: Any, evidence: "Evidence") -> None:
    """Deletions, insertions and substitutions side by side."""
    buckets = {name: s.counts for name, s in evidence.by_length.items() if s.counts.words}
    kinds = ("deletions", "insertions", "substitutions")
    for number, kind in enumerate(kinds):
        rates = [100 * getattr(counts, kind) / counts.words for counts in buckets.values()]
        axes.bar([n + 0.27 * (number - 1) for n in range(len(buckets))], rates, 0.25, label=kind)
    axes.set_xticks(range(len(buckets)), [f"{n}\n({c.words})" for n, c in buckets.items()])
    axes.set_xlabel("words of the reference (of all references)")
    axes.set_ylabel("% of the words")
    axes.set_title("Errors by length", loc="left")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend above the bars
    axes.legend(frameon=False, ncols=3, loc="upper left")


def blank_probability(axes: Any, evidence: "Evidence") -> None:
    """P(blank) where it should be low and where it should be high."""
    names = ["where labels\nare emitted", "in other\nframes"]
    bars(axes, names, [evidence.blank_at_labels, evidence.blank_elsewhere], "{:.2f}")
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("mean P(blank)")
    axes.set_title("Blank on the transcripts' best alignments", loc="left")


def oracle(axes: Any, evidence: "Evidence") -> None:
    """Oracle error rate against the length of the list."""
    rates = evidence.nbest.oracle
    axes.plot(range(1, len(rates) + 1), rates, marker="o")
    for n in {1, len(rates)}:
        axes.annotate(f"{rates[n - 1]:.2f}", (n, rates[n - 1]), (0, 6), **_ABOVE)
    axes.margins(x=0.1)
    axes.set_ylim(0, 1.15 * max(rates) or 1)
    axes.set_xlabel("hypotheses")
    axes.set_ylabel("oracle WER in %")
    axes.set_title("Best of the n-best list", loc="left")


def weak_and_strong(axes: Any, evidence: "Evidence") -> None:
    """WER before and after the LM was replaced, after tuning, and after more training."""
    names, rates = zip(*swap_rates(evidence))
    bars(axes, list(names), list(rates), "{:.2f}")
    axes.set_ylabel("WER in %")
    axes.set_title("LM swap", loc="left")


def losses(axes: Any, evidence: "Evidence") -> None:
    """Training and validation loss by epoch."""
    numbers = [epoch.number for epoch in evidence.epochs]
    axes.plot(numbers, [epoch.train for epoch in evidence.epochs], marker=".", label="training")
    axes.plot(numbers, [epoch.valid for epoch in evidence.epochs], marker=".", label="validation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.set_title("Training", loc="left")
    axes.legend(frameon=False)


def bars(axes: Any, names: list[str], values: list[Optional[float]], form: str) -> None:
    """A bar with its number for every value that is there."""
    for place, value in enumerate(values):
        if value is not None:
            axes.bar(place, value, 0.6, color=f"C{place}")
            axes.annotate(form.format(value), (place, value), (0, 4), **_ABOVE)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.15 * max(value or 0 for value in values) or 1)
