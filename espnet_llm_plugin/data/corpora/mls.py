"""Multilingual LibriSpeech (Pratap et al., Interspeech 2020; https://www.openslr.org/94).

Layout, in flac or opus: ``mls_<language>[_opus]/metainfo.txt`` (readers and their gender) and
``mls_<language>[_opus]/{train,dev,test}/`` with ``transcripts.txt`` (``<id> TAB <text>``),
``segments.txt`` (``<id> TAB <source> TAB <start> TAB <end>``, seconds) and
``audio/<reader>/<book>/<reader>_<book>_<number>.{flac,opus}``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.corpora.manifests import (
    check_pairs,
    reading_audio,
    require_lhotse,
    to_data_dir,
)
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import DataDir, read_lines, write_data_dir
from espnet_llm_plugin.data.perturb import combine
from espnet_llm_plugin.data.problems import EXAMPLES, Problems
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]

LANGUAGES = {
    "en": "english",
    "de": "german",
    "nl": "dutch",
    "fr": "french",
    "es": "spanish",
    "it": "italian",
    "pt": "portuguese",
    "pl": "polish",
}
SPLITS = ("train", "dev", "test")
SAMPLE_RATE = 16000
URL = "https://www.openslr.org/94"
# Audio and segments.txt may differ by the padding of the codec, not by more (seconds).
TOLERANCE = 0.5


@dataclass(frozen=True)
class Mismatch:
    """An utterance whose audio is not as long as segments.txt says (seconds)."""

    utterance: str
    audio: float
    segment: float

    def __str__(self) -> str:
        return f"{self.utterance} ({self.audio:.2f} s, not {self.segment:.2f} s)"


def find_languages(corpus: PathLike, langs: Sequence[str]) -> dict[str, Path]:
    """The directory of each language; the flac one where both formats are there.

    Args:
        corpus: Directory that holds ``mls_german``, ``mls_french_opus``, ...
        langs: Codes from :data:`LANGUAGES`.

    Raises:
        UserError: An unknown code, a missing directory, or an incomplete one.
    """
    corpus = Path(corpus)
    unknown = [lang for lang in langs if lang not in LANGUAGES]
    if unknown or not langs or len(set(langs)) < len(langs):
        raise UserError(
            f"the languages are '{' '.join(langs)}'; expected different ones of "
            + ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
        )
    if not corpus.is_dir():
        raise UserError(
            f"{corpus} is not a directory; expected one with mls_german, mls_french_opus, ..., "
            f"unpacked from {URL}"
        )
    found = {}
    for lang in langs:
        names = [f"mls_{LANGUAGES[lang]}", f"mls_{LANGUAGES[lang]}_opus"]
        candidates = [corpus / name for name in names if (corpus / name).is_dir()]
        if not candidates:
            there = (
                ", ".join(sorted(path.name for path in corpus.glob("mls_*"))) or "nothing of MLS"
            )
            raise UserError(
                f"{corpus} has neither {' nor '.join(names)}; it has {there or 'nothing of MLS'}. "
                f"Unpack one of these archives from {URL} there, or choose other --langs"
            )
        found[lang] = candidates[0]
        for needed in ("metainfo.txt", *(f"{split}/transcripts.txt" for split in SPLITS)):
            if not (found[lang] / needed).is_file():
                raise UserError(f"{found[lang]} lacks {needed}: unpack its archive again")
    return found


def prepare_mls(
    corpus: PathLike, output_dir: PathLike, langs: Sequence[str], *, nj: int = 1
) -> tuple[dict[str, DataDir], list[Mismatch]]:
    """Write ``output_dir/{train,dev,test}`` with the utterances of all ``langs``.

    Utterances and speakers are called as in the corpus, with the language before
    (``de_1234_5678_000012`` of ``de_1234``); ``utt2lang`` has the codes.

    Args:
        corpus: See :func:`find_languages`.
        output_dir: Usually ``data``; wav.scp refers to the corpus's audio files.
        langs: Codes from :data:`LANGUAGES`.
        nj: Processes that read the headers of the audio.

    Returns:
        What was written, by split, and the utterances whose length contradicts segments.txt.

    Raises:
        UserError: See :func:`find_languages`; audio without transcript and the reverse, lines that
            are not as above, or lhotse is not installed.
    """
    require_lhotse()
    directories = find_languages(corpus, langs)
    result, mismatches = {}, []
    for split in SPLITS:
        parts = []
        for lang, directory in directories.items():
            data, odd = _prepare_split(directory, split, lang, nj)
            parts.append(data)
            mismatches += odd
        result[split] = combine(parts)
    for split, data in result.items():
        with writing(output_dir):
            write_data_dir(data, Path(output_dir) / split)
    return result, mismatches


def _prepare_split(
    directory: Path, split: str, lang: str, nj: int
) -> tuple[DataDir, list[Mismatch]]:
    # As lhotse.recipes.mls.prepare_mls, which looks for every recording in a list: an hour for
    # German, weeks for English.
    from lhotse import RecordingSet, SupervisionSegment

    source = directory / split
    problems = Problems(str(source))
    transcripts = _read_columns(source / "transcripts.txt", 2, problems)
    segments = {}
    if (source / "segments.txt").is_file():
        for key, (_, start, end) in _read_columns(source / "segments.txt", 4, problems).items():
            try:
                segments[key] = float(end) - float(start)
            except ValueError:
                problems.add("times that are not numbers", key, f"{source}/segments.txt")
    genders = _read_genders(directory / "metainfo.txt")
    suffix = "flac" if next((source / "audio").rglob("*.flac"), None) else "opus"
    with reading_audio(source):
        recordings = list(
            RecordingSet.from_dir(
                source / "audio",
                f"*.{suffix}",
                num_jobs=nj,
                force_opus_sampling_rate=SAMPLE_RATE if suffix == "opus" else None,
            )
        )
    durations = {recording.id: recording.duration for recording in recordings}
    texts = {key: text for key, (text,) in transcripts.items()}
    check_pairs(source, texts, set(durations), problems)
    supervisions = [
        SupervisionSegment(
            id=key,
            recording_id=key,
            start=0.0,
            duration=durations[key],
            text=text,
            language=LANGUAGES[lang],
            speaker=key.split("_")[0],
            gender=genders.get(key.split("_")[0]),
        )
        for key, text in texts.items()
    ]
    data = to_data_dir(source, recordings, supervisions, prefix=f"{lang}_")
    utt2lang = dict.fromkeys(data.utt2spk, lang)
    spk2gender = data.extra.get("spk2gender", {})
    mismatches = [
        Mismatch(f"{lang}_{key}", durations[key], seconds)
        for key, seconds in segments.items()
        if key in durations and abs(durations[key] - seconds) > TOLERANCE
    ]
    return replace(data, extra={"spk2gender": spk2gender, "utt2lang": utt2lang}), mismatches


def _read_columns(path: Path, columns: int, problems: Problems) -> dict[str, list[str]]:
    """``{first column: other columns}`` of lines whose columns are separated by tabs."""
    table: dict[str, list[str]] = {}
    for number, line in read_lines(path, problems):
        key, *values = line.split("\t")
        # `read_lines` takes the tab before an empty last column away.
        if columns == 2 and not values and len(key.split()) == 1:
            values = [""]
        if not key or len(values) != columns - 1:
            problems.add(
                f"not {columns} columns separated by tabs", key or "", f"{path.name}:{number}"
            )
        elif key in table:
            problems.add("duplicate id", key, f"{path.name}:{number}")
        else:
            table[key] = values
    return table


def _read_genders(path: Path) -> dict[str, str]:
    """``{reader: F or M}`` of metainfo.txt (``reader | gender | partition | ...``)."""
    genders = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) >= 2 and fields[1] in ("F", "M"):
            genders[fields[0]] = fields[1]
    return genders


def describe_mismatches(mismatches: Sequence[Mismatch]) -> str:
    """One line about utterances whose length contradicts segments.txt."""
    names = ", ".join(str(mismatch) for mismatch in mismatches[:EXAMPLES])
    return f"{len(mismatches)} utterance(s) are not as long as segments.txt says: {names}"
