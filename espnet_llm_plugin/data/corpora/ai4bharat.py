"""Local copies of larger Indic sets of AI4Bharat, as more training data beside FLEURS.

What the publishers' pages say of the layouts, and nothing else, is read:

* **Kathbath** (https://github.com/AI4Bharat/IndicSUPERB):
  ``<language>/train/transcription_n2w.txt`` with lines ``<file> <tab> <transcript>`` and
  ``<language>/train/audio/<id>-<speaker>-<f|m>.m4a``. Audio must be converted to wav or flac first
  (the publishers' ``utilities/structure.py``).
* **IndicVoices** (https://github.com/AI4Bharat/IndicVoices):
  ``<Language>/<version>/train/<id>.json`` beside ``<id>.wav``; ``verbatim`` and ``normalized`` are
  parallel lists of ``{start, end, text, speaker_id}`` (seconds), ``speaker_id`` and ``gender``
  those of the recording.
* **Shrutilipi** (https://ai4bharat.iitm.ac.in/shrutilipi): ``<language>/<bulletin>/sent_<n>.wav``;
  ``train.tsv`` (header, then ``<path> <tab> <frames>``) and ``train.wrd`` (a transcript a line) of
  fairseq. Where their archive puts these two is not said: they are expected in ``<language>``.

None of these could be tried on the true sets here; the tests follow the descriptions.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from espnet_llm_plugin.data.kaldi import DataDir, Segment, read_lines
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError

NAMES = {
    "hi": "hindi",
    "bn": "bengali",
    "ta": "tamil",
    "te": "telugu",
    "ml": "malayalam",
    "kn": "kannada",
    "gu": "gujarati",
    "mr": "marathi",
    "pa": "punjabi",
    "ur": "urdu",
}
AUDIO = (".wav", ".flac")
_ADVICE = "Mend these files, or leave the set out."


class Utterance(NamedTuple):
    """What is known of an utterance; ``span`` in seconds, ``None`` for the whole recording."""

    key: str
    recording: str
    path: Path
    text: str
    speaker: str
    gender: str = ""
    span: Optional[tuple[float, float]] = None


def read_set(name: str, root: Path, lang: str) -> DataDir:
    """The training data of one language of the set ``name``, with ``segments`` and ``utt2lang``.

    Args:
        name: One of :data:`SETS`.
        root: Where the set was unpacked.
        lang: Code of :data:`NAMES`.

    Raises:
        UserError: The language is not there, the layout is another, audio lacks a transcript or the
            reverse; all faults are named together.
    """
    directory = _language_directory(name, Path(root), lang)
    problems = Problems(str(directory))
    wav, segments, text, utt2spk, genders = {}, {}, {}, {}, {}
    for utterance in SETS[name](directory, problems):
        key, recording, speaker = (
            f"{lang}_{name}_{part}"
            for part in (utterance.key, utterance.recording, utterance.speaker)
        )
        if key in text:
            problems.add("duplicate id", key)
        wav[recording] = str(utterance.path.absolute())
        start, end = utterance.span or (0.0, -1)
        segments[key] = Segment(recording, start, end)
        text[key] = " ".join(utterance.text.split())
        utt2spk[key] = speaker
        if utterance.gender:
            genders[speaker] = utterance.gender
    problems.check(_ADVICE)
    if not text:
        raise UserError(f"{directory} has no utterance; {_expected(name)}")
    extra = {"spk2gender": genders, "utt2lang": dict.fromkeys(text, lang)}
    return DataDir(directory, wav, utt2spk, text, segments, extra)


def _language_directory(name: str, root: Path, lang: str) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; {_expected(name)}")
    wanted = (NAMES[lang], NAMES[lang].capitalize())
    for directory in (root / part for part in wanted):
        if directory.is_dir():
            return directory
    there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
    raise UserError(
        f"{root} has no directory {' or '.join(wanted)} ({name} of '{lang}'); its directories: "
        f"{there}. Leave the language out of --langs, or the set"
    )


def _expected(name: str) -> str:
    layout = {
        "kathbath": "<language>/train/transcription_n2w.txt and <language>/train/audio/*.wav",
        "indicvoices": "<Language>/<version>/train/*.json with *.wav beside them",
        "shrutilipi": "<language>/train.tsv, <language>/train.wrd and the audio of train.tsv",
    }[name]
    return (
        f"expected {layout} of {name}, as its publishers describe it (the true set could not be "
        "tried: if it differs, tell us)"
    )


def _find_audio(path: Path) -> Optional[Path]:
    """The file itself or the same one in a format that can be read."""
    return next((p for s in AUDIO if (p := path.with_suffix(s)).is_file()), None)


def _kathbath(directory: Path, problems: Problems) -> Iterator[Utterance]:
    table = directory / "train" / "transcription_n2w.txt"
    if not table.is_file():
        raise UserError(f"there is no {table}; {_expected('kathbath')}")
    files = {path.stem: path for path in (directory / "train" / "audio").rglob("*.*")}
    for number, line in read_lines(table, problems):
        fields = line.split("\t", 1)
        name = Path(fields[0]).stem
        match = re.fullmatch(r"(\d+)-(\d+)-([fm])", name)
        audio = _find_audio(files[name]) if name in files else None
        if not match:
            problems.add("not <id>-<speaker>-<f|m>", fields[0], f"{table.name}:{number}")
        elif name not in files:
            problems.add("transcript without audio", name)
        elif audio is None:
            problems.add(
                f"audio that is neither {' nor '.join(AUDIO)}: convert it first (ffmpeg -i in.m4a "
                "-ar 16000 -ac 1 out.wav)",
                name,
            )
        else:
            text = fields[1] if len(fields) > 1 else ""
            yield Utterance(name, name, audio, text, match[2], match[3])


def _indicvoices(directory: Path, problems: Problems) -> Iterator[Utterance]:
    for path in sorted(directory.glob("*/train/**/*.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            speaker = str(table["speaker_id"])
            gender = str(table.get("gender", ""))[:1].lower()
            # Times of one list, text of the other, and not the interviewer (speaker 1): so does the
            # publishers' create_indicvoices.py.
            parts = [
                (float(heard["start"]), float(heard["end"]), str(written["text"]))
                for heard, written in zip(table["verbatim"], table["normalized"])
                if heard["speaker_id"] != 1
            ]
        except (ValueError, KeyError, TypeError) as error:
            problems.add("not as described", path.name, f"{type(error).__name__} {error}")
            continue
        audio = _find_audio(path)
        if audio is None:
            problems.add("transcript without audio", path.stem)
            continue
        for number, (start, end, text) in enumerate(parts, 1):
            start = max(start, 0.0)
            if end <= start:
                problems.add("segment without a positive duration", f"{path.stem}_{number}")
                continue
            # Tags such as [noise] and [inhaling] are no words.
            text = re.sub(r"\[[^\]]*\]|<[^>]*>", " ", text)
            key = f"{path.stem}_{number:03d}"
            sex = gender if gender in ("f", "m") else ""
            yield Utterance(key, path.stem, audio, text, speaker, sex, (start, end))


def _shrutilipi(directory: Path, problems: Problems) -> Iterator[Utterance]:
    tsv, wrd = directory / "train.tsv", directory / "train.wrd"
    for needed in (tsv, wrd):
        if not needed.is_file():
            raise UserError(f"there is no {needed}; {_expected('shrutilipi')}")
    paths = [line.split("\t")[0] for _, line in read_lines(tsv, problems)]
    texts = [line for _, line in read_lines(wrd, problems)]
    top, paths = Path(paths[0] if paths else ""), paths[1:]
    if len(paths) != len(texts):
        raise UserError(
            f"{tsv} has {len(paths)} files below its header, but {wrd} has {len(texts)} lines"
        )
    for path, text in zip(paths, texts):
        audio = next((p for base in (directory, top) if (p := base / path).is_file()), None)
        key = "_".join(Path(path).with_suffix("").parts[-2:])  # <bulletin>_sent_<n>
        if audio is None:
            problems.add("transcript without audio", path)
        else:
            yield Utterance(key, key, audio, text, Path(path).parent.name or key)


SETS: dict[str, Callable[[Path, Problems], Iterator[Utterance]]] = {
    "kathbath": _kathbath,
    "indicvoices": _indicvoices,
    "shrutilipi": _shrutilipi,
}
