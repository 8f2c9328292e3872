"""Scores of a language model on disk: a killed run goes on, another grid costs no forward."""

import json
from pathlib import Path
from typing import Any, Hashable, Iterable, Mapping, Union

from espnet_llm_plugin.data.atomic import atomic_write


class ScoreStore:
    """Scores by key, appended to a file as they come.

    Args:
        path: The file; what it has is kept if ``identity`` is the same.
        identity: What the scores depend on (model, options), comparable as JSON.
    """

    def __init__(self, path: Union[str, Path], identity: Mapping[str, Any]):
        self._path = Path(path)
        self._scores: dict[Hashable, float] = {}
        identity = json.loads(json.dumps(identity))
        lines = []
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]  # none that is cut off
        parsed = [json.loads(line) for line in lines]
        if parsed and parsed[0] == identity:
            self._scores = {_key(key): score for key, score in parsed[1:]}
        with atomic_write(self._path) as stream:
            for line in (identity, *self._scores.items()):
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def missing(self, keys: Iterable[Hashable]) -> list:
        """The distinct ones of ``keys`` without a score, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._scores]

    def add(self, scores: Iterable[tuple[Hashable, float]]) -> None:
        """Keep scores."""
        with open(self._path, "a", encoding="utf-8") as stream:
            for key, score in scores:
                self._scores[key] = score
                stream.write(json.dumps([key, score], ensure_ascii=False) + "\n")

    def __getitem__(self, key: Hashable) -> float:
        return self._scores[key]


def _key(key: Any) -> Hashable:
    return tuple(key) if isinstance(key, list) else key
