"""Tiny data directories."""

import numpy as np
import pytest
import soundfile


def tone(seconds: float = 0.2, rate: int = 8000, frequency: float = 440.0) -> np.ndarray:
    """A sine of amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


class Builder:
    """Write the tables and audio of a data directory, right or wrong."""

    def __init__(self, path):
        self.path = path
        path.mkdir(parents=True)

    def table(self, name: str, content) -> None:
        if isinstance(content, str):
            content = content.encode()
        (self.path / name).write_bytes(content)

    def append(self, name: str, line: str) -> None:
        with (self.path / name).open("a") as stream:
            stream.write(line + "\n")

    def replace(self, name: str, old: str, new: str) -> None:
        content = (self.path / name).read_text()
        assert old in content
        (self.path / name).write_text(content.replace(old, new))

    def audio(self, name: str, samples=None, rate: int = 8000, **kwargs):
        file = self.path / "audio" / name
        file.parent.mkdir(exist_ok=True)
        soundfile.write(file, tone(rate=rate) if samples is None else samples, rate, **kwargs)
        return file


@pytest.fixture
def empty_dir(tmp_path):
    """A directory called ``src`` to build something in."""
    return Builder(tmp_path / "src")


@pytest.fixture
def data_dir(empty_dir):
    """Five utterances u0 ... u4 of two speakers, 8 kHz wav, 0.2 s and longer, relative paths."""
    for i in range(5):
        empty_dir.audio(f"u{i}.wav", tone(0.2 + 0.1 * i, frequency=300 + 100 * i))
    empty_dir.table("wav.scp", "".join(f"u{i} audio/u{i}.wav\n" for i in range(5)))
    empty_dir.table("text", "".join(f"u{i} word{i} and more\n" for i in range(5)))
    empty_dir.table("utt2spk", "".join(f"u{i} s{i % 2}\n" for i in range(5)))
    return empty_dir


def table(path) -> dict:
    """A table that is known to be right."""
    return dict(
        (line.split(maxsplit=1) + [""])[:2] for line in path.read_text().splitlines() if line
    )
