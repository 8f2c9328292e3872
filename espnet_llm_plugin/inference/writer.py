"""Decoding results on disk: ESPnet's directories, an n-best file, and the real-time factor.

While decoding, every finished utterance is a line of ``.partial.jsonl``. A run that was killed
goes on from there if nothing about it has changed; the result files appear at the end, whole.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Mapping, Sequence, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.inference.languages import LANG, PREDICTED
from espnet_llm_plugin.inference.recognizer import Recognition

PARTIAL = ".partial.jsonl"
PIECES = "streaming.jsonl"
FILES = ("token", "token_int", "score", "text")
LANGUAGES = (LANG, PREDICTED)  # files of models that know languages


class ResultWriter:
    """Collects results of one run.

    Args:
        directory: ``--output_dir``. Results of an earlier run in it are removed.
        identity: What the results depend on (options, models), comparable as JSON.
    """

    def __init__(self, directory: Union[str, Path], identity: Mapping[str, Any]):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_results()
        self._identity = json.loads(json.dumps(identity))
        self.records: dict[str, dict] = {}
        self._partial = self.directory / PARTIAL
        self._resume()
        # Rewritten without a line that was cut off.
        with atomic_write(self._partial) as stream:
            for line in (self._identity, *self.records.values()):
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream = self._partial.open("a", encoding="utf-8")

    def add(
        self,
        utt: str,
        nbest: Sequence[Recognition],
        *,
        audio_seconds: float = 0.0,
        encoder_seconds: float = 0.0,
        search_seconds: float = 0.0,
        cpu_seconds: float = 0.0,
        lm_calls: float = 0.0,
        lm_tokens: float = 0.0,
        failure: str = "",
        pieces: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Keep the result of an utterance; with ``failure`` its hypothesis is empty.

        ``pieces`` are what a streaming recogniser said after each piece of it.
        """
        record = {
            "utt": utt,
            "audio_seconds": audio_seconds,
            "encoder_seconds": encoder_seconds,
            "search_seconds": search_seconds,
            "cpu_seconds": cpu_seconds,
            "lm_calls": lm_calls,
            "lm_tokens": lm_tokens,
            "failure": failure,
            "pieces": list(pieces),
            "nbest": [_entry(recognition) for recognition in nbest] or [_EMPTY],
        }
        self.records[utt] = record
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._stream.flush()

    def finish(self, keys: Sequence[str]) -> dict[str, Any]:
        """Write all result files, in the order of ``keys``; returns what ``rtf.json`` says."""
        self._stream.close()
        records = [self.records[key] for key in keys]
        longest = max(len(record["nbest"]) for record in records)
        languages = [name for name in LANGUAGES if any(name in r["nbest"][0] for r in records)]
        for n in range(longest):
            having = [(r["utt"], r["nbest"][n]) for r in records if n < len(r["nbest"])]
            for name in FILES:
                with atomic_write(self.directory / f"{n + 1}best_recog" / name) as stream:
                    stream.writelines(
                        f"{utt} {entry[name]}\n" for utt, entry in having if entry[name] is not None
                    )
        for name in languages:
            with atomic_write(self.directory / "1best_recog" / name) as stream:
                stream.writelines(f"{r['utt']} {r['nbest'][0].get(name, '')}\n" for r in records)
        with atomic_write(self.directory / "nbest.jsonl") as stream:
            for record in records:
                for rank, entry in enumerate(record["nbest"], 1):
                    entry = {name: value for name, value in entry.items() if name != "score"}
                    line = {"utt": record["utt"], "rank": rank, **entry}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        if any(record["pieces"] for record in records):
            with atomic_write(self.directory / PIECES) as stream:
                for record in records:
                    for piece in record["pieces"]:
                        line = {"utt": record["utt"], **piece}
                        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        summary = self._summary(records)
        with atomic_write(self.directory / "rtf.json") as stream:
            stream.write(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        self._partial.unlink()
        return summary

    def close(self) -> None:
        """Stop without results; the partial file stays for the next run."""
        self._stream.close()

    def _summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        seconds = {
            name: sum(record[name] for record in records)
            for name in ("audio_seconds", "encoder_seconds", "search_seconds", "cpu_seconds")
        }
        used = seconds["encoder_seconds"] + seconds["search_seconds"]
        audio = seconds["audio_seconds"]
        return {
            **{name: round(value, 3) for name, value in seconds.items()},
            "rtf": used / audio if audio else None,
            "cpu_rtf": seconds["cpu_seconds"] / audio if audio else None,
            "lm_calls": round(sum(record.get("lm_calls", 0) for record in records)),
            "lm_tokens": round(sum(record.get("lm_tokens", 0) for record in records)),
            "utterances": len(records),
            "failed": {r["utt"]: r["failure"] for r in records if r["failure"]},
        }

    def _resume(self) -> None:
        if not self._partial.is_file():
            return
        lines = self._partial.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            parsed = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            return
        if parsed and parsed[0] == self._identity:
            self.records = {record["utt"]: record for record in parsed[1:]}

    def _remove_results(self) -> None:
        for path in self.directory.iterdir():
            if re.fullmatch(r"\d+best_recog", path.name):
                shutil.rmtree(path)
            elif path.name in ("nbest.jsonl", "rtf.json", PIECES):
                path.unlink()


def _entry(recognition: Recognition) -> dict[str, Any]:
    hypothesis = recognition.hypothesis
    return {
        "text": recognition.text,
        "token": " ".join(recognition.tokens),
        "token_int": " ".join(map(str, recognition.token_ids)),
        "score": str(hypothesis.total),
        **recognition.languages,
        **hypothesis.parts(),
    }


_EMPTY = {
    "text": "",
    "token": "",
    "token_int": "",
    "score": "0.0",
    "total": 0.0,
    "acoustic": 0.0,
    "lm": 0.0,
    "external_lm": 0.0,
    "bonus": 0.0,
    "prior": 0.0,
    "blank": None,
    "frames": [],
}
