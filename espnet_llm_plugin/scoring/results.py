"""Collect the figures of several systems named in a small YAML file.

::

    command: ./run.sh                       # optional: how all this was made
    notes: |                                # optional: what a reader must know
      Synthetic speech.
    baseline: RNN-T                         # optional: paired comparison with each other system
    systems:
      - name: RNN-T
        test: exp/asr_rnnt/decode/test      # scored directory, or {data set: directory, ...}
        dev: exp/asr_rnnt/decode/dev        # optional, scored directory
        scales: exp/asr_rnnt/scales.json    # optional, {"best": {...}} or {...}; or a mapping here
        dev_nll: exp/asr_rnnt/dev_nll.json  # optional, {"nll_per_label": nats}
        rtf: exp/asr_rnnt/decode/test/logdir/output.*/rtf.json    # optional, {"rtf": ...}; several
                                            # jobs are weighted by their "audio_seconds"
        time: exp/asr_rnnt/time.json        # optional, {"seconds": ...}; several files: their sum

A scored directory is the ``--output_dir`` of ``espnet_llm_plugin.bin.score``. Paths are relative
to the working directory.
"""

import glob
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.alignment import Counts
from espnet_llm_plugin.scoring.bootstrap import Difference
from espnet_llm_plugin.scoring.evaluate import (
    SCORES,
    check_same_references,
    compare_counts,
    read_counts,
)
from espnet_llm_plugin.scoring.units import CER, TER, WER
from espnet_llm_plugin.scoring.wer import Summary

SCALES = ("alpha", "beta", "label_bonus", "lm_weight")

_TOP_KEYS = {"command", "notes", "baseline", "systems"}
_SYSTEM_KEYS = {"name", "test", "dev", "scales", "dev_nll", "rtf", "time"}


@dataclass(frozen=True)
class Rate:
    """An error rate of one data set."""

    summary: Summary
    low: float  # 95 % interval in per cent
    high: float


@dataclass(frozen=True)
class DataSet:
    """What ``score`` found for one data set."""

    directory: Path
    rates: dict[str, Rate]  # by "wer", "cer", "ter"


@dataclass(frozen=True)
class System:
    """One line of the table; what is not known is None."""

    name: str
    tests: dict[str, DataSet]
    dev: Optional[DataSet] = None
    scales: dict[str, float] = field(default_factory=dict)
    dev_nll: Optional[float] = None  # nats per label
    rtf: Optional[float] = None
    seconds: Optional[float] = None  # of training


@dataclass(frozen=True)
class Results:
    systems: list[System]
    baseline: Optional[System]
    command: Optional[str]
    notes: Optional[str]

    def comparisons(self, test: str, resamples: int, seed: int) -> list[tuple[System, Difference]]:
        """Paired bootstrap of the baseline with every other system that has this test set."""
        base = self.baseline
        if base is None or test not in base.tests:
            return []
        first = read_counts(base.tests[test].directory)
        return [
            (
                system,
                compare_counts(first, read_counts(system.tests[test].directory), resamples, seed),
            )
            for system in self.systems
            if system is not base and test in system.tests
        ]

    def tests(self) -> list[str]:
        """Names of all test sets, in order of appearance."""
        return list(dict.fromkeys(test for system in self.systems for test in system.tests))


def load_results(path: Union[str, Path]) -> Results:
    """Read the YAML file and all files it names.

    Raises:
        UserError: A missing or malformed file, an unknown or missing key, or systems that were
            not scored on the same references.
    """
    config = _read_table(path)
    _check_keys(str(path), config, _TOP_KEYS, required={"systems"})
    entries = config["systems"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: systems must be a list of mappings")
    systems = [_load_system(f"{path}: system {n}", entry) for n, entry in enumerate(entries, 1)]
    by_name = {system.name: system for system in systems}
    if not systems or len(by_name) < len(systems):
        raise UserError(f"{path}: systems need at least one entry, and names that differ")
    baseline = config.get("baseline")
    if baseline is not None and baseline not in by_name:
        raise UserError(f"{path}: baseline {baseline} is none of {', '.join(by_name)}")
    results = Results(
        systems=systems,
        baseline=by_name.get(baseline),
        command=config.get("command"),
        notes=config.get("notes"),
    )
    _check_references(results)
    return results


def _check_references(results: Results) -> None:
    """All systems must have been scored on the same utterances and words."""
    for test in results.tests():
        counted = [read_counts(s.tests[test].directory) for s in results.systems if test in s.tests]
        for other in counted[1:]:
            check_same_references(counted[0], other)


def _load_system(where: str, entry: dict) -> System:
    _check_keys(where, entry, _SYSTEM_KEYS, required={"name", "test"})
    where = f"{where} ({entry['name']})"
    test = entry["test"]
    directories = test if isinstance(test, dict) else {Path(str(test)).name: test}
    times = entry.get("time")
    times = times if isinstance(times, list) else [times] if times is not None else []
    seconds = [_read_number(file, "seconds") for file in times]
    return System(
        name=str(entry["name"]),
        tests={str(name): _load_data_set(directory) for name, directory in directories.items()},
        dev=None if entry.get("dev") is None else _load_data_set(entry["dev"]),
        scales=_load_scales(where, entry.get("scales")),
        dev_nll=_read_optional(entry.get("dev_nll"), "nll_per_label"),
        rtf=_read_rtf(entry.get("rtf")),
        seconds=sum(seconds) if seconds else None,
    )


def _load_data_set(directory: Union[str, Path]) -> DataSet:
    path = Path(str(directory)) / SCORES
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; score {directory} first (espnet_llm_plugin.bin.score)"
        )
    scores = _read_table(path)
    rates = {}
    try:
        for unit in (WER, CER, TER):
            if unit in scores:
                table = scores[unit]
                rates[unit] = Rate(
                    Summary(
                        sentences=table["sentences"],
                        sentence_errors=table["sentence_errors"],
                        counts=Counts(*(table[name] for name in Counts._fields)),
                    ),
                    *table["interval"],
                )
        if WER not in rates:
            raise KeyError(WER)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by espnet_llm_plugin.bin.score ({error})") from error
    return DataSet(Path(str(directory)), rates)


def _load_scales(where: str, value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, str):
        where, value = value, _read_table(value)
        value = value.get("best", value)
    if not isinstance(value, dict) or not any(name in value for name in SCALES):
        raise UserError(f"{where}: no scale in it; expected some of {', '.join(SCALES)}")
    return {name: _number(f"{where}: {name}", value[name]) for name in SCALES if name in value}


def _read_optional(path: Optional[str], key: str) -> Optional[float]:
    return None if path is None else _read_number(path, key)


def _read_rtf(pattern: Optional[str]) -> Optional[float]:
    """Real-time factor of all decoding jobs whose file matches the pattern."""
    if pattern is None:
        return None
    files = sorted(glob.glob(str(pattern)))
    if not files:
        raise UserError(f"{pattern}: no such file")
    factors = [_read_number(file, "rtf") for file in files]
    if len(files) == 1:
        return factors[0]
    audio = [_read_number(file, "audio_seconds") for file in files]
    return sum(factor * seconds for factor, seconds in zip(factors, audio)) / sum(audio)


def _read_number(path: Union[str, Path], key: str) -> float:
    table = _read_table(path)
    if key not in table:
        raise UserError(f"{path}: no {key} in it; it has {', '.join(table) or 'nothing'}")
    return _number(f"{path}: {key}", table[key])


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; expected a number")
    return float(value)


def _read_table(path: Union[str, Path]) -> dict:
    """Read a mapping from a JSON (``.json``) or YAML file."""
    path = Path(str(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        table = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a mapping")
    return table


def _check_keys(where: str, table: dict, known: set[str], required: set[str]) -> None:
    unknown = sorted(set(map(str, table)) - known)
    if unknown:
        raise UserError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    missing = sorted(key for key in required if table.get(key) is None)
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} is missing")
