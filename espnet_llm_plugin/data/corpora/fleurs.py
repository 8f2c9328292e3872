"""FLEURS (Conneau et al., SLT 2022; https://huggingface.co/datasets/google/fleurs).

Two layouts, with the same seven columns in each ``{train,dev,test}.tsv``, separated by tabs (number
of the sentence, file, raw transcript, transcript, its characters, samples, gender) and no header:

* as ``lhotse download fleurs`` leaves it: ``<language>/<split>/*.wav`` and
  ``metadata/<language>/<split>.tsv``;
* as the archives of the repository unpack: ``<language>/audio/<split>/*.wav`` and
  ``<language>/<split>.tsv`` (below ``data``, or directly in the given directory).

There are no speaker ids: every recording counts as a speaker, as in lhotse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Union

from espnet_llm_plugin.data.corpora.manifests import (
    check_pairs,
    reading_audio,
    require_lhotse,
    to_data_dir,
)
from espnet_llm_plugin.data.indic_text import LANGUAGES, check_language
from espnet_llm_plugin.data.kaldi import DataDir, read_lines
from espnet_llm_plugin.data.problems import EXAMPLES, Problems
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]

NAMES = {lang: f"{lang}_pk" if lang == "ur" else f"{lang}_in" for lang in LANGUAGES}
SPLITS = ("train", "dev", "test")
TEXT_FIELDS = ("transcription", "raw_transcription")
SAMPLE_RATE = 16000
URL = "https://huggingface.co/datasets/google/fleurs"
COLUMNS = 7
TOLERANCE = 0.1  # seconds by which audio and table may differ


class Row(NamedTuple):
    """A line of a table, without the file's name."""

    sentence: str
    raw_transcription: str
    transcription: str
    samples: int
    gender: str  # MALE or FEMALE


@dataclass(frozen=True)
class Language:
    """Where the parts of one language are."""

    lang: str
    audio: Path  # has the directories train, dev, test
    tables: Path  # has train.tsv, dev.tsv, test.tsv


def check_languages(langs: Sequence[str]) -> None:
    """Raise a :class:`UserError` unless ``langs`` are different ones of the ten."""
    for lang in langs:
        check_language(lang)
    if not langs or len(set(langs)) < len(langs):
        raise UserError(
            f"the languages are '{' '.join(langs)}'; expected different ones of "
            + ", ".join(LANGUAGES)
        )


def find_languages(corpus: PathLike, langs: Sequence[str]) -> list[Language]:
    """The directories of each language, in either layout.

    Raises:
        UserError: An unknown code, a missing directory, or an incomplete one.
    """
    corpus = Path(corpus)
    check_languages(langs)
    if not corpus.is_dir():
        raise UserError(
            f"{corpus} is not a directory; expected one with hi_in, bn_in, ..., as "
            f"`lhotse download fleurs -l hi_in DIR` or {URL} give them"
        )
    found = []
    for lang in langs:
        name = NAMES[lang]
        candidates = [Language(lang, corpus / name, corpus / "metadata" / name)]
        for top in (corpus / "data" / name, corpus / name):
            candidates.append(Language(lang, top / "audio", top))
        there = [c for c in candidates if (c.tables / "train.tsv").is_file()]
        if not there:
            expected = " or ".join(str(c.tables / "train.tsv") for c in candidates)
            raise UserError(
                f"{corpus} has no FLEURS of '{lang}' ({name}): there is no {expected}. Download it "
                f"(`lhotse download fleurs -l {name} DIR`, or {URL}), or choose other --langs"
            )
        found.append(there[0])
        for split in SPLITS:
            for needed in (there[0].tables / f"{split}.tsv", there[0].audio / split):
                if not needed.exists():
                    raise UserError(
                        f"FLEURS of '{lang}' lacks {needed}: download it again, or unpack "
                        f"audio/{split}.tar.gz"
                    )
    return found


@dataclass(frozen=True)
class Mismatch:
    """An utterance whose audio is not as long as its table says (samples at 16 kHz)."""

    utterance: str
    audio: int
    table: int

    def __str__(self) -> str:
        return f"{self.utterance} ({self.audio} samples, not {self.table})"


def read_fleurs(
    language: Language, split: str, *, text_field: str = "transcription", nj: int = 1
) -> tuple[DataDir, list[Mismatch]]:
    """One split of one language; ids as lhotse's with the language before (``hi_903_1_<file>``).

    Args:
        language: From :func:`find_languages`.
        split: One of :data:`SPLITS`.
        text_field: ``transcription`` (FLEURS's own lower-case text without punctuation, which
            published error rates are of) or ``raw_transcription``.
        nj: Processes that read the headers of the audio.

    Returns:
        The data with ``utt2lang`` and ``spk2gender``, and utterances whose length contradicts the
        table.

    Raises:
        UserError: Rows that are not as above, audio without transcript and the reverse, damaged
            audio, or lhotse is not installed.
    """
    require_lhotse()
    from lhotse import RecordingSet, SupervisionSegment

    if text_field not in TEXT_FIELDS:
        raise UserError(f"text field '{text_field}'; expected one of {', '.join(TEXT_FIELDS)}")
    source = language.audio / split
    problems = Problems(str(source))
    rows = _read_rows(language.tables / f"{split}.tsv", problems)
    with reading_audio(source):
        recordings = list(RecordingSet.from_dir(source, "*.wav", num_jobs=nj))
    lengths = {r.id: r.num_samples for r in recordings}
    texts = {name: getattr(row, text_field) for name, row in rows.items()}
    check_pairs(source, texts, set(lengths), problems, allow_empty=True)
    readings: dict[str, int] = {}
    supervisions, mismatches = [], []
    for name, row in rows.items():
        readings[row.sentence] = readings.get(row.sentence, 0) + 1
        speaker = f"{row.sentence}_{readings[row.sentence]}"
        supervisions.append(
            SupervisionSegment(
                id=f"{speaker}_{name}",
                recording_id=name,
                start=0.0,
                duration=lengths[name] / SAMPLE_RATE,
                text=texts[name],
                language=language.lang,
                speaker=speaker,
                gender=row.gender[:1] if row.gender in ("MALE", "FEMALE") else None,
            )
        )
        if abs(lengths[name] - row.samples) > TOLERANCE * SAMPLE_RATE:
            utterance = f"{language.lang}_{speaker}_{name}"
            mismatches.append(Mismatch(utterance, lengths[name], row.samples))
    data = to_data_dir(source, recordings, supervisions, prefix=f"{language.lang}_")
    extra = {
        "spk2gender": data.extra.get("spk2gender", {}),
        "utt2lang": dict.fromkeys(data.utt2spk, language.lang),
    }
    return replace(data, extra=extra), mismatches


def _read_rows(path: Path, problems: Problems) -> dict[str, Row]:
    """Rows by the name of the audio file without its suffix."""
    rows: dict[str, Row] = {}
    for number, line in read_lines(path, problems):
        fields = line.split("\t")
        where = f"{path.name}:{number}"
        name = Path(fields[1]).stem if len(fields) > 1 else ""
        if len(fields) != COLUMNS:
            problems.add(f"not {COLUMNS} columns separated by tabs", name, where)
        elif not fields[5].isdecimal():
            problems.add("a number of samples that is no number", name, f"{where}: {fields[5]}")
        elif name in rows:
            problems.add("duplicate file", name, where)
        else:
            rows[name] = Row(fields[0], fields[2], fields[3], int(fields[5]), fields[6])
    return rows


def describe_mismatches(mismatches: Sequence[Mismatch]) -> str:
    """One line about utterances whose length contradicts their table."""
    names = ", ".join(str(mismatch) for mismatch in mismatches[:EXAMPLES])
    return f"{len(mismatches)} utterance(s) are not as long as their table says: {names}"
