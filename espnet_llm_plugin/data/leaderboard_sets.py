"""Local copies of the leaderboard's test sets, as formatted data directories of what is scored.

A test set is found as Parquet files (a copy of ``hf-audio/esb-datasets-test-only-sorted``, or any
directory of Parquet files with columns ``audio``, ``id`` and a transcript) or as a Kaldi data
directory.
"""

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from espnet_llm_plugin.data.audio import resolve
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.kaldi import (
    DataDir,
    check_consistency,
    read_data_dir,
    write_data_dir,
)
from espnet_llm_plugin.data.parquet import columns_of, read_rows, require_pyarrow, split_files
from espnet_llm_plugin.data.parquet_audio import Columns, extract_all, to_data_dir, word
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError

# Names that the transcript has in data sets of the Hub, in the leaderboard's order.
TEXTS = ("text", "sentence", "normalized_text", "transcript", "transcription")


@dataclass(frozen=True)
class Source:
    """Where a test set is: Parquet files, or else a Kaldi data directory."""

    path: Path
    parquet: tuple[Path, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What a result depends on: names, sizes and times of the files."""
        tables = [self.path / name for name in ("wav.scp", "segments", "text")]
        stats = {str(file): file.stat() for file in self.parquet or tables if file.is_file()}
        return {name: [stat.st_size, stat.st_mtime] for name, stat in stats.items()}


def find_source(root: Optional[Path], name: str, config: str, split: str) -> Optional[Source]:
    """A test set below ``root``, or None.

    Args:
        root: Copy of the data set of the Hub, or a directory of Kaldi data directories.
        name: Of the test set, e.g. ``librispeech_clean``; the name of its Kaldi directory may also
            be ``<config>_<split>`` or ``<config>/<split>``.
        config, split: Of the data set of the Hub.
    """
    if root is None:
        return None
    files = split_files(root, config, split)
    if files:
        return Source(root, tuple(files))
    for place in (name, f"{config}_{split}", f"{config}/{split}"):
        for directory in (root / place, root / place.replace(".", "_")):
            if (directory / "wav.scp").is_file():
                return Source(directory)
    return None


def given_source(path: Path) -> Source:
    """A test set in a directory that the user named.

    Raises:
        UserError: It has neither ``wav.scp`` nor Parquet files.
    """
    if (path / "wav.scp").is_file():
        return Source(path)
    files = sorted(path.glob("**/*.parquet"))
    if not files:
        raise UserError(
            f"{path} is no test set: expected a Kaldi data directory (wav.scp, text) or a "
            "directory with Parquet files"
        )
    return Source(path, tuple(files))


def read_references(source: Source, is_scored: Callable[[str], bool]) -> tuple[dict[str, str], int]:
    """Transcripts of the utterances that are scored, and how many others there are.

    Raises:
        UserError: Faults of the test set, or nothing to score.
    """
    if source.parquet:
        columns = _columns(source)
        rows = (
            (word(row[columns.key]), row[columns.text] or "")
            for file in source.parquet
            for row in read_rows(file, [columns.key, columns.text])
        )
        texts = dict(zip(*_unique(list(rows))))
    else:
        texts = _read_kaldi(source).text
    references = {key: " ".join(text.split()) for key, text in texts.items() if is_scored(text)}
    if not references:
        raise UserError(f"{source.path}: not one utterance has a reference to be scored")
    return references, len(texts) - len(references)


def prepare_audio(
    source: Source, keys: Container[str], directory: Path, *, fs: int = 16000, nj: int = 1
) -> tuple[Path, float]:
    """Write ``directory/data``: a data directory of flac files at ``fs`` Hz of some utterances.

    Args:
        source: The test set.
        keys: Ids of :func:`read_references`.
        directory: Gets ``data``, ``org`` (the same before) and ``archives`` (of Parquet files).
        fs: Sampling rate of the model.
        nj: Processes.

    Returns:
        The data directory, and its seconds of audio.

    Raises:
        UserError: Faults of the test set: nothing of a benchmark is left out silently.
    """
    data = _of_parquet(source, directory, nj) if source.parquet else _read_kaldi(source)
    write_data_dir(data.restrict(keys), directory / "org")
    summary = format_data_dir(
        directory / "org", directory / "data", fs=fs, nj=nj, utterance_is_speaker=True
    )
    return directory / "data", summary.seconds


def _columns(source: Source) -> Columns:
    require_pyarrow()
    names = columns_of(source.parquet[0])
    text = next((name for name in TEXTS if name in names), None)
    if text is None or "audio" not in names or "id" not in names:
        raise UserError(
            f"{source.parquet[0]} has the columns {', '.join(names)}; expected audio, id and one "
            f"of {', '.join(TEXTS)}"
        )
    return Columns(key="id", audio="audio", text=text)


def _of_parquet(source: Source, directory: Path, nj: int) -> DataDir:
    parts = extract_all(source.parquet, directory / "archives", _columns(source), nj)
    rows = [row for part in parts for row in part.rows]
    names = iter(_unique([(row.key, "") for row in rows])[0])
    parts = [
        replace(part, rows=[row._replace(key=next(names)) for row in part.rows]) for part in parts
    ]
    data, skipped = to_data_dir(source.path, parts, lambda text: (text, ""))
    faults = Problems(str(source.path))
    for reason, keys in skipped.items():
        for key in keys:
            faults.add(reason, key)
    faults.check("The copy of the test set is damaged: fetch it again.")
    return data


def _unique(rows: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Ids and texts; ids of the sets are not all unique: the second ``x`` becomes ``x-2``."""
    seen: Counter[str] = Counter()
    names = []
    for key, _ in rows:
        seen[key] += 1
        names.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return names, [text for _, text in rows]


def _read_kaldi(source: Source) -> DataDir:
    problems = Problems(str(source.path))
    data = read_data_dir(source.path, problems, utterance_is_speaker=True)
    check_consistency(data, problems, allow_empty_text=True)
    problems.check("Correct the data directory.")
    return replace(data, wav={key: resolve(spec, source.path) for key, spec in data.wav.items()})
