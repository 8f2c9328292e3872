"""Check a data directory before anything is computed from it, and copy what is usable."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Optional, Union

from tqdm import tqdm

from espnet_llm_plugin.data import audio
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
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
AUDIO_CHECKS = ("none", "header", "full")
ADVICE = (
    "Correct the data, or give --drop_bad true and --output_dir to get a copy without these "
    f"utterances (they are counted, and listed in its '{DROPPED}')."
)


def validate_data_dir(
    source: Union[str, Path],
    *,
    output_dir: Optional[Union[str, Path]] = None,
    drop_bad: bool = False,
    check_audio: str = "header",
    nj: int = 1,
    require_text: bool = True,
    utterance_is_speaker: bool = False,
    progress: bool = False,
) -> tuple[DataDir, Problems]:
    """Check ``source``; write a clean copy (paths resolved, spk2utt derived) to ``output_dir``.

    Args:
        source: Kaldi data directory, left as it is.
        output_dir: Where the copy goes; audio is not copied.
        drop_bad: Drop utterances with faults instead of raising; needs ``output_dir``, where
            ``dropped_utts`` lists them with the reasons.
        check_audio: ``none``; ``header`` (files exist, can be opened, have samples, contain their
            segments; pipes are not run); ``full`` (also decodes everything, runs pipes, looks for
            NaN).
        nj: Threads for the audio check.
        require_text, utterance_is_speaker: See :func:`~.kaldi.read_data_dir`.

    Returns:
        The usable part of the directory, and the faults.
    """
    source = Path(source)
    if drop_bad and output_dir is None:
        raise UserError("--drop_bad true needs --output_dir: the source directory is not changed")
    if output_dir is not None and Path(output_dir).resolve() == source.resolve():
        raise UserError(f"--output_dir is the source directory {source} itself")
    if check_audio not in AUDIO_CHECKS:
        raise UserError(f"check_audio is '{check_audio}', not one of {', '.join(AUDIO_CHECKS)}")
    problems = Problems(str(source))
    data = read_data_dir(
        source, problems, require_text=require_text, utterance_is_speaker=utterance_is_speaker
    )
    check_consistency(data, problems)
    wav = {key: audio.resolve(spec, source) for key, spec in data.wav.items()}
    data = replace(data, wav=wav)
    if check_audio != "none":
        problems.found.extend(_check_audio(data, check_audio == "full", nj, progress))
    if not drop_bad:
        problems.check(ADVICE)
    data = without_problems(data, problems)
    if output_dir is not None:
        with writing(output_dir):
            with atomic_write(Path(output_dir) / DROPPED) as stream:
                stream.write(listing(problems.found))
            write_data_dir(data, output_dir)
    return data, problems


def _check_audio(data: DataDir, full: bool, nj: int, progress: bool) -> list[Problem]:
    parts: dict[str, list[tuple[str, Optional[Segment]]]] = {}
    if data.segments is None:
        parts = {key: [(key, None)] for key in data.wav}
    else:
        for utterance, segment in sorted(data.segments.items()):
            if segment.recording in data.wav:
                parts.setdefault(segment.recording, []).append((utterance, segment))

    def check(recording: str) -> list[Problem]:
        return _check_recording(data.wav[recording], parts[recording], full)

    with ThreadPoolExecutor(nj) as pool:  # libsndfile works outside of Python's lock
        results = pool.map(check, sorted(parts))
        bar = tqdm(results, total=len(parts), unit="rec", disable=None if progress else True)
        return [problem for result in bar for problem in result]


def _check_recording(
    spec: str, parts: list[tuple[str, Optional[Segment]]], full: bool
) -> list[Problem]:
    if audio.is_pipe(spec) and not full:
        return []
    problems = []
    try:
        with audio.open_recording(spec) as recording:
            for utterance, segment in parts:
                try:
                    first, last = 0, None
                    if segment is not None:
                        name = f"{segment.recording} ({spec})"
                        first, last = audio.segment_bounds(
                            recording, segment.start, segment.end, name
                        )
                    if recording.num_frames == 0:
                        raise audio.AudioError(audio.NO_SAMPLES, spec)
                    if full:
                        samples = recording.read(first, last)
                        for channel in range(recording.num_channels):
                            audio.choose_channel(samples, channel, spec)
                except audio.AudioError as error:
                    problems.append(Problem(error.kind, utterance, error.detail))
    except audio.AudioError as error:
        problems.extend(Problem(error.kind, utterance, error.detail) for utterance, _ in parts)
    return problems
