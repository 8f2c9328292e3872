"""A synthetic corpus in Loquacious's layout: Parquet files, configuration ``small``, and a card.

Sentences of ``synthetic.text``, one half with noise; some utterances have neither speaker nor sex,
as in the true corpus.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import yaml

from espnet_llm_plugin.data.corpora.mini import Spoken, build
from espnet_llm_plugin.data.parquet import require_pyarrow
from espnet_llm_plugin.data.synthetic import text
from espnet_llm_plugin.data.synthetic.speech import speakers

CONFIG = "small"
SPEAKERS = {"train": 24, "dev": 4, "test": 4}
SNR = 15.0  # dB, of every other utterance
NAMELESS = 7  # every so many utterances have no speaker
ROWS_PER_FILE = 250
LM_TEXT = "lm-text.txt.gz"


@dataclass(frozen=True)
class Sizes:
    """Utterances of each split; sentences of the LM text."""

    train: int = 600
    dev: int = 30
    test: int = 60
    lm: int = 4000


def make_mini_loquacious(
    root: Union[str, Path], sizes: Sizes, *, seed: int = 0, nj: int = 1
) -> bool:
    """Write ``root/{README.md,small/*.parquet,lm-text.txt.gz}``, if they are not there.

    Returns:
        Whether anything was made.
    """
    require_pyarrow()
    seen: set = set()
    files: list[Spoken] = []
    rows: dict[str, list[dict]] = {}
    for split, count in SPEAKERS.items():
        sentences = text.generate(f"{seed} loquacious {split}", getattr(sizes, split), seen)
        voices = speakers(split)
        voices = voices[:: max(1, len(voices) // count)][:count]
        for index, sentence in enumerate(sentences):
            voice = voices[index % len(voices)]
            key = f"mini_{split}_{index:05d}"
            files.append(
                Spoken(f"audio/{key}.flac", sentence.text, voice, SNR if index % 2 else None)
            )
            known = index % NAMELESS != NAMELESS - 1
            rows.setdefault(split, []).append(
                {
                    "ID": key,
                    "spk_id": voice.name if known else None,
                    "sex": {"m": "male", "f": "female"}[voice.variant[0]] if known else None,
                    "text": sentence.text.upper(),
                }
            )
    lm = text.generate(f"{seed} loquacious lm", sizes.lm, seen)

    def write_tables(directory: Path, durations: dict[str, float]) -> None:
        for split, entries in rows.items():
            _write_split(directory, split, entries, durations)
        (directory / "audio").rmdir()
        parts = [{"split": name, "path": f"{CONFIG}/{name}-*"} for name in rows]
        card = yaml.safe_dump({"configs": [{"config_name": CONFIG, "data_files": parts}]})
        (directory / "README.md").write_text(f"---\n{card}---\nSynthetic.\n", encoding="utf-8")
        with gzip.GzipFile(directory / LM_TEXT, "wb", mtime=0) as stream:
            stream.write("".join(f"{s.text.upper()}\n" for s in lm).encode())

    return build(root, files, write_tables, nj)


def _write_split(
    directory: Path, split: str, entries: list[dict], durations: dict[str, float]
) -> None:
    import pyarrow
    import pyarrow.parquet

    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    texts = [(name, pyarrow.string()) for name in ("spk_id", "sex", "text")]
    schema = pyarrow.schema(
        [("ID", pyarrow.string()), ("duration", pyarrow.float32()), ("wav", audio), *texts]
    )
    count = -(-len(entries) // ROWS_PER_FILE)
    (directory / CONFIG).mkdir(exist_ok=True)
    for number in range(count):
        rows = entries[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE]
        for row in rows:
            name = f"audio/{row['ID']}.flac"
            row["duration"] = durations[name]
            row["wav"] = {"bytes": (directory / name).read_bytes(), "path": f"{row['ID']}.flac"}
            (directory / name).unlink()
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows, schema),
            directory / CONFIG / f"{split}-{number:05d}-of-{count:05d}.parquet",
        )
