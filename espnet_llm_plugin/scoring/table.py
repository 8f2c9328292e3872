"""Tables as Markdown and as plain text."""

import unicodedata
from typing import Sequence


def width(text: str) -> int:
    """Columns that ``text`` takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def pad(text: str, columns: int, align: str = "<") -> str:
    """Fill ``text`` with blanks: ``<`` to its right, ``>`` to its left."""
    blanks = " " * (columns - width(text))
    return text + blanks if align == "<" else blanks + text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, as narrow as ESPnet's; a ``|`` within a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "|" + "|".join(cell.replace("|", "\\|") for cell in line) + "|\n" for line in lines
    )


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column is flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            pad(cell, size, ">" if n else "<") for n, (cell, size) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * size for size in widths))
    return "".join(line.rstrip() + "\n" for line in text)
