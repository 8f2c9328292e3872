"""Tables by language of the systems that ``results_table`` compares."""

import statistics
from typing import Iterable, Mapping, Optional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.language_id import NAME as LANGUAGE_ID
from espnet_llm_plugin.scoring.languages import MACRO, MICRO, score_languages
from espnet_llm_plugin.scoring.result_files import number, read_table
from espnet_llm_plugin.scoring.results import DataSet, Results
from espnet_llm_plugin.scoring.scripts import LETTERS, WORDS, score_scripts
from espnet_llm_plugin.scoring.units import CER, WER

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def language_tables(results: Results, group: Optional[str]) -> list[Table]:
    """Of each test set with a table ``utt2lang``: WER and CER, letters and words of other scripts.

    Systems of one group are rows, languages columns; the last column is the mean over languages.
    Over several seeds rates are means. What is known of no system is left out; languages that are
    left out are named in the title.
    """
    tables = []
    for test, utt2lang in results.utt2lang.items():
        found: dict[str, dict[str, dict[str, float]]] = {}  # by kind, system, language
        warnings: dict[str, dict[str, None]] = {}  # by kind
        for system in results.groups()[group]:
            if test in system.tests:
                for kind, (rates, lines) in _rates(system.tests[test], utt2lang).items():
                    found.setdefault(kind, {})[system.name] = rates
                    warnings.setdefault(kind, {}).update(dict.fromkeys(lines))
        for kind, systems in found.items():
            languages = sorted({lang for rates in systems.values() for lang in rates})
            if not languages:
                continue
            rows = [[name, *_cells(rates, languages)] for name, rates in systems.items()]
            title = "; ".join([f"{test}: {kind}", *warnings[kind]])
            tables.append((title, ["system", *languages, MACRO], rows))
    return tables


def _cells(rates: dict[str, float], languages: list[str]) -> list[str]:
    cells = [f"{rates[lang]:.2f}" if lang in rates else "-" for lang in languages]
    return [*cells, f"{statistics.fmean(rates.values()):.2f}"]


def _rates(data: DataSet, utt2lang: str) -> dict[str, tuple[dict[str, float], list[str]]]:
    """Rates by kind and language, means over the directories (of the seeds); and warnings."""
    runs: dict[str, list[dict[str, float]]] = {}
    warnings: dict[str, list[str]] = {}
    for directory in data.directories.values():
        for unit in (WER, CER):
            scores = score_languages(directory, utt2lang, unit=unit, resamples=1)
            kind = f"{unit.upper()} in %"
            warnings[kind] = scores.warnings()
            rates = {lang: score.rate for lang, score in scores.languages.items()}
            runs.setdefault(kind, []).append(rates)
        scripts = score_scripts(directory, utt2lang)
        for kind, rate in ((LETTERS, "foreign_rate"), (WORDS, "switch_rate")):
            warnings[kind] = scripts.warnings()
            rates = {lang: getattr(score, rate) for lang, score in scripts.languages.items()}
            runs.setdefault(kind, []).append(rates)
    return {kind: (_means(every), warnings[kind]) for kind, every in runs.items()}


def identification_tables(results: Results, group: Optional[str]) -> list[Table]:
    """Of each test set: utterances whose language was predicted right, by language, in per cent.

    Systems of which ``bin.score_language_id`` left no file are left out. Over several seeds rates
    are means of those that have one.
    """
    tables = []
    for test in results.tests():
        systems = {s.name: s.tests[test] for s in results.groups()[group] if test in s.tests}
        read = {name: _identification(data) for name, data in systems.items()}
        found = {name: rates for name, rates in read.items() if rates}
        languages = sorted({code for rates in found.values() for code in rates} - {MACRO, MICRO})
        columns = [*languages, MACRO, MICRO]
        rows = [
            [name, *(f"{rates[code]:.2f}" if code in rates else "-" for code in columns)]
            for name, rates in found.items()
        ]
        if rows:
            title = f"{test}: language identification, correct utterances in %"
            tables.append((title, ["system", *columns], rows))
    return tables


def _identification(data: DataSet) -> dict[str, float]:
    """Accuracies by language, their mean, and that of all utterances; empty if there are none."""
    runs = []
    for directory in data.directories.values():
        path = directory / LANGUAGE_ID
        if path.is_file():
            table = read_table(path)
            try:
                rates = {**table["languages"], MACRO: table["macro"], MICRO: table["accuracy"]}
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: not written by espnet_llm_plugin.bin.score_language_id ({error})"
                ) from error
            runs.append({name: number(f"{path}: {name}", rate) for name, rate in rates.items()})
    return _means(runs)


def _means(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each name the mean over the runs that have it."""
    values: dict[str, list[float]] = {}
    for rates in runs:
        for name, rate in rates.items():
            values.setdefault(name, []).append(rate)
    return {name: statistics.fmean(every) for name, every in values.items()}
