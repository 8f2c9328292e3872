"""What has been finished, so that an interrupted run can go on: used by ``format``."""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

from espnet_llm_plugin.data import audio
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import Segment

SUBDIRECTORIES = 64


@dataclass(frozen=True)
class Settings:
    """What the audio shall become.

    Args:
        directory: Where written audio goes.
        fs: Sampling rate in Hz; ``None`` keeps the one of the source.
        audio_format: ``flac`` or ``wav``, 16 bit.
        channel: Which channel of recordings with several.
    """

    directory: str
    fs: Optional[int]
    audio_format: str
    channel: Optional[int]


class Done(NamedTuple):
    """A finished utterance; ``size`` is that of a file written here, 0 for one used in place."""

    utterance: str
    signature: str
    num_samples: int
    rate: int
    size: int
    path: str


@dataclass(frozen=True)
class Job:
    """The utterances of one recording."""

    spec: str
    parts: tuple[tuple[str, Optional[Segment]], ...]


def signature(job: Job, segment: Optional[Segment], settings: Settings) -> str:
    """Changes whenever the output for an utterance would have to be made again."""
    path = audio.source_file(job.spec)
    state = None  # a pipe is known by its command only
    if path is not None and os.path.exists(path):
        status = os.stat(path)
        state = (status.st_size, status.st_mtime_ns)
    wanted = (settings.fs, settings.audio_format, settings.channel)
    return f"{zlib.crc32(repr((job.spec, state, segment, wanted)).encode()):08x}"


def output_path(utterance: str, settings: Settings) -> str:
    """Where an utterance's audio is written; the same in every run, whatever ``nj`` is."""
    folder = zlib.crc32(utterance.encode()) % SUBDIRECTORIES
    name = utterance.replace("%", "%25").replace("/", "%2F")
    return f"{settings.directory}/format.{folder:02d}/{name}.{settings.audio_format}"


class Journal:
    """Finished utterances, one line each, appended as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Done] = {}
        if path.exists():
            content = path.read_text(encoding="utf-8")
            complete = content[: content.rfind("\n") + 1]  # the last line may have been cut off
            if len(complete) < len(content):
                with atomic_write(path) as stream:
                    stream.write(complete)
            for line in complete.split("\n")[:-1]:
                name, made, num_samples, rate, size, where = line.split("\t", 5)
                self.entries[name] = Done(name, made, int(num_samples), int(rate), int(size), where)
        # Unbuffered: nothing is left to be written when the disk was full or the process is ended.
        self.stream = path.open("ab", buffering=0)

    def add(self, done: Iterable[Done]) -> None:
        lines = "".join("\t".join(map(str, entry)) + "\n" for entry in done).encode()
        while lines:
            lines = lines[self.stream.write(lines) :]

    def finished(self, job: Job, utterance: str, segment: Optional[Segment], settings: Settings):
        """Whether the utterance's audio is there, made from this source with these settings."""
        entry = self.entries.get(utterance)
        if entry is None or entry.signature != signature(job, segment, settings):
            return False
        if entry.size == 0:
            return entry.path == job.spec
        if entry.path != output_path(utterance, settings):
            return False
        return os.path.exists(entry.path) and os.path.getsize(entry.path) == entry.size
