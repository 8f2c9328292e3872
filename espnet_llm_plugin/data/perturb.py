"""Speed perturbation of data directories (stage 2).

Names as Kaldi's ``perturb_data_dir_speed.sh`` and ESPnet's give them: ``sp0.9-<utterance>`` of
speaker ``sp0.9-<speaker>``. The audio is not computed here: wav.scp gets pipes that need no sox,
which stage 3 computes without starting processes, and which ESPnet's own stage 3 can run, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data import audio
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import (
    DataDir,
    Segment,
    check_consistency,
    read_data_dir,
    write_data_dir,
)
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError

SHORTEST_SEGMENT = 0.01  # seconds; Kaldi's script drops shorter ones as well


def perturb_data_dir(data: DataDir, factor: str) -> DataDir:
    """``data`` played ``factor`` times as fast; ``factor`` is used literally in the names."""
    speed = _parse(factor)
    prefix = f"sp{factor}-"

    def renamed(table: dict) -> dict:
        return {prefix + key: value for key, value in table.items()}

    extra = {}
    for name, table in data.extra.items():
        if name in ("utt2dur", "spk2dur"):
            table = {key: f"{float(value) / speed:.3f}" for key, value in table.items()}
        extra[name] = renamed(table)
    unique = data.extra.get("utt2uniq") or {key: key for key in data.utt2spk}
    extra["utt2uniq"] = renamed(unique)

    segments = None
    if data.segments is not None:
        segments = {
            key: Segment(
                prefix + s.recording, s.start / speed, s.end if s.end == -1 else s.end / speed
            )
            for key, s in renamed(data.segments).items()
        }
    faster = replace(
        data,
        wav={prefix + key: audio.perturbed(spec, factor) for key, spec in data.wav.items()},
        utt2spk={prefix + key: prefix + speaker for key, speaker in data.utt2spk.items()},
        text=None if data.text is None else renamed(data.text),
        segments=segments,
        extra=extra,
    )
    if segments is None:
        return faster
    return faster.restrict(
        {key for key, s in segments.items() if s.end == -1 or s.end - s.start > SHORTEST_SEGMENT}
    )


def perturb_speed(
    source: Union[str, Path], target: Union[str, Path], factors: Sequence[str]
) -> int:
    """Write ``target`` with one copy of ``source`` per factor; a factor of 1 is the original.

    Args:
        source: Kaldi data directory.
        target: Directory to write, e.g. ``data/train_sp``.
        factors: Such as ``["0.9", "1.0", "1.1"]``.

    Returns:
        Number of utterances written.
    """
    source = Path(source)
    if Path(target).resolve() == source.resolve():
        raise UserError(f"source and target are the same directory: {source}")
    speeds = [_parse(factor) for factor in factors]
    if not factors or len(set(speeds)) < len(speeds):
        raise UserError(f"speed factors must be different numbers, not '{' '.join(factors)}'")
    problems = Problems(str(source))
    data = read_data_dir(source, problems)
    check_consistency(data, problems, allow_empty_text=True)
    problems.check("Correct the data before perturbing it (see validate_data_dir).")
    # The number of samples is another one at another speed; stage 3 writes it.
    extra = {name: table for name, table in data.extra.items() if name != "utt2num_samples"}
    extra.setdefault("utt2uniq", {key: key for key in data.utt2spk})
    wav = {key: audio.resolve(spec, source) for key, spec in data.wav.items()}
    data = replace(data, wav=wav, extra=extra)
    parts = [
        data if speed == 1 else perturb_data_dir(data, factor)
        for factor, speed in zip(factors, speeds)
    ]
    combined = combine(parts)
    with writing(target):
        write_data_dir(combined, target)
    return len(combined.utterances)


def combine(parts: Sequence[DataDir]) -> DataDir:
    """The union of data directories without common ids that have the same tables."""
    first = parts[0]
    return replace(
        first,
        wav={key: value for part in parts for key, value in part.wav.items()},
        utt2spk={key: value for part in parts for key, value in part.utt2spk.items()},
        text=None
        if first.text is None
        else {key: value for part in parts for key, value in part.text.items()},
        segments=None
        if first.segments is None
        else {key: value for part in parts for key, value in part.segments.items()},
        extra={
            name: {key: value for part in parts for key, value in part.extra[name].items()}
            for name in first.extra
        },
    )


def _parse(factor: str) -> float:
    try:
        speed = float(factor)
    except ValueError:
        speed = 0.0
    if not 0.1 <= speed <= 10:
        raise UserError(f"speed factor '{factor}' is not a number between 0.1 and 10")
    return speed
