"""Training text of language models (stages 4 to 8): joined, without empty lines, checked."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import read_lines
from espnet_llm_plugin.data.problems import EXAMPLES, Problems
from espnet_llm_plugin.data.tokens import read_transcripts
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]
CONTAMINATION = ("keep", "drop", "error")


@dataclass(frozen=True)
class LMTextSummary:
    """Counts of lines: written, empty, and equal to a sentence of the evaluation sets."""

    written: int
    empty: int
    contaminated: int


def _normalised(words: Sequence[str]) -> str:
    return " ".join(words).casefold()


def prepare_lm_text(
    texts: Sequence[PathLike],
    output: PathLike,
    *,
    plain_texts: Sequence[PathLike] = (),
    evaluation_texts: Sequence[PathLike] = (),
    contamination: str = "keep",
    lowercase: bool = False,
) -> LMTextSummary:
    """Write one file of ``<id> <sentence>`` lines.

    Args:
        texts: Files of ``<id> <sentence>`` lines.
        output: E.g. ``dump/raw/lm_train.txt``.
        plain_texts: Files of sentences without ids; they get ``<file name>-<line number>``.
        evaluation_texts: Transcripts (``<id> <sentence>``) that should not be trained on. Lines
            equal to one of them, up to case and spacing, are counted.
        contamination: What happens to such lines: ``keep``, ``drop`` or ``error``. (In tasks with
            few different sentences, such as digits, they are no contamination.)
        lowercase: Write the sentences in lower case.

    Raises:
        UserError: An id occurs twice, a line is not UTF-8, nothing is left.
    """
    if contamination not in CONTAMINATION:
        raise UserError(f"contamination '{contamination}' is not one of {', '.join(CONTAMINATION)}")
    held_out = {_normalised(line.split()) for line in read_transcripts(evaluation_texts)}
    written = empty = contaminated = 0
    examples: list[str] = []
    hashes = array("q")  # 8 bytes an id: such texts have tens of millions of lines
    with writing(output), atomic_write(output) as stream:
        for place, key, words in _sentences(texts, plain_texts):
            if not words:
                empty += 1
                continue
            if held_out and _normalised(words) in held_out:
                contaminated += 1
                if len(examples) < EXAMPLES:
                    examples.append(place)
                if contamination == "drop":
                    continue
            sentence = " ".join(words)
            stream.write(f"{key} {sentence.lower() if lowercase else sentence}\n")
            hashes.append(hash(key))
            written += 1
        if contaminated and contamination == "error":
            raise UserError(
                f"{contaminated} line(s) of the LM text are sentences of the evaluation sets: "
                f"{', '.join(examples)}. Remove them, or give --contamination drop"
            )
        if not written:
            raise UserError(f"no sentences in {', '.join(map(str, [*texts, *plain_texts]))}")
        ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            _name_repeated(_sentences(texts, plain_texts), set(repeated.tolist()))
    return LMTextSummary(written, empty, contaminated)


def _sentences(
    texts: Sequence[PathLike], plain_texts: Sequence[PathLike]
) -> Iterator[tuple[str, str, list[str]]]:
    """``(file:line, id, words)`` of all lines."""
    for path, plain in [(p, False) for p in texts] + [(p, True) for p in plain_texts]:
        problems = Problems(str(path))
        stem = "_".join(Path(path).stem.split())
        for number, line in read_lines(path, problems):
            words = line.split()
            key = f"{stem}-{number:09d}" if plain else (words or [""]).pop(0)
            yield f"{path}:{number}", key, words
        problems.check("Save the file as UTF-8.")


def _name_repeated(sentences: Iterable[tuple[str, str, list[str]]], suspects: set[int]) -> None:
    """Raise for ids that occur twice; different ids with equal hashes are not among them."""
    seen: dict[str, str] = {}
    problems = Problems("LM text")
    for place, key, words in sentences:
        if words and hash(key) in suspects:
            if key in seen:
                problems.add("duplicate id", key, f"{seen[key]} and {place}")
            seen[key] = place
    problems.check("Give every line of all the files its own id.")
