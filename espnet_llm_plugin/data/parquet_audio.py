"""Audio out of Parquet files into Kaldi archives, which wav.scp can refer to.

One archive (``<name>.ark``) and one list (``<name>.json``) a Parquet file; the encoded audio is
copied as it is. A file that is finished is not read again, so an interrupted run continues.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, Optional

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import DataDir
from espnet_llm_plugin.data.parquet import audio_bytes, read_rows, require_pyarrow, seconds_of
from espnet_llm_plugin.data.synthetic.jobs import in_fresh_processes

NO_AUDIO = "no audio"
UNREADABLE = "unreadable audio"
NO_ID = "no id"
DUPLICATE = "duplicate id"


class Columns(NamedTuple):
    """Names of the columns; None: there is no such column."""

    key: str
    audio: str
    text: str
    speaker: Optional[str] = None
    sex: Optional[str] = None


class Row(NamedTuple):
    """An utterance; ``offset`` is where its audio begins in the archive."""

    key: str
    offset: int
    seconds: float
    text: str
    speaker: str
    sex: str


@dataclass
class Extracted:
    """What came out of a Parquet file: utterances, and by reason the ids of those left out."""

    archive: str
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, key: str) -> None:
        """Note an utterance that is left out."""
        self.skipped.setdefault(reason, []).append(key)


def extract_all(
    files: Sequence[Path], directory: Path, columns: Columns, nj: int = 1
) -> list[Extracted]:
    """:func:`extract` every file, ``nj`` at a time; results in the order of the files."""
    require_pyarrow()
    calls = [(file, directory / f"{n:05d}.ark", columns) for n, file in enumerate(files)]
    if nj > 1 and len(calls) > 1:
        results = list(in_fresh_processes(extract, calls, nj, extract.__module__))
        return sorted(results, key=lambda result: result.archive)
    return [extract(*call) for call in calls]


def extract(file: Path, archive: Path, columns: Columns) -> Extracted:
    """Copy the audio of one Parquet file into ``archive``, unless that has been done.

    Raises:
        UserError: A damaged file, a missing column, a full disk.
    """
    stat = file.stat()
    source = {"file": str(file), "size": stat.st_size, "mtime": stat.st_mtime}
    source["columns"] = list(columns)
    index = archive.with_suffix(".json")
    if index.is_file():
        known = json.loads(index.read_text(encoding="utf-8"))
        if known.pop("source") == source:
            known["rows"] = [Row(*row) for row in known["rows"]]
            return Extracted(**known)

    result = Extracted(str(archive.absolute()))
    names = [name for name in columns if name is not None]
    with writing(archive):
        index.unlink(missing_ok=True)
        with atomic_write(archive, "wb") as stream:
            for row in read_rows(file, names):
                _add(row, result, stream, columns, file.parent)
        with atomic_write(index) as text:
            json.dump({"source": source, **asdict(result)}, text, ensure_ascii=False)
    return result


def _add(row: dict, result: Extracted, stream: BinaryIO, columns: Columns, beside: Path) -> None:
    key = word(row[columns.key])
    if not key:
        result.skip(NO_ID, "")
        return
    audio = audio_bytes(row[columns.audio], beside)
    seconds = seconds_of(audio) if audio else None
    if seconds is None:
        result.skip(UNREADABLE if audio else NO_AUDIO, key)
        return

    def value(name: Optional[str]) -> str:
        return "" if name is None or row[name] is None else str(row[name])

    speaker = word(value(columns.speaker))
    text = " ".join(value(columns.text).split())
    stream.write(f"{key} ".encode())
    offset = stream.tell()
    write_audio(stream, audio)
    result.rows.append(Row(key, offset, seconds, text, speaker, value(columns.sex)))


def word(value: Optional[str]) -> str:
    """An id as a data directory has it: one word."""
    return "_".join(str(value or "").split())


def write_audio(stream: BinaryIO, audio: bytes) -> None:
    """One entry of an archive as kaldiio reads it: ``AUDIO``, length, an encoded file."""
    length = len(audio)
    size = (length.bit_length() + 7) // 8
    stream.write(b"AUDIO" + bytes([size]) + length.to_bytes(size, "little") + audio)


def to_data_dir(
    path: Path, extracted: Sequence[Extracted], text_or_reason: Callable[[str], tuple[str, str]]
) -> tuple[DataDir, dict[str, list[str]]]:
    """The utterances of a split as a data directory, and by reason the ids of those left out.

    Args:
        path: Of the data set (for messages).
        extracted: What :func:`extract_all` returned.
        text_or_reason: From a transcript to the one to write and ``""``, or to anything and the
            reason why its utterance is left out.

    Returns:
        wav.scp, text, utt2spk (an utterance without speaker is its own), utt2dur, and spk2gender
        where sexes are known; an id that occurs twice belongs to its first utterance.
    """
    data = DataDir(path, {}, {}, {}, extra={"utt2dur": {}})
    genders: dict[str, str] = {}
    skipped: dict[str, list[str]] = {}
    for part in extracted:
        for reason, keys in part.skipped.items():
            skipped.setdefault(reason, []).extend(keys)
        for row in part.rows:
            text, reason = text_or_reason(row.text)
            reason = reason or (DUPLICATE if row.key in data.wav else "")
            if reason:
                skipped.setdefault(reason, []).append(row.key)
                continue
            data.wav[row.key] = f"{part.archive}:{row.offset}"
            data.text[row.key] = text
            data.utt2spk[row.key] = row.speaker or row.key
            data.extra["utt2dur"][row.key] = f"{row.seconds:.3f}"
            gender = re.match("[mf]", row.sex.lower())
            if gender:
                genders[data.utt2spk[row.key]] = gender[0]
    if genders:
        data.extra["spk2gender"] = genders
    return data, skipped


def count_skipped(skipped: dict[str, list[str]]) -> str:
    """``12 skipped: 10 empty transcript, 2 no audio``, or ``none skipped``."""
    counts = Counter({reason: len(keys) for reason, keys in skipped.items()})
    if not counts:
        return "none skipped"
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.most_common())
    return f"{counts.total()} skipped: {reasons}"
