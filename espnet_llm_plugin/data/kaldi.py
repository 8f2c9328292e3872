"""Kaldi data directories: read, check, restrict and write them.

A data directory holds tables of ``<id> <value>`` lines: ``wav.scp`` (recording -> file, pipe or
archive offset), ``text`` and ``utt2spk`` (utterance -> ...), optionally ``segments`` (utterance ->
recording, start, end in seconds); without ``segments`` every recording is one utterance. Other
``utt2*`` and ``spk2*`` tables are carried along. https://kaldi-asr.org/doc/data_prep.html
"""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Optional, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]

BAD_UTF8 = "not UTF-8"
BAD_COLUMNS = "wrong number of columns"
DUPLICATE = "duplicate id"
BAD_TIMES = "segment without a positive duration"
UNKNOWN_RECORDING = "segment of a recording that is not in wav.scp"
NO_TEXT = "audio without text"
NO_AUDIO = "text without audio"
EMPTY_TEXT = "empty transcript"
NO_SPEAKER = "audio without an entry in utt2spk"
SPEAKER_ONLY = "entry in utt2spk without audio"


class Segment(NamedTuple):
    """A part of a recording; times in seconds, ``end = -1`` means up to the end."""

    recording: str
    start: float
    end: float


def read_lines(path: PathLike, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, line)``; lines that are not UTF-8 become problems instead."""
    path = Path(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with stream:
        for number, raw in enumerate(stream, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not part of an id
            try:
                yield number, raw.decode("utf-8").rstrip()
            except UnicodeDecodeError as error:
                key = raw.split(maxsplit=1)[0].decode("utf-8", errors="backslashreplace")
                detail = f"{path}:{number}, byte {error.start + 1} of the line"
                problems.add(BAD_UTF8, key, detail)


def read_table(
    path: PathLike, problems: Problems, *, columns: Optional[int] = None, may_be_empty: bool = False
) -> dict[str, str]:
    """Read ``<id> <value>`` lines.

    Args:
        path: Table.
        problems: Receives lines that are not UTF-8, lines with a wrong number of columns and
            duplicate ids. Of a duplicate with two values neither is kept; of an exact repetition
            one is.
        columns: Exact number of columns, the id included; ``None`` for two or more.
        may_be_empty: A line may consist of the id alone (its value is ``""``).
    """
    table: dict[str, str] = {}
    first_line: dict[str, int] = {}
    ambiguous = set()
    for number, line in read_lines(path, problems):
        fields = line.split(maxsplit=1)
        key = fields[0] if fields else ""
        value = fields[1] if len(fields) > 1 else ""
        count = 0 if not fields else 1 + (len(value.split()) if columns else bool(value))
        expected = f"{columns}" if columns else ("1 or more" if may_be_empty else "2 or more")
        if count == 0 or (count != columns if columns else count < 2 - may_be_empty):
            problems.add(BAD_COLUMNS, key, f"{path}:{number} has {count}, expected {expected}")
        elif key in table:
            problems.add(DUPLICATE, key, f"{path}:{first_line[key]} and {number}")
            if table[key] != value:
                ambiguous.add(key)
        else:
            table[key] = value
            first_line[key] = number
    for key in ambiguous:
        del table[key]
    return table


def read_clean_table(path: PathLike, **kwargs) -> dict[str, str]:
    """:func:`read_table` of a file that earlier stages wrote: any problem is an error."""
    problems = Problems(str(path))
    table = read_table(path, problems, **kwargs)
    problems.check("Correct the file, or make it again with the stage that writes it.")
    return table


def write_table(path: PathLike, table: dict[str, str]) -> None:
    """Write ``<id> <value>`` lines atomically, sorted as ``LC_ALL=C sort`` does."""
    with atomic_write(path) as stream:
        for key in sorted(table):
            stream.write(f"{key} {table[key]}".rstrip() + "\n")


def speaker_to_utterances(utt2spk: dict[str, str]) -> dict[str, str]:
    """``spk2utt`` derived from ``utt2spk``."""
    speakers: dict[str, list[str]] = {}
    for utterance in sorted(utt2spk):
        speakers.setdefault(utt2spk[utterance], []).append(utterance)
    return {speaker: " ".join(utterances) for speaker, utterances in speakers.items()}


@dataclass
class DataDir:
    """The tables of a data directory, in memory.

    Attributes:
        path: Where it was read from; relative paths in ``wav.scp`` may be relative to it.
        wav: recording -> file, pipe or archive offset.
        utt2spk: utterance -> speaker.
        text: utterance -> transcript; ``None`` if there is none (decoding without references).
        segments: utterance -> segment; ``None`` if every recording is one utterance.
        extra: Other tables by file name (``utt2*``, ``spk2*``).
    """

    path: Path
    wav: dict[str, str]
    utt2spk: dict[str, str]
    text: Optional[dict[str, str]] = None
    segments: Optional[dict[str, Segment]] = None
    extra: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def utterances(self) -> list[str]:
        """Utterance ids, sorted."""
        return sorted(self.wav if self.segments is None else self.segments)

    def restrict(self, keep: Container[str]) -> "DataDir":
        """The same directory with the utterances in ``keep`` only (and what they need)."""

        def kept(table: dict) -> dict:
            return {key: value for key, value in table.items() if key in keep}

        utt2spk = kept(self.utt2spk)
        speakers = set(utt2spk.values())
        segments = None if self.segments is None else kept(self.segments)
        recordings = (
            set(kept(self.wav)) if segments is None else {s.recording for s in segments.values()}
        )
        extra = {}
        for name, table in self.extra.items():
            owners = keep if name.startswith("utt2") else speakers
            extra[name] = {key: value for key, value in table.items() if key in owners}
        return replace(
            self,
            wav={key: value for key, value in self.wav.items() if key in recordings},
            utt2spk=utt2spk,
            text=None if self.text is None else kept(self.text),
            segments=segments,
            extra=extra,
        )


def read_data_dir(
    path: PathLike,
    problems: Problems,
    *,
    require_text: bool = True,
    utterance_is_speaker: bool = False,
) -> DataDir:
    """Read the tables of a data directory; faults within one table go to ``problems``.

    Args:
        path: Data directory.
        require_text: Without a file ``text`` raise an error (else ``DataDir.text`` is ``None``).
        utterance_is_speaker: Without a file ``utt2spk`` let every utterance be its own speaker
            (else raise an error).
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"data directory {path} does not exist")
    if not (path / "wav.scp").is_file():
        raise UserError(f"{path} is not a Kaldi data directory: it has no wav.scp")
    wav = read_table(path / "wav.scp", problems)
    if not wav and not problems.found:
        raise UserError(f"{path / 'wav.scp'} is empty")

    text = None
    if (path / "text").is_file():
        text = read_table(path / "text", problems, may_be_empty=True)
    elif require_text:
        raise UserError(f"{path} has no file 'text' (lines '<utterance id> <transcript>')")

    segments = None
    if (path / "segments").is_file():
        segments = _parse_segments(path / "segments", problems)

    if (path / "utt2spk").is_file():
        utt2spk = read_table(path / "utt2spk", problems, columns=2)
    elif utterance_is_speaker:
        utt2spk = {key: key for key in (wav if segments is None else segments)}
    else:
        raise UserError(
            f"{path} has no file 'utt2spk' (lines '<utterance id> <speaker id>'). Write one, or "
            "give --utt_as_spk true to let every utterance be its own speaker"
        )

    extra = {}
    for file in sorted([*path.glob("utt2*"), *path.glob("spk2*")]):
        if file.name not in ("utt2spk", "spk2utt") and "." not in file.name and file.is_file():
            extra[file.name] = read_table(file, problems, may_be_empty=True)
    return DataDir(path, wav, utt2spk, text, segments, extra)


def _parse_segments(path: Path, problems: Problems) -> dict[str, Segment]:
    segments = {}
    for key, value in read_table(path, problems, columns=4).items():
        recording, start_text, end_text = value.split()
        try:
            start, end = float(start_text), float(end_text)
            valid = 0 <= start < math.inf and (end == -1 or start < end < math.inf)
        except ValueError:
            valid = False
        if valid:
            segments[key] = Segment(recording, start, end)
        else:
            problems.add(BAD_TIMES, key, f"{path}: {start_text} to {end_text}")
    return segments


def check_consistency(data: DataDir, problems: Problems, *, allow_empty_text: bool = False) -> None:
    """Compare the tables with one another; faults go to ``problems``.

    Ids that already have a problem are not reported once more for the tables they now miss in.
    """
    blamed = problems.keys
    if data.segments is not None:
        for key, segment in sorted(data.segments.items()):
            if segment.recording not in data.wav and segment.recording not in blamed:
                problems.add(UNKNOWN_RECORDING, key, segment.recording)
    utterances = set(data.utterances) - blamed
    if data.text is not None:
        text = set(data.text) - blamed
        for key in sorted(utterances - text):
            problems.add(NO_TEXT, key)
        for key in sorted(text - utterances):
            problems.add(NO_AUDIO, key)
        if not allow_empty_text:
            for key in sorted(key for key in text & utterances if not data.text[key]):
                problems.add(EMPTY_TEXT, key)
    for key in sorted(utterances - set(data.utt2spk)):
        problems.add(NO_SPEAKER, key)
    for key in sorted(set(data.utt2spk) - utterances - blamed):
        problems.add(SPEAKER_ONLY, key)


def without_problems(data: DataDir, problems: Problems) -> DataDir:
    """The directory without every utterance that has a problem, or whose recording has one."""
    bad = problems.keys
    keep = set(data.utterances) & set(data.utt2spk)
    if data.text is not None:
        keep &= set(data.text)
    if data.segments is not None:
        keep = {
            key
            for key in keep
            if data.segments[key].recording in data.wav and data.segments[key].recording not in bad
        }
    keep -= bad
    if not keep:
        raise UserError(f"{problems.message()}\nNothing would be left of {data.path}.")
    return data.restrict(keep)


def write_data_dir(data: DataDir, path: PathLike) -> None:
    """Write the tables, each atomically and ``wav.scp`` last; tables it lacks are removed."""
    path = Path(path)
    (path / "wav.scp").unlink(missing_ok=True)  # no wav.scp: the directory is not complete
    for old in [*path.glob("utt2*"), *path.glob("spk2*"), path / "text", path / "segments"]:
        if old.is_file():
            old.unlink()
    for name, table in data.extra.items():
        write_table(path / name, table)
    if data.text is not None:
        write_table(path / "text", data.text)
    if data.segments is not None:
        rows = {
            key: f"{s.recording} {_seconds(s.start)} {_seconds(s.end)}"
            for key, s in data.segments.items()
        }
        write_table(path / "segments", rows)
    write_table(path / "utt2spk", data.utt2spk)
    write_table(path / "spk2utt", speaker_to_utterances(data.utt2spk))
    write_table(path / "wav.scp", data.wav)


def _seconds(value: float) -> str:
    """Enough digits for a sample at 192 kHz, none superfluous."""
    return "-1" if value == -1 else f"{value:.6f}".rstrip("0").rstrip(".")
