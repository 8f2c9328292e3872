"""Tables by language of the systems that ``results_table`` compares."""

from typing import Optional

from espnet_llm_plugin.scoring.languages import MACRO, score_languages
from espnet_llm_plugin.scoring.results import DataSet, Results
from espnet_llm_plugin.scoring.scripts import LETTERS, WORDS, score_scripts
from espnet_llm_plugin.scoring.units import CER, WER

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def language_tables(results: Results, group: Optional[str]) -> list[Table]:
    """Of each test set with a table ``utt2lang``: WER and CER, letters and words of other scripts.

    Systems of one group are rows, languages columns; the last column is the mean over languages.
    Over several seeds rates are means. What is known of no system is left out.
    """
    tables = []
    for test, utt2lang in results.utt2lang.items():
        found: dict[str, dict[str, dict[str, float]]] = {}  # by kind, system, language
        for system in results.groups()[group]:
            if test in system.tests:
                for kind, rates in _rates(system.tests[test], utt2lang).items():
                    found.setdefault(kind, {})[system.name] = rates
        for kind, systems in found.items():
            languages = sorted({lang for rates in systems.values() for lang in rates})
            rows = [[name, *_cells(rates, languages)] for name, rates in systems.items()]
            tables.append((f"{test}: {kind}", ["system", *languages, MACRO], rows))
    return tables


def _cells(rates: dict[str, float], languages: list[str]) -> list[str]:
    cells = [f"{rates[lang]:.2f}" if lang in rates else "-" for lang in languages]
    return [*cells, f"{sum(rates.values()) / len(rates):.2f}"]


def _rates(data: DataSet, utt2lang: str) -> dict[str, dict[str, float]]:
    """Rates by kind and language, means over the directories (of the seeds)."""
    runs: dict[str, list[dict[str, float]]] = {}
    for directory in data.directories.values():
        for unit in (WER, CER):
            scores = score_languages(directory, utt2lang, unit=unit, resamples=1)
            rates = {lang: score.rate for lang, score in scores.languages.items()}
            runs.setdefault(f"{unit.upper()} in %", []).append(rates)
        scripts = score_scripts(directory, utt2lang)
        if scripts is not None:
            runs.setdefault(LETTERS, []).append({k: s.foreign_rate for k, s in scripts.items()})
            runs.setdefault(WORDS, []).append({k: s.switch_rate for k, s in scripts.items()})
    return {
        kind: {lang: sum(rates[lang] for rates in every) / len(every) for lang in every[0]}
        for kind, every in runs.items()
    }
