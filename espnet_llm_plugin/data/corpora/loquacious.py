"""Loquacious (Parcollet et al., Interspeech 2025, arXiv 2505.21578): 25,000 h of English.

``speechbrain/LoquaciousSet`` on the Hugging Face Hub, or a local copy of it: Parquet files of the
configurations small (250 h), medium (2,500 h), large (25,000 h) and clean (a part of large), all
with the same splits dev and test; columns ``ID``, ``duration``, ``wav``, ``spk_id``, ``sex``,
``text`` (capitals, no punctuation).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import EMPTY_TEXT, DataDir, write_data_dir
from espnet_llm_plugin.data.parquet import download, require_pyarrow, split_files
from espnet_llm_plugin.data.parquet_audio import Columns, extract_all, to_data_dir
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]

REPOSITORY = "speechbrain/LoquaciousSet"
CONFIGS = ("small", "medium", "large", "clean")
COLUMNS = Columns(key="ID", audio="wav", text="text", speaker="spk_id", sex="sex")
SKIPPED = "skipped_utts"


def sets_of(config: str) -> dict[str, str]:
    """Data directories of a configuration and their splits: ``train_<config>``, dev, test.

    Raises:
        UserError: There is no such configuration.
    """
    if config not in CONFIGS:
        raise UserError(
            f"Loquacious has no configuration '{config}'; expected one of {', '.join(CONFIGS)}"
        )
    return {f"train_{config}": "train", "dev": "dev", "test": "test"}


def download_loquacious(target: PathLike, config: str) -> Path:
    """Fetch a configuration from the Hub into ``target`` (16-bit audio: 115 MB an hour)."""
    return download(REPOSITORY, config, list(sets_of(config).values()), target)


def prepare_loquacious(
    corpus: PathLike,
    output_dir: PathLike,
    config: str,
    *,
    lower_case: bool = True,
    nj: int = 1,
) -> dict[str, tuple[DataDir, dict[str, list[str]]]]:
    """Write Kaldi data directories ``output_dir/{train_<config>,dev,test}``.

    The audio is copied as it is to archives in ``output_dir/<set>/archives``; they can be removed
    when stage 3 has written its own files.

    Args:
        corpus: Local copy of the data set, with its README.md or with the usual file names.
        output_dir: Usually ``data``.
        config: One of :data:`CONFIGS`.
        lower_case: Turn the transcripts, which are in capitals, into small letters: pretrained
            LLMs know those better.
        nj: Parquet files read at a time.

    Returns:
        By set what was written, and by reason the ids of utterances that were left out (no audio
        or transcript, unreadable audio, repeated id); ``<set>/skipped_utts`` lists them.

    Raises:
        UserError: A missing directory, split or column, a damaged file, or pyarrow is missing.
    """
    require_pyarrow()
    corpus = Path(corpus)
    if not corpus.is_dir():
        raise UserError(f"{corpus} is not a directory; expected a copy of {REPOSITORY}")
    files = {name: split_files(corpus, config, split) for name, split in sets_of(config).items()}
    missing = [sets_of(config)[name] for name, found in files.items() if not found]
    if missing:
        raise UserError(
            f"{corpus} has no Parquet files of configuration '{config}', split "
            f"{', '.join(missing)}; expected a copy of {REPOSITORY} with files such as "
            f"{config}/{missing[0]}-00000-of-00001.parquet"
        )

    def transcript(text: str) -> tuple[str, str]:
        return (text.lower() if lower_case else text), ("" if text else EMPTY_TEXT)

    result = {}
    for name, found in files.items():
        directory = Path(output_dir) / name
        extracted = extract_all(found, directory / "archives", COLUMNS, nj)
        data, skipped = to_data_dir(corpus, extracted, transcript)
        if not data.wav:
            raise UserError(f"{corpus}: not one utterance of {name} can be used: {skipped}")
        with writing(directory):
            write_data_dir(data, directory)
            with atomic_write(directory / SKIPPED) as stream:
                stream.writelines(f"{k} {why}\n" for why in skipped for k in _keys(skipped[why]))
        result[name] = data, skipped
    return result


def _keys(keys: Sequence[str]) -> list[str]:
    return [key or "-" for key in keys]
