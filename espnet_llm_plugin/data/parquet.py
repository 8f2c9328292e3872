"""Data sets of the Hugging Face Hub as local Parquet files: which files, which rows, which audio.

A data set has configurations, a configuration has splits, a split is one or more Parquet files.
Which ones, the data set's card says (``README.md``, its YAML head's ``configs``); without it the
usual names are tried: ``<config>/<split>-*.parquet`` and ``<config>/<split>/*.parquet``, directly
below the root or below ``data``.
"""

import fnmatch
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import soundfile
import yaml

from espnet_llm_plugin.errors import UserError, first_line

PathLike = Union[str, Path]
ROWS = 64  # read at a time: audio of some minutes
CARD = "README.md"


def require_pyarrow() -> None:
    """Raise a :class:`UserError` that says how to install pyarrow, if it is not there."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(
            "Parquet files need the Python package 'pyarrow', which is not installed: run "
            "pip install pyarrow  (or install this package with its extra 'recipes' or "
            "'leaderboard')"
        ) from None


def split_files(root: PathLike, config: str, split: str) -> list[Path]:
    """Parquet files of a split, in order; none if it is not there."""
    root = Path(root)
    patterns = _of_card(root, config, split)
    for place in ("", "data/"):
        patterns += [f"{place}{config}/{split}{end}" for end in (".parquet", "-*.parquet")]
        patterns += [f"{place}{config}/{split}/*.parquet", f"{place}{config}/{split}/**/*.parquet"]
    for pattern in patterns:
        files = sorted(path for path in root.glob(pattern) if path.suffix == ".parquet")
        if files:
            return files
    return []


def _of_card(root: Path, config: str, split: str) -> list[str]:
    """Patterns of the split's files according to the data set's card."""
    if not (root / CARD).is_file():
        return []
    head = re.match(r"---\n(.*?)\n---", (root / CARD).read_text(encoding="utf-8"), re.DOTALL)
    try:
        configs = (yaml.safe_load(head[1]) or {}).get("configs") or [] if head else []
        named = [entry for entry in configs if str(entry["config_name"]) == config]
        found = [part for entry in named for part in entry["data_files"] if part["split"] == split]
        paths = [part["path"] for part in found]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []  # a card of another form
    return [path for item in paths for path in ([item] if isinstance(item, str) else item)]


def download(repository: str, config: str, splits: Sequence[str], target: PathLike) -> Path:
    """Fetch the splits' files of a data set of the Hub into ``target``; what is there is kept.

    Raises:
        UserError: No network, no such data set or configuration.
    """
    import huggingface_hub as hub

    target = Path(target)
    options: dict[str, Any] = {"repo_type": "dataset", "local_dir": target}
    try:
        names = hub.HfApi().list_repo_files(repository, repo_type="dataset")
        hub.snapshot_download(repository, allow_patterns=[CARD], **options)
        wanted = []
        for split in splits:
            patterns = [f"*{config}/{split}-*.parquet", f"*{config}/{split}/*.parquet"]
            for pattern in _of_card(target, config, split) + patterns:
                found = fnmatch.filter(names, pattern)
                if found:
                    wanted += found
                    break
            else:
                raise UserError(f"{repository} has no split '{split}' of configuration '{config}'")
        hub.snapshot_download(repository, allow_patterns=wanted, **options)
    except UserError:
        raise
    except Exception as error:  # of the HTTP client, which is another one in each release
        raise UserError(
            f"cannot download {repository}: {first_line(error)}. Run the same command again to "
            "continue, or fetch it by other means and give the local copy"
        ) from error
    return target


def columns_of(path: PathLike) -> list[str]:
    """Names of the columns.

    Raises:
        UserError: The file is not Parquet.
    """
    return _open(path).schema_arrow.names


def read_rows(path: PathLike, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, of these columns only.

    Raises:
        UserError: The file is damaged or lacks a column.
    """
    import pyarrow

    file = _open(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; it has "
            f"{', '.join(file.schema_arrow.names)}"
        )
    try:
        for batch in file.iter_batches(batch_size=ROWS, columns=list(columns)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error


def _open(path: PathLike):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a whole Parquet file ({error}); download it again"
        ) from error


def audio_bytes(cell: Optional[dict[str, Any]], beside: Path) -> bytes:
    """The encoded audio of a cell of type ``Audio``; ``b""`` if there is none.

    The cell has the bytes themselves, or the path of a file (relative to ``beside``).
    """
    if not cell:
        return b""
    if cell.get("bytes"):
        return cell["bytes"]
    path = beside / (cell.get("path") or "")
    return path.read_bytes() if path.is_file() else b""


def seconds_of(audio: bytes) -> Optional[float]:
    """Duration of encoded audio by its header; None if it cannot be read or has no samples."""
    try:
        info = soundfile.info(io.BytesIO(audio))
    except (soundfile.LibsndfileError, TypeError):
        return None
    return info.frames / info.samplerate if info.frames > 0 else None
