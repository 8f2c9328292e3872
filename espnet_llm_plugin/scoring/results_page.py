"""``RESULTS.md``: a comparison of the systems, then the blocks of ESPnet's show_asr_result.sh."""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable, Optional

from espnet_llm_plugin import __version__
from espnet_llm_plugin.scoring.diagnose import PAGE as DIAGNOSIS
from espnet_llm_plugin.scoring.report import percentage_cells
from espnet_llm_plugin.scoring.results import DataSet, Results, System, load_data_set
from espnet_llm_plugin.scoring.results_languages import identification_tables, language_tables
from espnet_llm_plugin.scoring.table import markdown
from espnet_llm_plugin.scoring.units import CER, TER, WER

UNKNOWN = "-"
NOT_RUN = "not run"
_SCALE_NAMES = {"alpha": "alpha", "beta": "beta", "label_bonus": "bonus", "lm_weight": "LM"}
_SCALE_NAMES |= {"ilm_weight": "internal LM", "ctc_weight": "CTC", "penalty": "bonus"}
_SCALE_NAMES |= {"prior_weight": "prior", "length_bonus": "bonus"}
_SCALE_NAMES |= {"textlm_weight": "LLM without audio", "length_norm": "length norm"}


def comparison(results: Results, group: Optional[str] = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a group; columns that nobody fills are left out."""
    header = ["system", "dev WER"]
    for test in results.tests():
        header += [f"{test} WER", "sd over seeds", "95 %", "ins / del / sub"]
    header += ["seeds", "scales", "LM word PPL", "dev NLL/label", "audio gap", "RTF"]
    header += ["LM calls / utt", "LM tokens / utt", "training", "training memory"]
    rows = []
    for system in results.groups()[group]:
        row = [system.name, UNKNOWN if system.dev is None else _rate(system.dev)]
        for test in results.tests():
            row += _test_cells(system.tests.get(test), missing=UNKNOWN if system.tests else NOT_RUN)
        seeds = {seed for data in system.tests.values() for seed in data.directories}
        row += [
            str(len(seeds)) if seeds - {None} else UNKNOWN,
            "; ".join(map(_scales, system.scales)) or UNKNOWN,
            _number(system.perplexity, "{:.1f}"),
            _number(system.dev_nll, "{:.3f}"),
            _number(system.audio_gap, "{:.2f}"),
            _number(system.rtf, "{:.3f}"),
            _number(system.lm_calls, "{:.1f}"),
            _number(system.lm_tokens, "{:.1f}"),
            UNKNOWN if system.seconds is None else duration(system.seconds),
            _memory(system),
        ]
        rows.append(row)
    filled = [n for n in range(len(header)) if any(row[n] != UNKNOWN for row in rows)]
    return [header[n] for n in filled], [[row[n] for n in filled] for row in rows]


def training(results: Results, group: Optional[str] = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the statistics of training; systems without any are left out."""
    systems = [system for system in results.groups()[group] if system.training]
    names = [name for name in results.training if any(name in s.training for s in systems)]
    rows = [[s.name, *(_number(s.training.get(name), "{:.3f}") for name in names)] for s in systems]
    return ["system", *names], rows


def _memory(system: System) -> str:
    if system.seconds is None:  # a part of the training is not finished
        return UNKNOWN
    parts = (("", system.memory), ("GPU ", system.gpu_memory))
    return ", ".join(f"{name}{size / 1e9:.1f} GB" for name, size in parts if size) or UNKNOWN


def _scales(scales: dict[str, float]) -> str:
    return ", ".join(f"{_SCALE_NAMES[name]} {value:g}" for name, value in scales.items())


def paired(
    results: Results, test: str, baseline: str, group: Optional[str], resamples: int, seed: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison of a baseline with each other system of its group."""
    header = ["system", "WER", "baseline - system", "95 %", "relative", "better in"]
    rows = [
        [
            system.name,
            f"{pair.second:.2f}",
            f"{pair.difference:+.2f}" + ("*" if pair.significant else ""),
            f"{pair.low:+.2f} to {pair.high:+.2f}",
            f"{pair.relative:+.1f} %",
            f"{100 * pair.probability:.1f} %",
        ]
        for system, pair in results.comparisons(test, baseline, group, resamples, seed)
    ]
    return header, rows


@dataclass(frozen=True)
class Summary:
    """The tables that compare the systems: the first has no title."""

    tables: list[tuple[str, list[str], list[list[str]]]]  # title, header, rows

    def text(self, form: Callable[[list[str], list[list[str]]], str]) -> str:
        """All tables as ``table.plain`` or ``table.markdown`` sets them."""
        return "\n".join(
            f"{title}\n\n{form(header, rows)}" if title else form(header, rows)
            for title, header, rows in self.tables
        )


def summarize(results: Results, resamples: int, seed: int) -> Summary:
    """For each group the comparison of its systems, also by language, and with each baseline."""
    tables = []
    for group in results.groups():
        tables.append(("" if group is None else f"### {group}", *comparison(results, group)))
        tables += language_tables(results, group) + identification_tables(results, group)
        header, rows = training(results, group)
        if rows:
            tables.append(("The validation set after the last epoch of training", header, rows))
        for test in results.tests():
            for baseline in results.baselines:
                header, rows = paired(results, test, baseline, group, resamples, seed)
                if rows:
                    title = (
                        f"Paired comparison with {baseline} on {test}: WER, absolute; positive"
                        " where the system is better; with a star where the 95 % interval of "
                        f"{resamples} bootstrap resamples of the utterances excludes 0"
                    )
                    tables.append((title, header, rows))
    return Summary(tables)


def results_markdown(results: Results, summary: Summary) -> str:
    """All of RESULTS.md."""
    text = [
        "<!-- Generated by espnet_llm_plugin.bin.results_table -->\n# RESULTS\n",
        "## Comparison\n",
        summary.text(markdown),
    ]
    if results.notes:
        text.append(results.notes.strip() + "\n")
    commands = [
        [system.group or UNKNOWN, system.name, f"`{system.command.strip()}`"]
        for system in results.systems
        if system.command
    ]
    if commands:
        text.append(f"## Commands\n\n{markdown(['group', 'system', 'command'], commands)}")
    text.append(environment(results.command))
    text += _espnet_blocks(results)
    return "\n".join(text)


def environment(command: Optional[str]) -> str:
    """The block of versions."""
    lines = [
        "## Environments",
        f"- date: `{time.strftime('%a %b %d %H:%M:%S %Z %Y')}`",
        f"- python version: `{' '.join(sys.version.split())}`",
        f"- espnet2 version: `espnet2 {_version('espnet')}`",
        f"- pytorch version: `pytorch {_version('torch')}`",
        f"- espnet_llm_plugin version: `{__version__}`",
        f"- processor: `{_processor()}, {os.cpu_count()} cores`",
        f"- Git hash: `{_git('rev-parse', 'HEAD')}`",
        f"  - Commit date: `{_git('log', '-1', '--format=%cd')}`",
    ]
    if _git("status", "--porcelain", "--untracked-files=no") not in ("", UNKNOWN):
        lines.append("  - with changes that are not committed")
    if command:
        lines.append(f"- command: `{command.strip()}`")
    return "\n".join(lines) + "\n"


def _espnet_blocks(results: Results) -> list[str]:
    """Per experiment directory and error rate one table, a line per decoding directory."""
    directories: dict[Path, DataSet] = {}
    for system in results.systems:
        for data in [*([system.dev] if system.dev else []), *system.tests.values()]:
            for directory in data.directories.values():
                directories[directory] = (
                    data if len(data.directories) == 1 else load_data_set(directory)
                )
    # exp/asr_x/decode_y/test: one section for exp/asr_x, one line for decode_y/test.
    experiments = dict.fromkeys(directory.parent.parent for directory in directories)
    header = ["dataset", "Snt", "Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err"]
    text = []
    for experiment in experiments:
        text.append(f"## {experiment}\n")
        decodings = dict.fromkeys(d.parent for d in directories if d.parent.parent == experiment)
        pages = [f"`{path}`" for path in (d / DIAGNOSIS for d in decodings) if path.is_file()]
        if pages:
            text.append(f"Failure signatures and their numbers: {', '.join(pages)}\n")
        for unit in (WER, CER, TER):
            rows = [
                [
                    directory.relative_to(experiment).as_posix(),
                    *percentage_cells(data.rates[unit].summary),
                ]
                for directory, data in directories.items()
                if directory.parent.parent == experiment and unit in data.rates
            ]
            if rows:
                text.append(f"### {unit.upper()}\n\n{markdown(header, rows)}")
    return text


def duration(seconds: float) -> str:
    """Seconds for the reader: ``42 s``, ``3.5 min``, ``12.0 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _rate(data: DataSet) -> str:
    return f"{data.rates[WER].summary.rate:.2f}"


def _test_cells(data: Optional[DataSet], missing: str) -> list[str]:
    if data is None:
        return [missing] + [UNKNOWN] * 3
    rate = data.rates[WER]
    _, sub, dele, ins, _, _ = rate.summary.percentages()
    kinds = f"{ins:.2f} / {dele:.2f} / {sub:.2f}"
    interval = f"{rate.low:.2f}-{rate.high:.2f}"
    return [_rate(data), _number(rate.deviation, "{:.2f}"), interval, kinds]


def _number(value: Optional[float], form: str) -> str:
    return UNKNOWN if value is None else form.format(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return UNKNOWN
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN
