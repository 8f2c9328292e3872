"""How much of the test transcripts is in the text that a language model is trained on.

An n-gram of a transcript that also occurs in the text is *seen*; transcripts shorter than n words
count as one n-gram of their length. Up to case. Only the n-grams of the transcripts are kept in
memory: the text is read once, line by line, whatever its size.

N words of an n-gram, U utterances.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table, read_lines
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]
Ngram = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Of a transcript.

    Attributes:
        utt: Utterance.
        seen: N-grams that the text has.
        ngrams: N-grams of the transcript, repeated ones counted.
        text: The transcript.
    """

    utt: str
    seen: int
    ngrams: int
    text: str

    @property
    def share(self) -> float:
        """Of its n-grams that the text has; 1: all of it."""
        return self.seen / self.ngrams


@dataclass(frozen=True)
class SetOverlap:
    """Of a test set.

    Attributes:
        name: Of the set.
        utterances: With words.
        touched: With at least one n-gram that the text has.
        contained: All of whose n-grams the text has.
        seen, ngrams: Summed over the utterances.
        worst: Utterances by falling share, longer ones first; those without overlap left out.
    """

    name: str
    utterances: int
    touched: int
    contained: int
    seen: int
    ngrams: int
    worst: list[Overlap]

    def row(self) -> list[str]:
        """Of the table, see ``HEADER``."""

        def percent(part: int, whole: int) -> str:
            return f"{100 * part / max(1, whole):.2f}"

        return [
            self.name,
            str(self.utterances),
            percent(self.touched, self.utterances),
            percent(self.contained, self.utterances),
            str(self.ngrams),
            percent(self.seen, self.ngrams),
        ]


HEADER = ["set", "utterances", "touched %", "contained %", "n-grams", "seen %"]


def ngrams_of(words: Sequence[str], size: int) -> list[Ngram]:
    """N-grams of folded words; the whole sentence if it is shorter."""
    folded = tuple(word.casefold() for word in words)
    if len(folded) <= size:
        return [folded] if folded else []
    return [folded[i : i + size] for i in range(len(folded) - size + 1)]


def check_contamination(
    lines: Iterable[Sequence[str]],
    test_sets: Mapping[str, Mapping[str, str]],
    size: int = 8,
) -> list[SetOverlap]:
    """Overlap of each test set with a text.

    Args:
        lines: The text, in words.
        test_sets: Transcripts by set and utterance.
        size: N.

    Raises:
        UserError: A size below 1, or a set without words.
    """
    if size < 1:
        raise UserError(f"--ngram {size}: an n-gram has at least one word")
    wanted: dict[Ngram, bool] = {}
    for name, transcripts in test_sets.items():
        before = len(wanted)
        for text in transcripts.values():
            wanted.update(dict.fromkeys(ngrams_of(text.split(), size), False))
        if len(wanted) == before and not any(text.split() for text in transcripts.values()):
            raise UserError(f"the transcripts of {name} have no words")
    # Shorter sentences are looked for inside longer lines too.
    lengths = sorted({len(ngram) for ngram in wanted})
    for words in lines:
        folded = tuple(word.casefold() for word in words)
        for length in lengths:
            for i in range(len(folded) - length + 1):
                ngram = folded[i : i + length]
                if ngram in wanted:
                    wanted[ngram] = True
    return [_overlap(name, transcripts, wanted, size) for name, transcripts in test_sets.items()]


def _overlap(
    name: str, transcripts: Mapping[str, str], seen: Mapping[Ngram, bool], size: int
) -> SetOverlap:
    found = []
    for utt, text in transcripts.items():
        ngrams = ngrams_of(text.split(), size)
        if ngrams:
            found.append(Overlap(utt, sum(seen[ngram] for ngram in ngrams), len(ngrams), text))
    worst = sorted((one for one in found if one.seen), key=lambda one: (-one.share, -one.ngrams))
    return SetOverlap(
        name,
        len(found),
        len(worst),
        sum(one.seen == one.ngrams for one in found),
        sum(one.seen for one in found),
        sum(one.ngrams for one in found),
        worst,
    )


def text_lines(texts: Sequence[PathLike], plain_texts: Sequence[PathLike]) -> Iterator[list[str]]:
    """Words of each line of ``<id> <sentence>`` files and of files of sentences.

    Raises:
        UserError: A line is not UTF-8.
    """
    for path, first in [(path, 1) for path in texts] + [(path, 0) for path in plain_texts]:
        problems = Problems(str(path))
        for _, line in read_lines(path, problems):
            yield line.split()[first:]
        problems.check("Save the file as UTF-8.")


def read_test_sets(paths: Sequence[PathLike]) -> dict[str, dict[str, str]]:
    """Transcripts of Kaldi ``text`` files, by the name of their directory."""
    sets: dict[str, dict[str, str]] = {}
    for path in paths:
        name = Path(path).resolve().parent.name
        sets[name if name not in sets else str(path)] = read_clean_table(path, may_be_empty=True)
    return sets


def write_report(
    overlaps: Sequence[SetOverlap], output_dir: PathLike, size: int, listed: int
) -> None:
    """``contamination.json`` and ``worst.txt``: set, share, seen/all n-grams, id and transcript."""
    output_dir = Path(output_dir)
    with atomic_write(output_dir / "worst.txt") as stream:
        for overlap in overlaps:
            for one in overlap.worst[:listed]:
                stream.write(
                    f"{overlap.name} {one.share:.2f} {one.seen}/{one.ngrams} {one.utt} {one.text}\n"
                )
    with atomic_write(output_dir / "contamination.json") as stream:
        sets = [{**asdict(overlap), "worst": len(overlap.worst)} for overlap in overlaps]
        for entry in sets:
            del entry["worst"]
        json.dump({"ngram": size, "sets": sets}, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
