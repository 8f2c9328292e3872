"""Corpora of a few tones, in the directory layouts of the true ones."""

import pytest
import soundfile

from tests.data.conftest import tone


def write_audio(path, seconds=0.2):
    """A tone as 16 kHz flac or opus, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, tone(seconds, 16000), 16000, **kind)


@pytest.fixture
def librispeech(tmp_path):
    """Three parts with one or two chapters of two utterances; returns the directory above."""
    root = tmp_path / "corpora" / "LibriSpeech"
    chapters = [("train-clean-100", "19", "198"), ("train-clean-100", "26", "495")]
    chapters += [("dev-clean", "84", "121"), ("dev-other", "116", "288")]
    for part, reader, chapter in chapters:
        directory = root / part / reader / chapter
        name = f"{reader}-{chapter}"
        for i in range(2):
            write_audio(directory / f"{name}-{i:04d}.flac", 0.2 + 0.1 * i)
        lines = f"{name}-0000 NORTHANGER  ABBEY\n{name}-0001 IT'S {name.replace('-', ' ')}\n"
        (directory / f"{name}.trans.txt").write_text(lines)
    (root / "SPEAKERS.TXT").write_text(
        ";ID  |SEX| SUBSET           |MINUTES| NAME\n"
        "19   | F | train-clean-100  | 25.19 | Kara | with a bar\n"
        "26   | M | train-clean-100  | 25.08 | Denny\n"
        "84   | F | dev-clean        | 8.02  | Christie\n"
    )
    return tmp_path / "corpora"


MLS_TEXTS = {
    "german_opus": ["das weiße pferd", "die grüne tür", "der fluss"],
    "polish": ["białego konia", "zielone drzwi"],
}


@pytest.fixture
def mls(tmp_path):
    """German as opus and Polish as flac, the same reader 10 in both."""
    root = tmp_path / "mls"
    for name, texts in MLS_TEXTS.items():
        top = root / f"mls_{name}"
        suffix = "opus" if name.endswith("opus") else "flac"
        for book, split in enumerate(("train", "dev", "test")):
            transcripts, segments = "", ""
            for i, text in enumerate(texts):
                key = f"{10 + i % 2}_{book}_{i:06d}"
                write_audio(
                    top / split / "audio" / str(10 + i % 2) / str(book) / f"{key}.{suffix}",
                    0.3 + 0.1 * i,
                )
                transcripts += f"{key}\t{split} {text}\n"
                segments += f"{key}\thttp://x/{book}\t5.00\t{5.3 + 0.1 * i:.2f}\n"
            (top / split / "transcripts.txt").write_text(transcripts)
            (top / split / "segments.txt").write_text(segments)
        rows = ("SPEAKER | GENDER | PARTITION", "10 | F | train", "11 | M | train")
        (top / "metainfo.txt").write_text("".join(f"{row}\n" for row in rows))
    return root
