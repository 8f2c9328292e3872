"""Keep utterances of usable length with a transcript (stage 4)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.corpora.balance import write_categories
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import check_consistency, read_data_dir, write_data_dir
from espnet_llm_plugin.data.problems import Problem, Problems, listing
from espnet_llm_plugin.errors import UserError

REMOVED = "removed_utts"
SHORT = "too short"
LONG = "too long"
EMPTY = "empty transcript"


@dataclass(frozen=True)
class FilterSummary:
    """Counts of :func:`filter_data_dir`; an utterance is counted under its first reason."""

    kept: int
    too_short: int
    too_long: int
    empty: int


def filter_data_dir(
    source: Union[str, Path],
    target: Union[str, Path],
    *,
    fs: int,
    min_duration: float = 0.1,
    max_duration: float = 20.0,
) -> FilterSummary:
    """Copy a formatted data directory without utterances that are too short, too long or empty.

    The comparison is that of ESPnet's ``asr.sh``: strictly more than ``int(min_duration * fs)``
    samples and strictly fewer than ``int(max_duration * fs)``. ``target/removed_utts`` lists what
    was left out and why. With a table ``utt2lang`` there is also the ``category2utt`` that ESPnet's
    category samplers need.

    Args:
        source: Written by :func:`~.format.format_data_dir`.
        target: Directory to write, e.g. ``dump/raw/train``; audio stays where it is.
        fs: Sampling rate of the audio in Hz.
        min_duration, max_duration: Seconds.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise UserError(f"source and target are the same directory: {source}")
    if not 0 <= min_duration < max_duration:
        raise UserError(
            f"durations must satisfy 0 <= min < max, not min {min_duration} and max {max_duration}"
        )
    problems = Problems(str(source))
    data = read_data_dir(source, problems)
    check_consistency(data, problems, allow_empty_text=True)
    lengths = {key: int(value) for key, value in data.extra.get("utt2num_samples", {}).items()}
    for key in data.utterances:
        if key not in lengths:
            problems.add("no entry in utt2num_samples", key)
    problems.check("Make the directory again with format_wav_scp.")

    shortest, longest = int(min_duration * fs), int(max_duration * fs)
    removed: list[Problem] = []
    for key in data.utterances:
        if lengths[key] <= shortest:
            removed.append(Problem(SHORT, key, f"{lengths[key] / fs:.3f} s"))
        elif lengths[key] >= longest:
            removed.append(Problem(LONG, key, f"{lengths[key] / fs:.3f} s"))
        elif not data.text[key]:
            removed.append(Problem(EMPTY, key))
    counts = {kind: sum(p.kind == kind for p in removed) for kind in (SHORT, LONG, EMPTY)}
    kept = data.restrict(set(data.utterances) - {problem.key for problem in removed})
    if not kept.utterances:
        raise UserError(
            f"nothing would be left of {source}: {counts[SHORT]} utterance(s) of {min_duration} s "
            f"or less, {counts[LONG]} of {max_duration} s or more, {counts[EMPTY]} without text"
        )
    with writing(target):
        with atomic_write(target / REMOVED) as stream:
            stream.write(listing(removed))
        if (source / "feats_type").is_file():
            with atomic_write(target / "feats_type") as stream:
                stream.write((source / "feats_type").read_text(encoding="utf-8"))
        if "utt2lang" in kept.extra:
            write_categories(kept.extra["utt2lang"], target)
        write_data_dir(kept, target)
    return FilterSummary(len(kept.utterances), counts[SHORT], counts[LONG], counts[EMPTY])
