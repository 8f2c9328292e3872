"""``result.txt``: tables by speaker and alignments, in the layout of ``sclite -o all stdout``.

ESPnet's ``show_asr_result.sh`` picks its line ``Sum/Avg`` from such a file.
"""

import math
import statistics
from typing import Iterable, Sequence

from espnet_llm_plugin.scoring.alignment import DELETION, INSERTION, pairs
from espnet_llm_plugin.scoring.table import pad, width
from espnet_llm_plugin.scoring.wer import Scored, Summary

HEADER = ["SPKR", "# Snt", "# Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err"]


def round_half_up(value: float) -> str:
    """One decimal as sclite prints it: 6.25 becomes 6.3."""
    return f"{math.floor(10 * value + 0.5) / 10:.1f}"


def percentage_cells(summary: Summary) -> list[str]:
    """Snt, Wrd, Corr, Sub, Del, Ins, Err, S.Err as sclite prints them in its table of per cents.

    Without a reference word: numbers of words, marked by an asterisk.
    """
    rates = summary.percentages()
    counts = summary.counts
    if counts.words:
        cells = [round_half_up(rate) for rate in rates[:5]]
    else:
        cells = [f"{number}*" for number in (*counts, counts.errors)]
    return [str(summary.sentences), str(counts.words), *cells, round_half_up(rates[5])]


def count_cells(summary: Summary) -> list[str]:
    """The same columns as numbers of words and sentences."""
    counts = summary.counts
    numbers = (summary.sentences, counts.words, *counts, counts.errors, summary.sentence_errors)
    return [str(number) for number in numbers]


def result_text(scored: Scored, title: str) -> str:
    """Everything: table of per cents, table of numbers, alignments."""
    return f"{speaker_tables(scored, title)}\n{alignments(scored)}"


def speaker_tables(scored: Scored, title: str) -> str:
    """Both tables by speaker, with sum, mean, standard deviation and median over speakers."""
    speakers = scored.by_speaker()
    total = scored.summary()
    with_words = [summary for summary in speakers.values() if summary.counts.words]
    everyone = list(speakers.values())
    # A speaker without reference words has no rates but still has sentences.
    rates = [[s.sentences, s.counts.words] for s in everyone]
    rates = [*zip(*rates), *zip(*(s.percentages()[:5] for s in with_words))]
    rates.append([s.percentages()[5] for s in everyone])
    numbers = list(zip(*(map(int, count_cells(s)) for s in everyone)))
    text = _framed(
        f"{title}: per cent",
        [[name, *percentage_cells(summary)] for name, summary in speakers.items()],
        ["Sum/Avg", *percentage_cells(total)],
        _statistics(rates),
    )
    if len(with_words) < len(everyone):
        text += "* no reference word: numbers, not per cents; not in Mean, S.D. and Median\n"
    return text + _framed(
        f"\n{title}: numbers",
        [[name, *count_cells(summary)] for name, summary in speakers.items()],
        ["Sum", *count_cells(total)],
        _statistics(numbers),
    )


def _statistics(columns: Iterable[Sequence[float]]) -> list[list[str]]:
    columns = [list(column) for column in columns]
    functions = {
        "Mean": statistics.fmean,
        "S.D.": lambda values: statistics.stdev(values) if len(values) > 1 else 0.0,
        "Median": statistics.median,
    }
    return [
        [name, *(round_half_up(function(column)) for column in columns)]
        for name, function in functions.items()
    ]


def _framed(
    title: str, rows: list[list[str]], total: list[str], statistics_rows: list[list[str]]
) -> str:
    lines = [HEADER, *rows, total, *statistics_rows]
    widths = [max(5, *(width(line[column]) for line in lines)) for column in range(len(HEADER))]

    def line(cells: list[str]) -> str:
        name, *numbers = (
            pad(c, w, ">" if n else "<") for n, (c, w) in enumerate(zip(cells, widths))
        )
        return f"| {name} | {' '.join(numbers[:2])} | {' '.join(numbers[2:])} |\n"

    rule = "|" + "-" * (len(line(HEADER).rstrip()) - 2) + "|\n"
    body = "".join(line(row) for row in rows)
    tail = "".join(line(row) for row in statistics_rows)
    return f"{title}\n{rule}{line(HEADER)}{rule}{body}{rule}{line(total)}{rule}{tail}{rule}"


def alignments(scored: Scored) -> str:
    """Every utterance with its counts and the words side by side."""
    text = []
    for row, steps in enumerate(scored.steps):
        columns = []
        for kind, ref, hyp in pairs(steps, scored.references[row], scored.hypotheses[row]):
            size = max(width(ref), width(hyp))
            ref = "*" * size if kind == INSERTION else pad(ref, size)
            hyp = "*" * size if kind == DELETION else pad(hyp, size)
            columns.append((ref, hyp, pad("" if kind == "C" else kind, size)))
        lines = [" ".join(words).rstrip() for words in zip(*columns)] or ["", "", ""]
        text.append(
            f"id: ({scored.speakers[row]}-{scored.ids[row]})\n"
            f"Scores: (#C #S #D #I) {' '.join(map(str, scored.counts[row]))}\n"
            f"REF:  {lines[0]}\nHYP:  {lines[1]}\nEval: {lines[2]}\n"
        )
    return "\n".join(text)
