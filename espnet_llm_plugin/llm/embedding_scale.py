"""An LLM's text embeddings, and their scale, without loading the LLM."""

from pathlib import Path
from typing import Any, NamedTuple, Sequence, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import load_config, resolve_llm
from espnet_llm_plugin.llm.weights import weight_files


def text_embedding_scale(llm: Union[str, Path], rows: int) -> float:
    """Root mean square of the first ``rows`` text embeddings, as the first layer gets them.

    Reads one tensor of the weight files.

    Args:
        llm: Directory or hub id.
        rows: Rows that stand for tokens; those beyond were never trained.

    Raises:
        UserError: The weight files have no table of input embeddings that can be told from others.
    """
    table = _table(llm)
    weight = _read(table.file, table.key)[:rows].float()
    return float(weight.square().mean().sqrt()) * table.scale


def text_embeddings(llm: Union[str, Path], ids: Sequence[int]) -> torch.Tensor:
    """Embeddings (n, D) float32 of token ids (n), as the first layer gets them.

    Reads these rows of the weight files. Errors as for :func:`text_embedding_scale`.
    """
    table = _table(llm)
    return _read_rows(table.file, table.key, ids).float() * table.scale


class _Table(NamedTuple):
    """Where the input embeddings are."""

    file: Path
    key: str
    scale: float  # of the rows


def _table(llm: Union[str, Path]) -> _Table:
    directory = resolve_llm(llm)
    table, name = _input_embeddings(load_config(directory))
    found = [
        (file, key)
        for file in weight_files(directory)
        for key in _keys(file)
        if key == name or key.endswith("." + name.split(".", 1)[-1]) or name.endswith("." + key)
    ]
    if len(found) != 1:
        raise UserError(
            f"the weight files of LLM {llm} have {len(found)} tensors called {name}; expected one. "
            "Save the model again with transformers' save_pretrained"
        )
    # Gemma 3's embedding layer multiplies its rows by the root of their width
    return _Table(*found[0], float(getattr(table, "scalar_embed_scale", 1.0)))


def _input_embeddings(config: Any) -> tuple[torch.nn.Module, str]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    table = model.get_input_embeddings()
    return table, next(name for name, p in model.named_parameters() if p is table.weight)


def _keys(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(torch.load(file, map_location="cpu", weights_only=True, mmap=True))


def _read(file: Path, key: str) -> torch.Tensor:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(key)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)[key]


def _read_rows(file: Path, key: str, ids: Sequence[int]) -> torch.Tensor:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_slice(key)
            return torch.cat([rows[i : i + 1] for i in ids])
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)[key][list(ids)]
