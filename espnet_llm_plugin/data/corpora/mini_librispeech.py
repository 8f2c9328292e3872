"""A synthetic corpus in LibriSpeech's layout: sentences of ``synthetic.text``, clean and noisy."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.corpora.mini import Spoken, build
from espnet_llm_plugin.data.synthetic import text
from espnet_llm_plugin.data.synthetic.speech import Speaker, speakers

READERS = {"train": 8, "dev": 2, "test": 2}  # of each part
UTTERANCES_PER_CHAPTER = 10
OTHER_SNR = 15.0  # dB, of the parts called "other"
LM_TEXT = "librispeech-lm-norm.txt.gz"


@dataclass(frozen=True)
class Sizes:
    """Utterances of each training part, of each dev part and of each test part; LM sentences."""

    train: int = 200
    dev: int = 15
    test: int = 30
    lm: int = 4000


PARTS = ("train-clean-100", "train-clean-360", "train-other-500")
PARTS += ("dev-clean", "dev-other", "test-clean", "test-other")


def make_mini_librispeech(
    root: Union[str, Path], sizes: Sizes, *, seed: int = 0, nj: int = 1
) -> bool:
    """Write ``root/LibriSpeech`` and ``root/librispeech-lm-norm.txt.gz``, if they are not there.

    Returns:
        Whether anything was made.
    """
    seen: set = set()
    files: list[Spoken] = []
    chapters: dict[str, list[str]] = {}  # trans.txt -> lines
    readers: list[tuple[str, str, Speaker]] = []
    for part in PARTS:
        kind, quality = part.split("-")[:2]
        sentences = text.generate(f"{seed} {part}", getattr(sizes, kind), seen)
        names = {}
        # Each part has its own readers, as in the true corpus; the voices are those of its kind.
        for voice in speakers(kind)[:: 3 if kind == "train" else 2][: READERS[kind]]:
            names[voice] = str(100 + len(readers))
            readers.append((names[voice], part, voice))
        for index, sentence in enumerate(sentences):
            voice = list(names)[index % len(names)]
            number = index // len(names)
            chapter = str(1000 + 100 * PARTS.index(part) + number // UTTERANCES_PER_CHAPTER)
            name = f"{names[voice]}-{chapter}"
            utterance = f"{name}-{number % UTTERANCES_PER_CHAPTER:04d}"
            directory = f"LibriSpeech/{part}/{names[voice]}/{chapter}"
            snr = OTHER_SNR if quality == "other" else None
            files.append(Spoken(f"{directory}/{utterance}.flac", sentence.text, voice, snr))
            lines = chapters.setdefault(f"{directory}/{name}.trans.txt", [])
            lines.append(f"{utterance} {sentence.text.upper()}\n")
    lm = text.generate(f"{seed} lm", sizes.lm, seen)

    def write_tables(directory: Path, durations: dict[str, float]) -> None:
        for path, lines in chapters.items():
            (directory / path).write_text("".join(lines), encoding="utf-8")
        rows = [";ID  |SEX| SUBSET           |MINUTES| NAME\n"]
        for reader, part, voice in readers:
            place = f"LibriSpeech/{part}/{reader}/"
            minutes = sum(v for path, v in durations.items() if path.startswith(place)) / 60
            sex = voice.variant[0].upper()
            rows.append(f"{reader:4s} | {sex} | {part:16s} | {minutes:5.2f} | {voice.name}\n")
        (directory / "LibriSpeech/SPEAKERS.TXT").write_text("".join(rows), encoding="utf-8")
        with gzip.GzipFile(directory / LM_TEXT, "wb", mtime=0) as stream:
            stream.write("".join(f"{s.text.upper()}\n" for s in lm).encode())

    return build(root, files, write_tables, nj)
