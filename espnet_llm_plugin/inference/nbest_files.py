"""N-best lists that ``bin/asr_inference`` wrote, read again to be scored by a model."""

import json
from pathlib import Path
from typing import Container, NamedTuple, Sequence

from espnet_llm_plugin.errors import UserError


class StoredHypothesis(NamedTuple):
    """A label sequence, and log P(labels | speech) where the scales do not change it."""

    labels: tuple[int, ...]
    acoustic: float


def read_nbest(
    paths: Sequence[str], utterances: Container[str]
) -> dict[str, list[StoredHypothesis]]:
    """Lists by utterance.

    Args:
        paths: ``nbest.jsonl`` files.
        utterances: The others are passed over.

    Raises:
        UserError: A missing or malformed file, or none of the utterances in any.
    """
    found: dict[str, list[StoredHypothesis]] = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"--nbest_files {path}: there is no such file")
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    entry = json.loads(line)
                    utt, tokens = entry["utt"], entry["token_int"].split()
                    labels = tuple(int(token) - 1 for token in tokens)
                    stored = StoredHypothesis(labels, float(entry["acoustic"]))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"{path}:{number} is not a line of asr_inference's nbest.jsonl ({error!r})"
                    ) from error
                if utt in utterances:
                    found.setdefault(utt, []).append(stored)
    if paths and not found:
        raise UserError(f"{', '.join(map(str, paths))}: none of the utterances to tune on is there")
    return found
