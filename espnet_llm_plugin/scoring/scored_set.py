"""A decoding directory as ``bin/score`` left it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import nbest
from espnet_llm_plugin.scoring.alignment import Counts
from espnet_llm_plugin.scoring.evaluate import SCORES
from espnet_llm_plugin.scoring.hallucination import Hallucination
from espnet_llm_plugin.scoring.trn import read_keyed
from espnet_llm_plugin.scoring.wer import Summary


@dataclass(frozen=True)
class ScoredSet:
    """A scored decoding directory, and its n-best lists if they were kept."""

    directory: Path
    total: Summary
    by_length: dict[str, Summary]
    length_ratio: float
    nbest: Optional[nbest.NBestStatistics]
    hallucination: Optional[Hallucination] = None  # None: scored before there was any


def read_scored(directory: str) -> ScoredSet:
    """Read ``scores.json`` and ``nbest.jsonl`` (of the directory, or of its decoding jobs).

    Raises:
        UserError: The directory is not scored, or its lists are malformed.
    """
    path = Path(directory) / SCORES
    if not path.is_file():
        raise UserError(f"{path}: no such file; score {directory} first (bin/score)")
    scores = read_json(str(path))
    try:
        kinds = scores["diagnostics"]
        total = _summary(scores["wer"])
        by_length = {name: _summary(table) for name, table in kinds["by_length"].items()}
        ratio, ref = kinds["length_ratio"], scores["ref"]
        case_sensitive = scores["case_sensitive"]
        signs = kinds.get("hallucination")
        signs = None if signs is None else Hallucination.from_dict(signs)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by espnet_llm_plugin.bin.score ({error})") from error
    files = [Path(directory) / "nbest.jsonl"]
    if not files[0].is_file():
        files = sorted(Path(directory).glob("logdir/output.*/nbest.jsonl"))
    lists = None
    if files:
        lists = nbest.statistics(
            read_keyed(ref), nbest.read_lists(files), case_sensitive=case_sensitive
        )
    return ScoredSet(Path(directory), total, by_length, ratio, lists, signs)


def _summary(table: Mapping[str, Any]) -> Summary:
    counts = Counts(*(table[name] for name in Counts._fields))
    return Summary(table["sentences"], table["sentence_errors"], counts)


def read_json(path: Optional[str]) -> dict[str, Any]:
    """Content of a JSON file, nothing for no file; raises UserError if it is no table."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has no table of values")
    return content
