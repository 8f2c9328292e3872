"""Pictures of systems: error rates, and error rates against speed."""

import io
from pathlib import Path
from typing import Any, Sequence, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.results import Results
from espnet_llm_plugin.scoring.units import WER

# Points with their names in a plot; the names of more would lie on each other.
_NAMED = 8


def plot_error_rates(results: Results, path: Union[str, Path]) -> None:
    """Draw the test WER of each system with its 95 % interval; write a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    tests = results.tests()
    systems = [system for system in results.systems if system.tests]
    figure = _figure(figsize=(8, 1.2 + (0.28 * len(tests) + 0.16) * len(systems)), dpi=150)
    axes = figure.subplots()
    height = 0.8 / len(tests)
    colors = [f"C{n}" for n in range(len(tests))]
    right = 0.0
    for number, test in enumerate(tests):
        for row, system in enumerate(systems):
            if test not in system.tests:
                continue
            rate = system.tests[test].rates[WER]
            wer = rate.summary.rate
            where = row - 0.4 + height * (number + 0.5)
            label = (
                test if row == min(r for r, s in enumerate(systems) if test in s.tests) else None
            )
            axes.barh(where, wer, 0.9 * height, color=colors[number], alpha=0.75, label=label)
            axes.errorbar(
                wer,
                where,
                xerr=[[max(wer - rate.low, 0)], [max(rate.high - wer, 0)]],
                color="black",
                capsize=3,
                linewidth=1,
            )
            axes.annotate(
                f"{wer:.2f}", (rate.high, where), (5, 0), textcoords="offset points", va="center"
            )
            right = max(right, rate.high)
    names = [s.name if s.group is None else f"{s.name} ({s.group})" for s in systems]
    axes.set_yticks(range(len(systems)), names)
    axes.invert_yaxis()  # the first system on top, as in the table
    axes.set_xlim(0, 1.12 * right or 1)
    axes.set_xlabel("WER in % (95 % bootstrap interval)")
    axes.spines[["top", "right"]].set_visible(False)
    if len(tests) > 1:
        axes.legend(frameon=False, loc="lower right")
    else:
        axes.set_title(tests[0], loc="left")
    _save(figure, path)


def plot_speed(results: Results, path: Union[str, Path]) -> None:
    """Draw each system's WER on the first test set against its real-time factor; write a PNG.

    The lower left is best; systems that no other beats in both are joined by a line. Many systems
    are numbered, fastest first, with their names beside. Systems without a real-time factor are
    left out.

    Raises:
        UserError: No system has one, or matplotlib is not installed.
    """
    test = results.tests()[0]
    points = sorted(
        (system.rtf, system.tests[test].rates[WER].summary.rate, system.name)
        for system in results.systems
        if test in system.tests and system.rtf
    )
    if not points:
        raise UserError("--speed_plot: no system has been scored that has an `rtf`")
    numbered = len(points) > _NAMED
    figure = _figure(figsize=(9, max(5, 2 + 0.17 * len(points))), dpi=150)
    axes = figure.subplots()
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    best, front, names = float("inf"), [], []
    for number, (rtf, wer, name) in enumerate(points, 1):
        axes.plot(rtf, wer, "o", color="C0", markersize=4)
        label = str(number) if numbered else name
        axes.annotate(label, (rtf, wer), (4, 2), textcoords="offset points", fontsize=7)
        names.append(f"{number}  {name}")
        if wer < best:
            best = wer
            front.append((rtf, wer))
    axes.plot(*zip(*front), color="C0", linewidth=1, alpha=0.5)
    axes.margins(x=0.05 if numbered else 0.25, y=0.1)
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_xlabel("real-time factor")
    axes.set_ylabel("WER in %")
    axes.set_title(test, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if numbered:
        axes.text(1.02, 1.0, "\n".join(names), va="top", fontsize=7, transform=axes.transAxes)
    _save(figure, path)


def plot_thresholds(
    points: Sequence[tuple[float, float, str]], draft: float, path: Union[str, Path]
) -> None:
    """Draw the WER of verified drafts against their real-time factor; write a PNG.

    Args:
        points: Real-time factor, WER in % and threshold, in the order of the thresholds.
        draft: Real-time factor of the drafts alone.
        path: To write.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = _figure(figsize=(7, 4.5), dpi=150)
    axes = figure.subplots()
    axes.plot([rtf for rtf, _, _ in points], [wer for _, wer, _ in points], "o-", color="C0")
    for rtf, wer, name in points:
        axes.annotate(name, (rtf, wer), (5, 4), textcoords="offset points", fontsize=8)
    axes.axvline(draft, color="black", linestyle=":", linewidth=1, label="draft alone")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("real-time factor, draft and verification")
    axes.set_ylabel("WER in %")
    axes.set_title("threshold of the disagreement", loc="left", fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _figure(**options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error
    return Figure(**options)


def _save(figure: Any, path: Union[str, Path]) -> None:
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path, "wb") as stream:
        stream.write(picture.getvalue())
