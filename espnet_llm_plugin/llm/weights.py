"""The weight files of an LLM directory: found, checked for truncation, identified by content."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Union

from espnet_llm_plugin.errors import UserError

# Config entries that say how a file was written, not what the model computes.
_VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_BLOCK = 1 << 16
_BLOCKS_PER_FILE = 64


def weight_files(directory: Union[str, Path]) -> list[Path]:
    """The weight files ``from_pretrained`` would read, in a fixed order.

    Raises:
        UserError: None found, or a file that the index names is missing.
    """
    directory = Path(directory)
    for single in ("model.safetensors", "pytorch_model.bin"):
        for name in (single, f"{single}.index.json"):
            file = directory / name
            if not file.is_file():
                continue
            if name == single:
                return [file]
            try:
                shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise UserError(f"{file} is not a weight index ({error}).") from None
            missing = sorted(shard for shard in shards if not (directory / shard).is_file())
            if missing:
                raise UserError(
                    f"LLM directory {directory} lacks {len(missing)} of the {len(shards)} weight "
                    f"files named in {name}: {', '.join(missing[:3])}. Copy the model again."
                )
            return [directory / shard for shard in sorted(shards)]
    raise UserError(
        f"LLM directory {directory} has no weights; expected model.safetensors, pytorch_model.bin "
        "or an index of their parts."
    )


def check_weights(directory: Union[str, Path]) -> None:
    """Find truncated weight files from their headers, without reading the tensors."""
    for file in weight_files(directory):
        size = file.stat().st_size
        if file.suffix == ".safetensors":
            expected = _safetensors_size(file, size)
            if size != expected:
                raise UserError(
                    f"{file} is damaged: {size} bytes, its header announces {expected}. The copy "
                    "or download was cut short; copy the model again."
                )
        elif size == 0 or (_starts_as_zip(file) and not zipfile.is_zipfile(file)):
            raise UserError(
                f"{file} is damaged: {size} bytes without the end of an archive. The copy or "
                "download was cut short; copy the model again."
            )


def _starts_as_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(2) == b"PK"


def _safetensors_size(file: Path, size: int) -> int:
    # Layout: 8 bytes little-endian header length, JSON header, tensors.
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size - 8:
            return length + 8 if size >= 8 else 8
        try:
            header = json.loads(stream.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is damaged: its header is not readable.") from None
    return 8 + length + max(ends, default=0)


def fingerprint(directory: Union[str, Path]) -> bytes:
    """32 bytes that identify an LLM by content: its configuration and samples of its weights.

    The configuration counts without the entries that only say how the file was written. Of every
    weight file count its size, its first bytes (the header names all tensors) and 64 evenly spaced
    blocks of 64 KiB, so that 140 GB take as long as 1 GB; small files are read whole.
    """
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for key in _VOLATILE_CONFIG:
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(directory):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as stream:
            if size <= _BLOCK * _BLOCKS_PER_FILE:
                digest.update(stream.read())
                continue
            for block in range(_BLOCKS_PER_FILE):
                stream.seek((size - _BLOCK) * block // (_BLOCKS_PER_FILE - 1))
                digest.update(stream.read(_BLOCK))
    return digest.digest()
