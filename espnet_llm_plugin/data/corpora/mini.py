"""Small synthetic corpora in the directory layouts of true ones: what all of them share.

espeak-ng speaks the sentences; each corpus module plans files and writes its own tables. The
preparation of the true corpus then reads all of it without knowing.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np
import soundfile

from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.synthetic.jobs import in_fresh_processes
from espnet_llm_plugin.data.synthetic.noise import coloured_noise
from espnet_llm_plugin.data.synthetic.speech import (
    SAMPLE_RATE,
    Speaker,
    Synthesizer,
    espeak_library,
)
from espnet_llm_plugin.errors import UserError

VERSION = 1  # to be raised when the same plan gives other files
BATCH = 40  # utterances spoken by one process, in a fixed order
REPORT = "synthetic.json"
RATE = 160  # words a minute
MARGIN = SAMPLE_RATE // 20  # samples of silence before and after


class Spoken(NamedTuple):
    """An audio file to be made; ``snr`` (dB) adds pink noise, the suffix chooses the format."""

    path: str  # relative to the corpus
    text: str
    speaker: Speaker
    snr: Optional[float] = None


def build(
    root: Union[str, Path],
    files: Sequence[Spoken],
    write_tables: Callable[[Path, dict[str, float]], None],
    nj: int,
) -> bool:
    """Make the corpus ``root``, unless the same one is there.

    Args:
        root: Directory of the corpus. It appears when it is complete; another synthetic corpus in
            its place is replaced.
        files: All audio files.
        write_tables: Called with the directory to fill and the duration of every file in seconds
            (by ``Spoken.path``); writes transcripts and tables there.
        nj: Number of processes.

    Returns:
        Whether anything was made.

    Raises:
        UserError: ``root`` is there and is no synthetic corpus; espeakng-loader is missing; a file
            cannot be written.
    """
    root = Path(root)
    key = hashlib.sha256(repr((VERSION, list(files))).encode()).hexdigest()[:16]
    if root.exists():
        if not (root / REPORT).is_file():
            raise UserError(f"{root} exists and is not a synthetic corpus: give another directory")
        if json.loads((root / REPORT).read_text(encoding="utf-8")).get("key") == key:
            return False
    espeak_library()
    part = root.with_name(f".{root.name}.partial")
    with writing(root):
        shutil.rmtree(part, ignore_errors=True)
        calls = [
            (files[start : start + BATCH], part, start) for start in range(0, len(files), BATCH)
        ]
        durations: dict[str, float] = {}
        for done in in_fresh_processes(_speak, calls, nj, _speak.__module__):
            durations.update(done)
        write_tables(part, durations)
        report = {"key": key, "files": len(files), "hours": sum(durations.values()) / 3600}
        (part / REPORT).write_text(json.dumps(report) + "\n", encoding="utf-8")
        shutil.rmtree(root, ignore_errors=True)
        part.rename(root)
    return True


def _speak(files: Sequence[Spoken], root: Path, first: int) -> dict[str, float]:
    """Write audio; the durations in seconds."""
    synthesizer = Synthesizer()
    durations = {}
    for number, spoken in enumerate(files, first):
        wave = np.pad(synthesizer.speak(spoken.text, spoken.speaker, RATE), MARGIN)
        if spoken.snr is not None:
            noise = coloured_noise(len(wave), -3.0, np.random.default_rng(number))
            wave += noise * np.sqrt(np.mean(wave**2)) * 10 ** (-spoken.snr / 20)
        wave *= 0.5 / np.abs(wave).max()
        path = root / spoken.path
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = io.BytesIO()  # soundfile's own writing does not notice a full disk
        # No compression: half the time, and these files are few.
        kind = {
            ".opus": {"format": "OGG", "subtype": "OPUS", "compression_level": 0.0},
            ".flac": {"format": "FLAC", "subtype": "PCM_16", "compression_level": 0.0},
            ".wav": {"format": "WAV", "subtype": "PCM_16"},
        }[path.suffix]
        soundfile.write(contents, wave, SAMPLE_RATE, **kind)
        path.write_bytes(contents.getbuffer())
        durations[spoken.path] = len(wave) / SAMPLE_RATE
    return durations
