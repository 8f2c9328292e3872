"""Audio of a Kaldi data directory: files, pipes and archive offsets; resampling; 16-bit output.

T samples per channel, C channels. Samples are float32 in [-1, 1], shape ``(T, C)``; 16-bit sources
survive the way through float32 unchanged (k/32768 is exact there).
"""

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union

import numpy as np
import soundfile
import soxr

from espnet_llm_plugin.errors import UserError

MISSING = "audio file not found"
EMPTY_FILE = "empty audio file"
UNREADABLE = "unreadable audio"
PIPE_FAILED = "command in wav.scp failed"
NO_SAMPLES = "audio without samples"
NOT_FINITE = "NaN or infinite samples"
CHANNELS = "channel not chosen or not there"
OUTSIDE = "segment outside its recording"

# Kaldi's extract-segments lets a segment end this much after its recording, and cuts it there.
MAX_OVERSHOOT = 0.5
# Elsewhere seeking may be off by some frames (mp3), so the file is read from its start.
SEEKABLE_FORMATS = ("WAV", "WAVEX", "FLAC", "NIST", "AIFF", "AU", "RF64", "W64")
# Headers of streamed WAVs hold placeholders instead of sizes; sizes below are taken at their word.
STREAMED_SIZE = 0x7F000000
# libsndfile's answer for a FLAC without a length is 2**63 - 1.
MAX_FRAMES = 2**40

PERTURB_COMMAND = "python3 -m espnet_llm_plugin.bin.perturb_audio"
_PERTURB = re.compile(
    rf"^(?P<source>.+\| )?{re.escape(PERTURB_COMMAND)} (?P<factor>\S+) (?P<path>[^|]+) \|$"
)


class AudioError(UserError):
    """Audio that cannot be used; ``kind`` is one of this module's constants."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def is_pipe(spec: str) -> bool:
    """Whether an entry of wav.scp is a command whose output is the audio."""
    return spec.endswith("|")


def split_archive(spec: str) -> tuple[str, Optional[int]]:
    """``("foo.ark", 1234)`` for ``foo.ark:1234``; ``(spec, None)`` for anything else."""
    path, colon, offset = spec.rpartition(":")
    if colon and offset.isdigit() and not is_pipe(spec):
        return path, int(offset)
    return spec, None


def resolve(spec: str, base: Union[str, Path]) -> str:
    """Where a relative path of wav.scp leads: from the working directory, else from ``base``.

    Pipes are left alone: their commands run in the working directory, as Kaldi runs them. A path
    that exists in neither place is returned unchanged.
    """
    if is_pipe(spec):
        return spec
    path, offset = split_archive(spec)
    if not os.path.isabs(path) and not os.path.exists(path):
        beside = os.path.join(base, path)
        if os.path.exists(beside):
            return beside if offset is None else f"{beside}:{offset}"
    return spec


def perturbed(spec: str, factor: str) -> str:
    """An entry of wav.scp for ``spec`` played ``factor`` times as fast.

    It is a pipe, as Kaldi's and ESPnet's own scripts write it, that needs this package instead of
    sox; :func:`open_recording` recognises it and does the same work without starting a process.
    """
    if is_pipe(spec):
        return f"{spec} {PERTURB_COMMAND} {factor} - |"
    return f"{PERTURB_COMMAND} {factor} {shlex.quote(spec)} |"


def _perturb_source(match: re.Match) -> str:
    return match["source"].rstrip() if match["source"] else shlex.split(match["path"])[0]


def source_file(spec: str) -> Optional[str]:
    """The file whose bytes decide what ``spec`` yields; ``None`` for commands."""
    match = _PERTURB.match(spec)
    if match:
        return source_file(_perturb_source(match))
    if is_pipe(spec):
        return None
    return spec if os.path.exists(spec) else split_archive(spec)[0]


def is_seekable(spec: str) -> bool:
    """Whether parts of ``spec`` can be read without reading all of it (judged by its name)."""
    return spec.lower().endswith((".wav", ".flac", ".sph", ".aiff"))


class _File:
    """Part of a sound file is read only when it is asked for."""

    def __init__(self, stream: soundfile.SoundFile, name: str, on_disk: bool):
        self.stream, self.name = stream, name
        self.rate: int = stream.samplerate
        self.num_channels: int = stream.channels
        self.num_frames: int = stream.frames
        self.seekable = stream.format in SEEKABLE_FORMATS
        if self.num_frames > MAX_FRAMES:
            raise AudioError(UNREADABLE, f"{name} does not say how long it is (a streamed file?)")
        size = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", stream.extra_info, re.MULTILINE)
        if on_disk and size and int(size[2]) < int(size[1]) < STREAMED_SIZE:
            raise AudioError(
                UNREADABLE,
                f"{name} is cut off: {size[1]} bytes announced in its header, {size[2]} there",
            )
        self._whole: Optional[np.ndarray] = None

    def read(self, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        """Samples ``(stop - start, C)``."""
        if self.seekable:
            return self._read(start, self.num_frames if stop is None else stop)
        if self._whole is None:
            self._whole = self._read(0, self.num_frames)
            self.num_frames = len(self._whole)
        return self._whole[start:stop]

    def _read(self, start: int, stop: int) -> np.ndarray:
        try:
            if self.seekable:
                self.stream.seek(start)
            samples = self.stream.read(stop - start, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(UNREADABLE, f"{self.name}: {error.error_string}") from error
        if self.seekable and len(samples) < stop - start:
            raise AudioError(
                UNREADABLE,
                f"{self.name} is cut off: {stop} samples announced in its header, "
                f"{start + len(samples)} there",
            )
        return samples


class _Array:
    def __init__(self, samples: np.ndarray, rate: int):
        self.samples = samples if samples.ndim == 2 else samples[:, None]
        self.rate = rate
        self.num_frames, self.num_channels = self.samples.shape

    def read(self, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        return self.samples[start:stop]


Recording = Union[_File, _Array]


@contextmanager
def open_recording(spec: str) -> Iterator[Recording]:
    """Open an entry of wav.scp (paths already resolved), or standard input for ``-``.

    The value has ``rate`` (Hz), ``num_channels``, ``num_frames`` and ``read(start, stop)``.

    Raises:
        AudioError: The audio is missing, empty or cannot be decoded, or its command failed.
    """
    match = _PERTURB.match(spec)
    try:
        if match:
            with open_recording(_perturb_source(match)) as recording:
                factor = float(match["factor"])
                samples = change_speed(recording.read(), recording.rate, factor)
                yield _Array(samples, recording.rate)
        elif is_pipe(spec):
            with soundfile.SoundFile(io.BytesIO(_run(spec))) as stream:
                yield _File(stream, spec, on_disk=False)
        elif spec == "-":
            with soundfile.SoundFile(io.BytesIO(sys.stdin.buffer.read())) as stream:
                yield _File(stream, "standard input", on_disk=False)
        elif split_archive(spec)[1] is not None and not os.path.exists(spec):
            yield _read_archive(spec)
        else:
            _check_file(spec)
            with soundfile.SoundFile(spec) as stream:
                yield _File(stream, spec, on_disk=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(UNREADABLE, f"{spec}: {error.error_string}") from error


def _check_file(path: str) -> None:
    try:
        size = os.stat(path).st_size
    except FileNotFoundError as error:
        raise AudioError(MISSING, path) from error
    except OSError as error:
        raise AudioError(UNREADABLE, f"{path}: {error.strerror}") from error
    if os.path.isdir(path) or not os.access(path, os.R_OK):
        raise AudioError(UNREADABLE, f"{path}: a directory, or no permission to read it")
    if size == 0:
        raise AudioError(EMPTY_FILE, path)


def _run(spec: str) -> bytes:
    """Standard output of a command in wav.scp."""
    done = subprocess.run(spec[:-1], shell=True, capture_output=True, stdin=subprocess.DEVNULL)
    said = done.stderr.decode("utf-8", errors="replace").strip().replace("\n", "; ")[-300:]
    if done.returncode != 0:
        raise AudioError(PIPE_FAILED, f"{spec} (exit status {done.returncode}): {said}")
    if not done.stdout:
        raise AudioError(PIPE_FAILED, f"{spec} (no output): {said}")
    return done.stdout


def _read_archive(spec: str) -> _Array:
    import kaldiio  # only some data directories have archives

    path, offset = split_archive(spec)
    _check_file(path)
    if offset >= os.path.getsize(path):
        raise AudioError(UNREADABLE, f"{spec}: the offset lies behind the end of the archive")
    try:
        first, second = kaldiio.load_mat(spec)
    except Exception as error:  # whatever a parser of foreign bytes stumbles over
        raise AudioError(UNREADABLE, f"{spec}: {error or type(error).__name__}") from error
    rate, samples = (first, second) if np.ndim(first) == 0 else (second, first)
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return _Array(np.asarray(samples, dtype=np.float32), int(rate))


def segment_bounds(
    recording: Recording, start: float, end: float, name: str
) -> tuple[int, Optional[int]]:
    """Sample range of a segment given in seconds (``end = -1``: up to the end).

    An end up to 0.5 s after the recording's is moved to it, as Kaldi's extract-segments does.

    Raises:
        AudioError: The segment lies outside the recording.
    """
    length = recording.num_frames
    first = int(start * recording.rate)
    last = length if end == -1 else int(end * recording.rate)
    if first >= length or last > length + MAX_OVERSHOOT * recording.rate:
        raise AudioError(
            OUTSIDE,
            f"{start:g} to {end:g} s of {name}, which lasts {length / recording.rate:g} s",
        )
    return first, min(last, length)


def choose_channel(samples: np.ndarray, channel: Optional[int], name: str) -> np.ndarray:
    """One channel ``(T,)`` of ``(T, C)``; which one must be said if there are several.

    Raises:
        AudioError: Several channels and no choice, no such channel, no or not finite samples.
    """
    count = samples.shape[1]
    if channel is None and count > 1:
        raise AudioError(CHANNELS, f"{name} has {count} channels; choose one, e.g. --ref_channel 0")
    if channel is not None and channel >= count:
        raise AudioError(CHANNELS, f"{name} has {count} channel(s), --ref_channel is {channel}")
    chosen = samples[:, channel or 0]
    if len(chosen) == 0:
        raise AudioError(NO_SAMPLES, name)
    if not np.isfinite(chosen).all():
        raise AudioError(NOT_FINITE, f"{name}, first at sample {np.argmin(np.isfinite(chosen))}")
    return chosen


def resample(samples: np.ndarray, rate: float, target: float) -> np.ndarray:
    """Resample ``(T,)`` or ``(T, C)`` with soxr's high-quality filter."""
    return samples if rate == target else soxr.resample(samples, rate, target)


def change_speed(samples: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Tempo and pitch times ``factor``, as ``sox speed`` does it (Ko et al., 2015, section 2).

    Rounded to 16 bit, so that it makes no difference whether the result went through a file.
    """
    if not len(samples):
        return samples
    return (to_pcm16(resample(samples, rate * factor, rate)) / 32768).astype(np.float32)


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Round to 16 bit; what lies outside [-1, 1) is clipped, not wrapped."""
    return np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype(np.int16)


def encode(samples: np.ndarray, rate: int, audio_format: str) -> bytes:
    """A 16-bit ``wav`` or ``flac`` file as bytes.

    Encoding in memory leaves the writing to Python, which reports a full disk; libsndfile does not
    where the last block is concerned.
    """
    buffer = io.BytesIO()
    pcm = to_pcm16(samples)
    soundfile.write(buffer, pcm, rate, format=audio_format.upper(), subtype="PCM_16")
    return buffer.getvalue()
