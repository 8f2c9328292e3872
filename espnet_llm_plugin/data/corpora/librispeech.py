"""LibriSpeech (Panayotov et al., ICASSP 2015; https://www.openslr.org/12) and its LM text.

Layout: ``LibriSpeech/<part>/<reader>/<chapter>/<reader>-<chapter>-<number>.flac`` with one
``<reader>-<chapter>.trans.txt`` a chapter, and ``LibriSpeech/SPEAKERS.TXT``.
"""

import gzip
import hashlib
import urllib.error
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.corpora.manifests import (
    check_pairs,
    reading_audio,
    require_lhotse,
    to_data_dir,
)
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import DataDir, read_lines, write_data_dir
from espnet_llm_plugin.data.perturb import combine
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]

# SHA-256 of the archives, as torchaudio has them: lhotse's downloader verifies nothing.
ARCHIVES = {
    "dev-clean": "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
    "dev-other": "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
    "test-clean": "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
    "test-other": "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
    "train-clean-100": "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
    "train-clean-360": "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
    "train-other-500": "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
}
AUDIO_URL = "https://www.openslr.org/resources"
LM_TEXT_URL = "https://www.openslr.org/resources/11/librispeech-lm-norm.txt.gz"

# Data directories (ESPnet's names) and the parts that each consists of.
SETS = {
    "train_clean_100": ("train-clean-100",),
    "train_460": ("train-clean-100", "train-clean-360"),
    "train_960": ("train-clean-100", "train-clean-360", "train-other-500"),
    "dev": ("dev-clean", "dev-other"),
    "dev_clean": ("dev-clean",),
    "dev_other": ("dev-other",),
    "test_clean": ("test-clean",),
    "test_other": ("test-other",),
}


def parts_of(sets: Sequence[str]) -> list[str]:
    """The corpus's parts that data directories consist of, each once.

    Raises:
        UserError: A name that is not in :data:`SETS`.
    """
    for name in sets:
        if name not in SETS:
            raise UserError(f"LibriSpeech has no set '{name}'; expected some of {', '.join(SETS)}")
    return list(dict.fromkeys(part for name in sets for part in SETS[name]))


def find_parts(corpus: PathLike, parts: Sequence[str]) -> Path:
    """The directory that has ``parts``: ``corpus`` or ``corpus/LibriSpeech``.

    Raises:
        UserError: No such directory, or a part is missing.
    """
    corpus = Path(corpus)
    if not corpus.is_dir():
        raise UserError(
            f"{corpus} is not a directory; expected one with LibriSpeech's parts "
            f"({', '.join(parts)}) or with a directory LibriSpeech"
        )
    root = corpus / "LibriSpeech" if (corpus / "LibriSpeech").is_dir() else corpus
    missing = [part for part in parts if not (root / part).is_dir()]
    if missing:
        found = ", ".join(part for part in ARCHIVES if (root / part).is_dir()) or "no part at all"
        raise UserError(
            f"{root} lacks {', '.join(missing)}; it has {found}. Unpack "
            f"{' and '.join(f'{part}.tar.gz' for part in missing)} from {AUDIO_URL}/12 there, or "
            "choose other sets"
        )
    return root


def prepare_librispeech(
    corpus: PathLike,
    output_dir: PathLike,
    sets: Sequence[str],
    *,
    lower_case: bool = True,
    nj: int = 1,
) -> dict[str, DataDir]:
    """Write Kaldi data directories ``output_dir/<set>``.

    Args:
        corpus: Directory with LibriSpeech's parts, or with a directory ``LibriSpeech``.
        output_dir: Usually ``data``; wav.scp refers to the corpus's flac files.
        sets: Names from :data:`SETS`.
        lower_case: Turn the transcripts, which are in capitals, into small letters: pretrained
            LLMs know those better.
        nj: Threads that read the headers of the audio.

    Returns:
        What was written, by set: wav.scp, text, utt2spk and, with SPEAKERS.TXT, spk2gender.

    Raises:
        UserError: A missing directory or part, audio without transcript, transcripts without
            audio, or lhotse is not installed.
    """
    require_lhotse()
    parts = parts_of(sets)
    root = find_parts(corpus, parts)
    genders = _read_genders(root / "SPEAKERS.TXT")
    prepared = {part: _prepare_part(root, part, genders, lower_case, nj) for part in parts}
    result = {}
    for name in sets:
        data = combine([prepared[part] for part in SETS[name]])
        extra = {table: rows for table, rows in data.extra.items() if rows}
        result[name] = replace(data, extra=extra)
        with writing(output_dir):
            write_data_dir(result[name], Path(output_dir) / name)
    return result


def _prepare_part(
    root: Path, part: str, genders: dict[str, str], lower_case: bool, nj: int
) -> DataDir:
    from lhotse.recipes.librispeech import prepare_librispeech as prepare_manifests

    # lhotse passes over audio without transcript and the reverse.
    problems = Problems(str(root / part))
    transcripts: dict[str, str] = {}
    for file in sorted((root / part).rglob("*.trans.txt")):
        for number, line in read_lines(file, problems):
            utterance, _, text = line.partition(" ")
            if utterance:
                transcripts[utterance] = text
            else:
                problems.add("empty line", "", f"{file}:{number}")
    check_pairs(root / part, transcripts, {p.stem for p in (root / part).rglob("*.flac")}, problems)
    case = "lower" if lower_case else "none"
    with reading_audio(root / part):
        prepared = prepare_manifests(root, dataset_parts=part, normalize_text=case, num_jobs=nj)
    manifests = prepared[part]
    data = to_data_dir(root / part, manifests["recordings"], manifests["supervisions"])
    speakers = set(data.utt2spk.values())
    known = {speaker: genders[speaker] for speaker in speakers if speaker in genders}
    # The table is there even if it is empty: `combine` needs the same tables in all parts.
    return replace(data, extra={"spk2gender": known})


def _read_genders(path: Path) -> dict[str, str]:
    """``{reader: f or m}`` of SPEAKERS.TXT (``id | sex | subset | minutes | name``)."""
    if not path.is_file():
        return {}
    genders = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = [field.strip() for field in line.split("|")]
        if not line.startswith(";") and len(fields) >= 3 and fields[1] in ("F", "M"):
            genders[fields[0]] = fields[1].lower()
    return genders


# ---- text for language models -------------------------------------------------------------------


def prepare_lm_text(source: PathLike, output: PathLike, *, lower_case: bool = True) -> int:
    """Write LibriSpeech's LM text (one sentence a line, gzipped or not) with ids.

    Args:
        source: ``librispeech-lm-norm.txt.gz`` or an unpacked file.
        output: File of ``<id> <sentence>`` lines; empty lines are left out.
        lower_case: As in :func:`prepare_librispeech`: transcripts and LM text must agree.

    Returns:
        Number of sentences.
    """
    source = Path(source)
    if not source.is_file():
        raise UserError(f"the LM text {source} does not exist; it can be had from {LM_TEXT_URL}")
    count = 0
    with writing(output), atomic_write(output) as stream:
        for line in _lines(source):
            sentence = " ".join((line.lower() if lower_case else line).split())
            if sentence:
                count += 1
                stream.write(f"librispeech_lm-{count:09d} {sentence}\n")
        if not count:
            raise UserError(f"the LM text {source} has no sentence")
    return count


def _lines(source: Path) -> Iterator[str]:
    with source.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    opener = gzip.open if packed else open
    try:
        with opener(source, "rt", encoding="utf-8") as stream:
            yield from stream
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{source} is damaged ({error}); download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text") from error


# ---- download -----------------------------------------------------------------------------------


def download_librispeech(target: PathLike, parts: Sequence[str]) -> Path:
    """Fetch and unpack ``parts`` by lhotse, verifying the archives; what is there is kept.

    Returns:
        ``target/LibriSpeech``.

    Raises:
        UserError: No network, or an archive whose SHA-256 is wrong (it is removed).
    """
    require_lhotse()
    from lhotse.recipes.librispeech import download_librispeech as unpack
    from lhotse.utils import resumable_download

    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (target / "LibriSpeech" / part / ".completed").is_file():
            continue
        archive = target / f"{part}.tar.gz"
        fetch(f"{AUDIO_URL}/12/{archive.name}", archive, resumable_download)
        digest = hashlib.sha256()
        with archive.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
        if found != ARCHIVES[part]:
            archive.unlink()
            raise UserError(
                f"{archive} was damaged on its way (SHA-256 {found}, expected {ARCHIVES[part]}) "
                "and has been removed; run the same command again"
            )
        unpack(target, dataset_parts=[part], base_url=AUDIO_URL)
    return target / "LibriSpeech"


def download_lm_text(target: PathLike) -> Path:
    """Fetch ``librispeech-lm-norm.txt.gz`` (1.5 GB; gzip itself detects damage) into ``target``."""
    require_lhotse()
    from lhotse.utils import resumable_download

    path = Path(target) / LM_TEXT_URL.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # under its own name only when complete
        fetch(LM_TEXT_URL, part, resumable_download)
        part.rename(path)
    return path


def fetch(url: str, path: Path, download) -> None:
    """Call ``download(url, path)``; a failing network becomes a :class:`UserError`."""
    try:
        download(url, path)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"cannot download {url}: {error}. Run the same command again to continue, or fetch it "
            "by other means and give the local copy (--librispeech, --lm_text)"
        ) from error
