"""Write a data directory whose wav.scp names only plain files of one format and sampling rate.

Replaces ESPnet's ``scripts/audio/format_wav_scp.sh`` (stage 3). Files that are already as wanted
are referred to in place, all others are decoded, cut, resampled and written by several processes.
Finished files are noted in a journal, so a run that was interrupted goes on where it stopped.
"""

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional, Union

from tqdm import tqdm

from espnet_llm_plugin.data import audio
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import explain, writing
from espnet_llm_plugin.data.journal import Done, Job, Journal, Settings, output_path, signature
from espnet_llm_plugin.data.kaldi import (
    DataDir,
    Segment,
    check_consistency,
    read_data_dir,
    without_problems,
    write_data_dir,
)
from espnet_llm_plugin.data.problems import Problem, Problems, listing
from espnet_llm_plugin.errors import UserError

DROPPED = "dropped_utts"
ADVICE = (
    "Correct the data, or give --drop_bad true to leave these utterances out (they are counted "
    f"and listed in '{DROPPED}')."
)
AUDIO_FORMATS = ("flac", "wav")


@dataclass
class Result:
    """What became of a batch of jobs; ``fatal`` is a message that ends the whole run."""

    done: list[Done] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    fatal: str = ""


@dataclass(frozen=True)
class Summary:
    """Counts of a finished :func:`format_data_dir`."""

    utterances: int
    dropped: int
    reused: int
    seconds: float


def _usable_in_place(job: Job, recording: audio.Recording, settings: Settings) -> bool:
    stream = getattr(recording, "stream", None)
    return (
        stream is not None
        and job.parts[0][1] is None
        and not audio.is_pipe(job.spec)
        and job.spec.endswith(f".{settings.audio_format}")
        and stream.format == settings.audio_format.upper()
        and stream.subtype == "PCM_16"
        and stream.channels == 1
        and settings.fs in (None, stream.samplerate)
    )


def process(jobs: Iterable[Job], settings: Settings) -> Result:
    """Decode, check and write the utterances of some recordings (runs in a worker process)."""
    result = Result()
    for job in jobs:
        try:
            with audio.open_recording(job.spec) as recording:
                for utterance, segment in job.parts:
                    try:
                        result.done.append(_finish(job, recording, utterance, segment, settings))
                    except audio.AudioError as error:
                        result.bad.append(Problem(error.kind, utterance, error.detail))
        except audio.AudioError as error:
            for utterance, _ in job.parts:
                result.bad.append(Problem(error.kind, utterance, error.detail))
        except OSError as error:
            result.fatal = explain(error, settings.directory)
            break
    return result


def _finish(
    job: Job,
    recording: audio.Recording,
    utterance: str,
    segment: Optional[Segment],
    settings: Settings,
) -> Done:
    first, last = 0, None
    if segment is not None:
        recording_name = segment.recording
        first, last = audio.segment_bounds(
            recording, segment.start, segment.end, f"{recording_name} ({job.spec})"
        )
    samples = audio.choose_channel(recording.read(first, last), settings.channel, job.spec)
    made = signature(job, segment, settings)
    if _usable_in_place(job, recording, settings):
        return Done(utterance, made, len(samples), recording.rate, 0, job.spec)
    rate = settings.fs or recording.rate
    samples = audio.resample(samples, recording.rate, rate)
    if len(samples) == 0:
        raise audio.AudioError(audio.NO_SAMPLES, f"{job.spec}, at {rate} Hz")
    content = audio.encode(samples, rate, settings.audio_format)
    path = output_path(utterance, settings)
    write_bytes(path, content)
    return Done(utterance, made, len(samples), rate, len(content), path)


def write_bytes(path: str, content: bytes) -> None:
    """Temporary file and rename; without ``fsync``, which would cost more than all the rest.

    (A file lost to a power cut is found by its size in the next run.)
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _batches(jobs: list[Job], nj: int) -> Iterator[list[Job]]:
    """Jobs in portions of at most 64 utterances, and at least eight portions a process.

    Many segments of one file are divided, too, where each portion can seek to its own; what comes
    from a command or an archive is read once, in one portion.
    """
    size = max(1, min(64, sum(len(job.parts) for job in jobs) // (8 * nj)))
    batch: list[Job] = []
    count = 0
    for job in jobs:
        step = size if audio.is_seekable(job.spec) else len(job.parts)
        for start in range(0, len(job.parts), step):
            part = replace(job, parts=job.parts[start : start + step])
            if batch and count + len(part.parts) > size:
                yield batch
                batch, count = [], 0
            batch.append(part)
            count += len(part.parts)
    if batch:
        yield batch


def _run(jobs: list[Job], settings: Settings, nj: int) -> Iterator[Result]:
    """Results in the order of the jobs, from ``nj`` processes."""
    batches = list(_batches(jobs, nj))
    nj = min(nj, len(batches))
    if nj <= 1:
        for batch in batches:
            yield process(batch, settings)
        return
    # "spawn", not "fork": the caller may have threads (torch), and the workers import little.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(nj, mp_context=context, initializer=_die_with_parent) as pool:
        try:
            yield from pool.map(process, batches, [settings] * len(batches))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died (out of memory?). What was finished is kept: run the same "
                "command again to continue, with a smaller --nj if memory is short"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """One run at a time per output directory; the lock goes when the process dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing to {directory}; wait for it") from error
        yield


def _jobs(data: DataDir) -> list[Job]:
    if data.segments is None:
        return [
            Job(audio.resolve(data.wav[key], data.path), ((key, None),)) for key in data.utterances
        ]
    parts: dict[str, list[tuple[str, Optional[Segment]]]] = {}
    for utterance, segment in sorted(data.segments.items()):
        parts.setdefault(segment.recording, []).append((utterance, segment))
    return [
        Job(audio.resolve(data.wav[recording], data.path), tuple(utterances))
        for recording, utterances in sorted(parts.items())
    ]


def format_data_dir(
    source: Union[str, Path],
    target: Union[str, Path],
    *,
    fs: Optional[int] = None,
    audio_format: str = "flac",
    ref_channel: Optional[int] = None,
    nj: int = 1,
    drop_bad: bool = False,
    require_text: bool = True,
    utterance_is_speaker: bool = False,
    progress: bool = False,
) -> Summary:
    """Write ``target``: wav.scp, utt2num_samples, feats_type (``raw``), text, utt2spk, spk2utt.

    Args:
        source: Kaldi data directory; see :mod:`espnet_llm_plugin.data.kaldi`.
        target: Directory to write, e.g. ``dump/raw/org/train``; audio goes to ``target/data``.
        fs: Sampling rate in Hz; ``None`` keeps the sources' (which must then be one).
        audio_format: ``flac`` or ``wav``.
        ref_channel: Channel to take, counted from 0; recordings with several need it.
        nj: Number of processes; the result does not depend on it.
        drop_bad: Leave unusable utterances out and list them in ``target/dropped_utts``;
            otherwise they are an error, raised after all others have been finished.
        require_text, utterance_is_speaker: See :func:`~.kaldi.read_data_dir`. Empty transcripts
            are kept: stage 4 removes them from training sets.
        progress: Show a progress bar (on terminals only).

    Raises:
        UserError: Faults of the data, a full disk, a dead worker, another run in ``target``.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise UserError(f"source and target are the same directory: {source}")
    if audio_format not in AUDIO_FORMATS:
        raise UserError(f"audio format '{audio_format}' is not one of {', '.join(AUDIO_FORMATS)}")
    problems = Problems(str(source))
    data = read_data_dir(
        source, problems, require_text=require_text, utterance_is_speaker=utterance_is_speaker
    )
    check_consistency(data, problems, allow_empty_text=True)
    if not drop_bad:
        problems.check(ADVICE)
    data = without_problems(data, problems)

    audio_directory = target / "data"
    settings = Settings(str(audio_directory), fs, audio_format, ref_channel)
    with writing(target), _alone_in(audio_directory):
        (target / "wav.scp").unlink(missing_ok=True)  # written last: its presence means success
        for leftover in audio_directory.glob("format.*/*.tmp"):
            leftover.unlink()
        done, reused = _make_audio(_jobs(data), settings, nj, problems, progress)
        if not drop_bad:
            problems.check(ADVICE)
        data = without_problems(data, problems)
        rates = {done[key].rate: key for key in data.utterances}
        if len(rates) > 1:
            cases = ", ".join(f"{rate} Hz ({key})" for rate, key in sorted(rates.items()))
            raise UserError(f"{source} has several sampling rates: {cases}. Choose one with --fs")
        _write_tables(data, done, target, problems)
    samples = sum(done[key].num_samples for key in data.utterances)
    rate = next(iter(rates))
    return Summary(len(data.utterances), len(problems.keys), reused, samples / rate)


def _make_audio(
    jobs: list[Job], settings: Settings, nj: int, problems: Problems, progress: bool
) -> tuple[dict[str, Done], int]:
    """All finished utterances, and how many of them an earlier run had finished."""
    journal = Journal(Path(settings.directory) / "journal")
    done: dict[str, Done] = {}
    todo = []
    for job in jobs:
        rest = []
        for part in job.parts:
            if journal.finished(job, *part, settings):
                done[part[0]] = journal.entries[part[0]]
            else:
                rest.append(part)
        if rest:
            todo.append(replace(job, parts=tuple(rest)))
    reused = len(done)
    total = reused + sum(len(job.parts) for job in todo)
    disable = None if progress else True
    with tqdm(total=total, initial=reused, unit="utt", disable=disable) as bar, journal.stream:
        for result in _run(todo, settings, nj):
            journal.add(result.done)
            done.update((entry.utterance, entry) for entry in result.done)
            problems.found.extend(result.bad)
            bar.update(len(result.done) + len(result.bad))
            if result.fatal:
                raise UserError(result.fatal)
    return done, reused


def _write_tables(data: DataDir, done: dict[str, Done], target: Path, problems: Problems) -> None:
    """wav.scp last of all."""
    utterances = data.utterances
    with atomic_write(target / "feats_type") as stream:
        stream.write("raw\n")
    with atomic_write(target / DROPPED) as stream:
        stream.write(listing(problems.found))
    num_samples = {key: str(done[key].num_samples) for key in utterances}
    formatted = replace(
        data,
        wav={key: done[key].path for key in utterances},
        segments=None,
        extra={**data.extra, "utt2num_samples": num_samples},
    )
    write_data_dir(formatted, target)
