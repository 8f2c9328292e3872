"""The small files that a table of results is made of: numbers by name, in JSON or YAML."""

import glob
import json
import math
from pathlib import Path
from typing import Any, Union

import yaml

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.training_log import last_statistics


def read_gap(path: str) -> float:
    statistics_of = last_statistics(path)
    if "shuffled_gap" not in statistics_of:
        raise UserError(f"{path}: no epoch with shuffled_gap; is it the log of a speech LLM?")
    return statistics_of["shuffled_gap"]


def read_perplexity(path: str) -> float:
    """Word perplexity, alone or of the internal LM that ``evaluate_nll`` reports."""
    table = read_table(path)
    table = table.get("internal_lm") or table
    if "word_perplexity" not in table:
        raise UserError(f"{path}: no word_perplexity in it")
    return number(f"{path}: word_perplexity", table["word_perplexity"])


def read_rtf(pattern: str, key: str) -> float:
    """Real-time factor of all decoding jobs whose file matches the pattern."""
    files = sorted(glob.glob(str(pattern)))
    if not files:
        raise UserError(f"{pattern}: no such file")
    factors = [read_number(file, key) for file in files]
    if len(files) == 1:
        return factors[0]
    audio = [read_number(file, "audio_seconds") for file in files]
    return sum(factor * seconds for factor, seconds in zip(factors, audio)) / sum(audio)


def read_per_utterance(pattern: str, key: str) -> float:
    """A count of all decoding jobs whose file matches, an utterance; 0 where it was not counted."""
    tables = [read_table(file) for file in sorted(glob.glob(str(pattern)))]
    utterances = sum(table.get("utterances", 0) for table in tables)
    return sum(table.get(key, 0) for table in tables) / utterances if utterances else 0.0


def read_number(path: Union[str, Path], key: str) -> float:
    table = read_table(path)
    if key not in table:
        raise UserError(f"{path}: no {key} in it; it has {', '.join(table) or 'nothing'}")
    return number(f"{path}: {key}", table[key])


def number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; expected a number")
    return float(value)


def read_optional(path: Union[str, Path], key: str) -> float:
    """A number that older files lack: then 0."""
    return read_number(path, key) if key in read_table(path) else 0.0


def read_table(path: Union[str, Path]) -> dict:
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


def check_keys(where: str, table: dict, known: set[str], required: set[str]) -> None:
    unknown = sorted(set(map(str, table)) - known)
    if unknown:
        raise UserError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    missing = sorted(key for key in required if table.get(key) is None)
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} is missing")
