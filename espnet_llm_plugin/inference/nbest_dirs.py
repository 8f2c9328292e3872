"""N-best lists in ESPnet's decoding directories, read and written.

``{1..N}best_recog/{text,token,token_int,score}``, in the directory itself (as merged by our
recipes) or in ``logdir/output.*`` of its jobs (ESPnet's recipes); ``nbest.jsonl`` beside them where
``bin/asr_inference`` wrote it.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]
FILES = ("text", "token", "token_int", "score")
# ESPnet writes numbers, or tensors as Python shows them.
_NUMBER = re.compile(r"^(?:tensor\()?\s*([-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|inf))\b", re.IGNORECASE)


@dataclass(frozen=True)
class NBestEntry:
    """A hypothesis as a decoder wrote it.

    Attributes:
        text: Its words.
        score: Of the search, natural logarithm.
        token_ids: None where the directory has none.
        tokens: The same, by name.
        parts: More scores, from ``nbest.jsonl``.
    """

    text: str
    score: float
    token_ids: Optional[tuple[int, ...]] = None
    tokens: Optional[tuple[str, ...]] = None
    parts: Mapping[str, Any] = field(default_factory=dict, compare=False)


def read_nbest_dir(directory: PathLike) -> dict[str, list[NBestEntry]]:
    """Lists by utterance, best first.

    Raises:
        UserError: No such directory, no n-best in it, a missing or malformed file, or an utterance
            that two jobs decoded.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"n-best directory {directory} does not exist")
    parts = [directory]
    if not (directory / "1best_recog").is_dir():
        parts = sorted(directory.glob("logdir/output.*"), key=_job)
    lists: dict[str, list[NBestEntry]] = {}
    for part in parts:
        found = _read_part(part)
        repeated = found.keys() & lists.keys()
        if repeated:
            raise UserError(f"{min(repeated)} was decoded by two jobs of {directory}")
        lists.update(found)
    if not lists:
        raise UserError(
            f"{directory} has no n-best lists: expected 1best_recog, 2best_recog, ... in it or in "
            "its logdir/output.*, as decoding with --nbest N writes them"
        )
    return lists


def _job(path: Path) -> tuple[int, str]:
    number = path.name.rpartition(".")[2]
    return (int(number) if number.isdigit() else 0, path.name)


def _read_part(directory: Path) -> dict[str, list[NBestEntry]]:
    lists: dict[str, list[NBestEntry]] = {}
    parts = _read_parts(directory / "nbest.jsonl")
    rank = 1
    while (directory / f"{rank}best_recog").is_dir():
        folder = directory / f"{rank}best_recog"
        tables: dict[str, Optional[dict[str, str]]] = {}
        for name in FILES:
            file = folder / name
            tables[name] = read_clean_table(file, may_be_empty=True) if file.is_file() else None
        for name in ("text", "score"):
            if tables[name] is None:
                raise UserError(f"{folder} has no {name}: it is not ESPnet's n-best output")
        for utt, score in tables["score"].items():
            if len(lists.setdefault(utt, [])) != rank - 1:
                raise UserError(f"{folder}: {utt} is there, but not in {rank - 1}best_recog")
            ids, tokens = (t and t.get(utt, "") for t in (tables["token_int"], tables["token"]))
            lists[utt].append(
                NBestEntry(
                    tables["text"].get(utt, ""),
                    _number(score, folder / "score", utt),
                    None if ids is None else tuple(map(int, ids.split())),
                    None if tokens is None else tuple(tokens.split()),
                    parts.get((utt, rank), {}),
                )
            )
        rank += 1
    return lists


def _number(value: str, file: Path, utt: str) -> float:
    found = _NUMBER.match(value)
    if not found:
        raise UserError(f"{file}: the score of {utt} is {value!r}, not a number")
    return float(found.group(1))


def _read_parts(file: Path) -> dict[tuple[str, int], Mapping[str, Any]]:
    if not file.is_file():
        return {}
    found = {}
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                entry = json.loads(line)
                found[entry["utt"], int(entry["rank"])] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}:{number} is not a line of nbest.jsonl ({error!r})"
                ) from None
    return found


def check_tokens_of_lists(
    lists: Mapping[str, Sequence[NBestEntry]], tokens: Sequence[str], directory: PathLike, name: str
) -> None:
    """Check that the token ids of n-best lists mean the tokens of a list.

    Args:
        lists: From :func:`read_nbest_dir`.
        tokens: V tokens.
        directory: Where the lists are, for the message.
        name: Whose tokens these are, for the message.

    Raises:
        UserError: They are of another token list, or there are no ids.
    """
    known: set[tuple[int, str]] = set()
    for entries in lists.values():
        for entry in entries:
            if entry.token_ids is None or entry.tokens is None:
                raise UserError(
                    f"{directory} has no token_int and token files, which {name} needs; rescore "
                    "with an LLM in its own tokens instead"
                )
            # a token that is white space itself is lost in a line of the file
            if len(entry.token_ids) == len(entry.tokens):
                known.update(zip(entry.token_ids, entry.tokens))
            elif entry.token_ids and max(entry.token_ids) >= len(tokens):
                known.add((max(entry.token_ids), "?"))
    for number, token in sorted(known):
        expected = tokens[number] if number < len(tokens) else f"none of the {len(tokens)}"
        if token != expected:
            raise UserError(
                f"the n-best lists of {directory} are over another token list than {name}: token "
                f"{number} is {token!r} in the lists, {expected!r} there. Use an LM over the "
                "recogniser's token list, or an LLM in its own tokens"
            )


def write_nbest_dir(directory: PathLike, lists: Mapping[str, Sequence[NBestEntry]]) -> None:
    """Write lists as a decoding directory that the scoring stage takes as it is.

    Each of its files is whole or absent; what an earlier run left is replaced.
    """
    directory = Path(directory)
    longest = max(map(len, lists.values()))
    for rank in range(1, longest + 1):
        having = [
            (utt, entries[rank - 1]) for utt, entries in lists.items() if rank <= len(entries)
        ]
        folders = [directory / f"{rank}best_recog"] + [directory] * (rank == 1)
        for folder in folders:
            for name in FILES:
                lines = [(utt, _field(entry, name)) for utt, entry in having]
                if any(value is None for _, value in lines):
                    continue
                with atomic_write(folder / name) as stream:
                    stream.writelines(f"{utt} {value}\n" for utt, value in lines)
    for folder in directory.glob("*best_recog"):
        rank = folder.name.removesuffix("best_recog")
        if rank.isdigit() and int(rank) > longest:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    with atomic_write(directory / "nbest.jsonl") as stream:
        for utt, entries in lists.items():
            for rank, entry in enumerate(entries, 1):
                line = {
                    "utt": utt,
                    "rank": rank,
                    "text": entry.text,
                    "token": " ".join(entry.tokens or ()),
                    "token_int": " ".join(map(str, entry.token_ids or ())),
                    "total": entry.score,
                    **entry.parts,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _field(entry: NBestEntry, name: str) -> Optional[str]:
    if name == "text":
        return entry.text
    if name == "score":
        return str(entry.score)
    if name == "token":
        return None if entry.tokens is None else " ".join(entry.tokens)
    return None if entry.token_ids is None else " ".join(map(str, entry.token_ids))
