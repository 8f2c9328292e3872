"""Collect the figures of several systems named in a small YAML file.

::

    command: ./run.sh                       # optional: how all this was made
    notes: |                                # optional: what a reader must know
      Synthetic speech.
    baseline: RNN-T                         # optional: paired comparison with each other system;
                                            # or a list of such
    seeds: [1, 2, 3]                        # optional: what {seed} in a path stands for; means over
                                            # seeds, and their standard deviation, are reported
    unfinished: true                        # optional: systems and seeds that are not scored yet
                                            # are listed as not run or left out, not an error
    cpu_time: true                          # optional: the CPU's seconds instead of the clock's, in
                                            # "cpu_rtf" and "cpu_seconds" instead of "rtf" and
                                            # "seconds" below: for figures of a busy machine
    utt2lang: {test: dump/test/utt2lang}    # optional: tables by language of these data sets
    training: [wer_llm, aux_per_label]      # optional: table of these statistics of the validation
                                            # set after the last epoch of "train_log"
    systems:
      - name: RNN-T
        test: exp/asr_rnnt/decode/test      # scored directory, or {data set: directory, ...}
        dev: exp/asr_rnnt/decode/dev        # optional, scored directory
        scales: exp/asr_rnnt/scales.json    # optional, {"best": {...}} or {...}; or a mapping here
        dev_nll: exp/asr_rnnt/dev_nll.json  # optional, {"nll_per_label": nats}
        perplexity: exp/lm/perplexity.json  # optional, {"word_perplexity": ...}, or with that in
                                            # "internal_lm" (what evaluate_nll writes)
        rtf: exp/asr_rnnt/decode/test/logdir/output.*/rtf.json    # optional, {"rtf": ...}; several
                                            # jobs are weighted by their "audio_seconds"; also
                                            # "lm_calls" and "lm_tokens" of "utterances"
        time: exp/asr_rnnt/time.json        # optional, {"seconds": ...}; several files: their sum;
                                            # also "memory_bytes" and "gpu_memory_bytes", the most
                                            # that any of them has
        train_log: exp/asr_sl/train.log     # optional, of a speech LLM: its last "shuffled_gap"
        group: 5 epochs                     # optional: a table for each group, comparisons inside
        command: ./run.sh --rows rnnt       # optional: how this system was made

A scored directory is the ``--output_dir`` of ``espnet_llm_plugin.bin.score``; what
``bin.score_language_id`` writes there makes a table of language identification. Paths are relative
to the working directory.
"""

import glob
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

import numpy as np

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.alignment import Counts
from espnet_llm_plugin.scoring.bootstrap import Difference, error_rate_interval
from espnet_llm_plugin.scoring.evaluate import (
    SCORES,
    Counted,
    check_same_references,
    compare_counts,
    pool_counts,
    read_counts,
)
from espnet_llm_plugin.scoring.result_files import (
    check_keys,
    number,
    read_gap,
    read_number,
    read_optional,
    read_per_utterance,
    read_perplexity,
    read_rtf,
    read_table,
)
from espnet_llm_plugin.scoring.training_log import last_statistics
from espnet_llm_plugin.scoring.units import CER, TER, WER
from espnet_llm_plugin.scoring.wer import Summary

SCALES = ("alpha", "beta", "ctc_weight", "textlm_weight", "label_bonus", "penalty", "lm_weight")
SCALES += ("ilm_weight", "prior_weight", "length_bonus", "length_norm")

_TOP_KEYS = {"command", "notes", "baseline", "seeds", "unfinished", "cpu_time", "systems"}
_TOP_KEYS |= {"utt2lang", "training"}
_SYSTEM_KEYS = {"name", "group", "command", "test", "dev", "scales", "dev_nll", "perplexity"}
_SYSTEM_KEYS |= {"rtf", "time", "train_log"}
_SEED = "{seed}"


@dataclass(frozen=True)
class Rate:
    """An error rate of one data set; over several seeds, sums and hence the mean."""

    summary: Summary
    low: float  # 95 % interval in per cent: of the utterances, not of the seeds
    high: float
    deviation: Optional[float] = None  # standard deviation over seeds in per cent


@dataclass(frozen=True)
class DataSet:
    """What ``score`` found for one data set."""

    directories: dict[Optional[int], Path]  # by seed; None: one run, whatever its seed
    rates: dict[str, Rate]  # by "wer", "cer", "ter"

    def counts(self, seeds: Optional[set[Optional[int]]] = None, unit: str = WER) -> Counted:
        """Errors of each utterance, summed over the seeds (default: all)."""
        return pool_counts(
            [
                read_counts(directory, unit)
                for seed, directory in self.directories.items()
                if seeds is None or seed in seeds
            ]
        )


@dataclass(frozen=True)
class System:
    """One line of the table; what is not known is None, or empty. Numbers are means over seeds."""

    name: str
    tests: dict[str, DataSet]
    dev: Optional[DataSet] = None
    scales: list[dict[str, float]] = field(default_factory=list)  # that differ, in order of seeds
    dev_nll: Optional[float] = None  # nats per label
    perplexity: Optional[float] = None  # of its LM, by words
    rtf: Optional[float] = None
    lm_calls: Optional[float] = None  # calls of the LM an utterance
    lm_tokens: Optional[float] = None  # tokens that it reads in them
    seconds: Optional[float] = None  # of training
    memory: float = 0.0  # peak resident bytes of its largest process; 0: not known
    gpu_memory: float = 0.0  # peak bytes of a GPU; 0: not known, or none was used
    audio_gap: Optional[float] = None  # speech LLM: nats per token lost with wrong audio, on dev
    group: Optional[str] = None
    command: Optional[str] = None
    training: dict[str, float] = field(default_factory=dict)  # statistics of the last epoch


@dataclass(frozen=True)
class Results:
    systems: list[System]
    baselines: list[str]
    command: Optional[str]
    notes: Optional[str]
    utt2lang: dict[str, str] = field(default_factory=dict)  # by test set
    training: list[str] = field(default_factory=list)  # statistics that are reported

    def groups(self) -> dict[Optional[str], list[System]]:
        """Systems by their groups, in order of appearance."""
        found: dict[Optional[str], list[System]] = {}
        for system in self.systems:
            found.setdefault(system.group, []).append(system)
        return found

    def comparisons(
        self, test: str, baseline: str, group: Optional[str], resamples: int, seed: int
    ) -> list[tuple[System, Difference]]:
        """Paired bootstrap of a baseline with every other system of its group on a test set.

        Only seeds that both have count; systems without such are left out.
        """
        systems = {s.name: s for s in self.groups()[group] if test in s.tests}
        if baseline not in systems:
            return []
        base = systems.pop(baseline).tests[test]
        pairs = []
        for system in systems.values():
            common = base.directories.keys() & system.tests[test].directories.keys()
            if common:
                first, second = base.counts(common), system.tests[test].counts(common)
                pairs.append((system, compare_counts(first, second, resamples, seed)))
        return pairs

    def tests(self) -> list[str]:
        """Names of all test sets, in order of appearance."""
        return list(dict.fromkeys(test for system in self.systems for test in system.tests))


def load_results(path: Union[str, Path]) -> Results:
    """Read the YAML file and all files it names.

    Raises:
        UserError: A missing or malformed file, an unknown or missing key, or systems that were
            not scored on the same references.
    """
    config = read_table(path)
    check_keys(str(path), config, _TOP_KEYS, required={"systems"})
    entries = config["systems"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: systems must be a list of mappings")
    cpu = "cpu_" if config.get("cpu_time") is True else ""
    reader = _Reader(
        _seeds(path, config.get("seeds")),
        config.get("unfinished") is True,
        cpu,
        _training(path, config.get("training")),
    )
    systems = [
        _load_system(f"{path}: system {n}", entry, reader) for n, entry in enumerate(entries, 1)
    ]
    names = dict.fromkeys(system.name for system in systems)
    if not systems or len({(s.group, s.name) for s in systems}) < len(systems):
        raise UserError(
            f"{path}: systems need at least one entry, and names that differ (in each group)"
        )
    baselines = config.get("baseline") or []
    baselines = baselines if isinstance(baselines, list) else [baselines]
    if reader.unfinished:  # it may be one of those to come
        baselines = [baseline for baseline in baselines if baseline in names]
    for baseline in baselines:
        if baseline not in names:
            raise UserError(f"{path}: baseline {baseline} is none of {', '.join(names)}")
    results = Results(
        systems=systems,
        baselines=baselines,
        command=config.get("command"),
        notes=config.get("notes"),
        utt2lang=config.get("utt2lang") or {},
        training=reader.training,
    )
    if not results.tests():
        raise UserError(f"{path}: not one of its systems has been scored yet")
    if not isinstance(results.utt2lang, dict) or results.utt2lang.keys() - set(results.tests()):
        raise UserError(
            f"{path}: utt2lang is {results.utt2lang!r}; expected a mapping from some of the data "
            f"sets {', '.join(results.tests())} to files"
        )
    _check_references(results)
    return results


def _seeds(path: Union[str, Path], value: Any) -> list[int]:
    value = [] if value is None else value
    if not isinstance(value, list) or any(type(seed) is not int for seed in value):
        raise UserError(f"{path}: seeds must be a list of integers, not {value!r}")
    return value


def _training(path: Union[str, Path], value: Any) -> list[str]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: training must be a list of names of statistics, not {value!r}")
    return value


def _check_references(results: Results) -> None:
    """All systems must have been scored on the same utterances and words."""
    for test in results.tests():
        counted = [
            read_counts(directory)
            for system in results.systems
            if test in system.tests
            for directory in system.tests[test].directories.values()
        ]
        for other in counted[1:]:
            check_same_references(counted[0], other)


@dataclass(frozen=True)
class _Reader:
    """Reads what a path stands for: one file or directory, or one of each seed."""

    seeds: list[int]
    unfinished: bool
    clock: str = ""  # before the names of times: "" of the clock, "cpu_" of the CPU
    training: list[str] = field(default_factory=list)

    def each(self, path: Union[str, Path]) -> Iterator[tuple[Optional[int], str]]:
        """Seed and path; one pair with None if the path has no ``{seed}``."""
        if _SEED not in str(path):
            yield None, str(path)
            return
        if not self.seeds:
            raise UserError(f"{path}: there is {_SEED} in it, but `seeds` is missing")
        for seed in self.seeds:
            yield seed, str(path).replace(_SEED, str(seed))

    def present(self, paths: dict[Optional[int], str]) -> dict[Optional[int], str]:
        """Without those that do not exist, if some may be unfinished."""
        if not self.unfinished:
            return paths
        return {seed: path for seed, path in paths.items() if glob.glob(path)}

    def mean(self, path: Optional[str], read: Callable[[str], float]) -> Optional[float]:
        """Mean over the seeds of what ``read`` finds; None if there is nothing."""
        if path is None:
            return None
        found = self.present(dict(self.each(path)))
        return statistics.fmean(map(read, found.values())) if found else None

    def gap(self, log: Optional[str]) -> Optional[float]:
        """Mean shuffled-audio gap of the logs; an unfinished one may have no epoch yet."""
        if self.unfinished and log is not None:
            logs = self.present(dict(self.each(log))).values()
            gaps = [read_gap(one) for one in logs if last_statistics(one)]
            return statistics.fmean(gaps) if gaps else None
        return self.mean(log, read_gap)

    def statistics(self, log: Optional[str]) -> dict[str, float]:
        """Means over the seeds of the statistics ``training`` that a log has."""
        if log is None or not self.training:
            return {}
        logs = [last_statistics(one) for one in self.present(dict(self.each(log))).values()]
        found = {name: [one[name] for one in logs if name in one] for name in self.training}
        return {name: statistics.fmean(values) for name, values in found.items() if values}

    def most(self, paths: list[str], key: str) -> float:
        """The largest number of that name in some files, of all seeds; 0 if none has it."""
        files = [file for path in paths for file in self.present(dict(self.each(path))).values()]
        return max((read_optional(file, key) for file in files), default=0.0)

    def data_set(self, directory: Union[str, Path]) -> Optional[DataSet]:
        """What was scored there; None if nothing is finished."""
        scores = {seed: str(Path(one) / SCORES) for seed, one in self.each(directory)}
        directories = {seed: Path(path).parent for seed, path in self.present(scores).items()}
        return _pooled(directories) if directories else None


def _load_system(where: str, entry: dict, reader: _Reader) -> System:
    check_keys(where, entry, _SYSTEM_KEYS, required={"name", "test"})
    where = f"{where} ({entry['name']})"
    test = entry["test"]
    directories = test if isinstance(test, dict) else {Path(str(test)).name: test}
    tests = {str(name): reader.data_set(directory) for name, directory in directories.items()}
    times = entry.get("time")
    times = times if isinstance(times, list) else [times] if times is not None else []
    jobs = entry.get("rtf")
    seconds_key = reader.clock + "seconds"
    seconds = [reader.mean(file, lambda one: read_number(one, seconds_key)) for file in times]
    return System(
        name=str(entry["name"]),
        tests={name: found for name, found in tests.items() if found is not None},
        dev=None if entry.get("dev") is None else reader.data_set(entry["dev"]),
        scales=_load_scales(where, entry.get("scales"), reader),
        dev_nll=reader.mean(entry.get("dev_nll"), lambda one: read_number(one, "nll_per_label")),
        perplexity=reader.mean(entry.get("perplexity"), read_perplexity),
        rtf=reader.mean(jobs, lambda one: read_rtf(one, reader.clock + "rtf")),
        lm_calls=reader.mean(jobs, lambda one: read_per_utterance(one, "lm_calls")) or None,
        lm_tokens=reader.mean(jobs, lambda one: read_per_utterance(one, "lm_tokens")) or None,
        seconds=sum(seconds) if seconds and None not in seconds else None,
        memory=reader.most(times, "memory_bytes"),
        gpu_memory=reader.most(times, "gpu_memory_bytes"),
        audio_gap=reader.gap(entry.get("train_log")),
        group=entry.get("group"),
        command=entry.get("command"),
        training=reader.statistics(entry.get("train_log")),
    )


def _pooled(directories: dict[Optional[int], Path]) -> DataSet:
    runs = [_load_rates(directory) for directory in directories.values()]
    if len(runs) == 1:
        return DataSet(directories, runs[0])
    rates = {}
    for unit in runs[0]:
        summaries = [run[unit].summary for run in runs]
        pooled = DataSet(directories, {}).counts(unit=unit)
        interval = error_rate_interval(
            np.array(list(pooled.errors.values())), np.array(list(pooled.words.values()))
        )
        summary = Summary(
            sentences=sum(one.sentences for one in summaries),
            sentence_errors=sum(one.sentence_errors for one in summaries),
            counts=Counts(*map(sum, zip(*(one.counts for one in summaries)))),
        )
        deviation = statistics.stdev(one.rate for one in summaries)
        rates[unit] = Rate(summary, *interval, deviation=deviation)
    return DataSet(directories, rates)


def load_data_set(directory: Path) -> DataSet:
    """What ``score`` found in one directory."""
    return DataSet({None: directory}, _load_rates(directory))


def _load_rates(directory: Path) -> dict[str, Rate]:
    path = directory / SCORES
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; score {directory} first (espnet_llm_plugin.bin.score)"
        )
    scores = read_table(path)
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
    return rates


def _load_scales(where: str, value: Any, reader: _Reader) -> list[dict[str, float]]:
    """Those that differ, in order of seeds."""
    if value is None:
        return []
    if isinstance(value, str):
        files = reader.present(dict(reader.each(value)))
        tables = {file: read_table(file) for file in files.values()}
        found = [_scales(file, table.get("best", table)) for file, table in tables.items()]
    else:
        found = [_scales(where, value)]
    return [scales for n, scales in enumerate(found) if scales not in found[:n]]


def _scales(where: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not any(name in value for name in SCALES):
        raise UserError(f"{where}: no scale in it; expected some of {', '.join(SCALES)}")
    return {name: number(f"{where}: {name}", value[name]) for name in SCALES if name in value}
