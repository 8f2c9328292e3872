"""Keep what a table of results was made of, so that a long experiment can go on elsewhere.

Models stay where they were trained. The archive, a tar.xz file, holds the small files that
:func:`~espnet_llm_plugin.scoring.results.load_results` reads of every finished system (errors of
each utterance, scales, times, perplexities, accuracy of predicted languages; for tables by language
also words and the utterances' languages), under their paths relative to the working directory. They
are much alike from system to system, which xz, unlike zip, sees.
"""

import glob
import io
import lzma
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping, Union

import yaml

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.evaluate import SCORES
from espnet_llm_plugin.scoring.language_id import NAME as LANGUAGE_ID

_FILES = ("scales", "dev_nll", "perplexity", "rtf", "time", "train_log")


def collect(config: Union[str, Path], archive: Union[str, Path]) -> int:
    """Put the files of all finished systems of a results YAML into the archive.

    What it held before stays unless there is a newer version here.

    Returns:
        Files in the archive.

    Raises:
        UserError: A file outside the working directory, or a broken archive.
    """
    members = _read(archive) if Path(archive).is_file() else {}
    table = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    seeds = table.get("seeds") or [""]
    by_language = table.get("utt2lang") or {}
    for system in table["systems"]:
        for seed in seeds:
            for path in _files_of(system, str(seed), by_language):
                name = PurePosixPath(path)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(
                        f"{config}: {path} is outside the working directory; only relative paths "
                        "can be archived"
                    )
                members[str(name)] = Path(path).read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as stream:
        for name in sorted(members, key=_likeness):
            info = tarfile.TarInfo(name)  # without a date: the same files give the same archive
            info.size = len(members[name])
            stream.addfile(info, io.BytesIO(members[name]))
    with atomic_write(archive, "wb") as stream:
        stream.write(buffer.getvalue())
    return len(members)


def restore(archive: Union[str, Path]) -> int:
    """Write the files of the archive that are not here; returns how many.

    Raises:
        UserError: A broken archive, or names outside the working directory.
    """
    count = 0
    for name, content in _read(archive).items():
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{archive}: {name} is outside the working directory")
        if not path.exists():
            with atomic_write(path, "wb") as stream:
                stream.write(content)
            count += 1
    return count


def _read(archive: Union[str, Path]) -> dict[str, bytes]:
    try:
        with tarfile.open(archive, "r:xz") as stream:
            files = [info for info in stream.getmembers() if info.isfile()]
            return {info.name: stream.extractfile(info).read() for info in files}
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(
            f"{archive} cannot be read as a tar.xz file ({error}); expected what "
            "espnet_llm_plugin.bin.results_archive wrote"
        ) from error


def _likeness(name: str) -> tuple[str, str, str]:
    """Files of one kind side by side."""
    path = PurePosixPath(name)
    return path.name, path.parent.name, name


def _files_of(system: dict, seed: str, by_language: Mapping[str, str]) -> Iterator[str]:
    """Files of a system that is scored for this seed; none if it is not.

    ``by_language`` are tables of the utterances' languages by test set.
    """
    tests = system["test"]
    directories = list(tests.values()) if isinstance(tests, dict) else [tests]
    directories += [system["dev"]] if system.get("dev") else []
    directories = [str(one).replace("{seed}", seed) for one in directories]
    if not (Path(directories[0]) / SCORES).is_file():
        return
    for directory in directories:
        yield from glob.glob(f"{directory}/{SCORES}")
        yield from glob.glob(f"{directory}/score_*/utterances.tsv")
        yield from glob.glob(f"{directory}/{LANGUAGE_ID}")
        if by_language:  # for letters and words of other scripts
            yield from glob.glob(f"{directory}/score_wer/*.trn")
    yield from filter(os.path.isfile, by_language.values())
    for key in _FILES:
        values = system.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str):
                yield from glob.glob(value.replace("{seed}", seed))
