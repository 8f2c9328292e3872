"""Losses and statistics by epoch from the log of an ESPnet training."""

import re
from pathlib import Path
from typing import NamedTuple, Union

from espnet_llm_plugin.errors import UserError

# "12epoch results: [train] iter_time=..., loss=17.6, ..., [valid] ..., loss=15.1, ..."
_EPOCH = re.compile(r"\b(\d+)epoch results: \[train\] (.*?), \[valid\] (.*)")
_LOSS = re.compile(r"(?:^|, )loss=([^,\s]+)")
_STATISTIC = re.compile(r"(?:^|, )(\w+)=([^,\s]+)")


class Epoch(NamedTuple):
    """Mean losses of an epoch."""

    number: int
    train: float
    valid: float


def read_epochs(path: Union[str, Path]) -> list[Epoch]:
    """Epochs in order; of an epoch that was run again (a resumed training) the last.

    Raises:
        UserError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--train_log {path}: no such file")
    found: dict[int, Epoch] = {}
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            match = _EPOCH.search(line)
            losses = [_LOSS.search(part) for part in match.groups()[1:]] if match else [None]
            if all(losses):
                train, valid = (float(loss.group(1)) for loss in losses)
                found[int(match.group(1))] = Epoch(int(match.group(1)), train, valid)
    return [found[number] for number in sorted(found)]


def last_statistics(path: Union[str, Path]) -> dict[str, float]:
    """Statistics of the validation set after the last epoch of a log, by name; {} without one.

    Raises:
        UserError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such training log")
    found: dict[str, float] = {}
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            match = _EPOCH.search(line)
            if match:
                # what follows the validation set has a bracket of its own
                valid = match.group(3).split("[", 1)[0]
                found = {
                    name: float(value)
                    for name, value in _STATISTIC.findall(valid)
                    if name != "time"
                }
    return found
