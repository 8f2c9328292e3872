"""A trained speech LLM for decoding elsewhere: without the auxiliary heads, its files beside it.

ESPnet's ``espnet2.bin.pack`` puts a configuration and a checkpoint into an archive as they are, and
its ``asr_inference`` builds all that the configuration names. ``unpack`` gives a file that the
configuration names its new place if the archive has it under that very name, which is its path from
the directory where it was packed.
"""

import copy
import shlex
import shutil
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Union

import torch
import yaml

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.directory import check_output_dir, write_directory

CONFIG, MODEL = "config.yaml", "model.pth"
_HEADS = "auxiliary"  # in model_conf, and before the names of their tensors
# Files that building a model needs, by their place in the configuration: names beside the model.
_FILES = {
    ("bpemodel",): "bpe.model",
    ("non_linguistic_symbols",): "non_linguistic_symbols.txt",
    ("normalize_conf", "stats_file"): "feats_stats",
    ("model_conf", "ctc_vocabulary", "token_list"): "ctc_tokens.txt",
    ("model_conf", "ctc_vocabulary", "bpemodel"): "ctc_bpe.model",
}
_LLM = ("decoder_conf", "llm")
_LLM_FILE = "config.json"


def export_speech_llm(
    config: Union[str, Path], checkpoint: Union[str, Path], output_dir: Union[str, Path]
) -> str:
    """Write the model without its auxiliary heads, which decoding does not use.

    ``OUTPUT_DIR/model.pth`` is the checkpoint without their tensors, all others bit by bit as they
    were; ``OUTPUT_DIR/config.yaml`` the configuration without ``model_conf: auxiliary``. Files that
    the configuration names (vocabularies of tokens and CTC, statistics of features) are copied
    there. Paths are relative to the working directory if they can be, as ESPnet packs them. An LLM
    that is a directory stays where it is, named by its ``config.json``, a file that ``unpack`` can
    give its new place.

    Args:
        config: ``config.yaml`` of the training.
        checkpoint: Of that model, e.g. ``valid.acc.ave.pth``.
        output_dir: Directory to create; appears complete or not at all.

    Returns:
        Lines that say what was written, the sizes of the checkpoints, and how to pack it.

    Raises:
        UserError: Another model, a file that is missing or no checkpoint of a model.
    """
    check_output_dir(output_dir)
    conf = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if conf.get("model") != "speech_llm":
        raise UserError(
            f"{config} is of model {conf.get('model')!r}; only a speech_llm has auxiliary heads to "
            "leave out, others can be packed as they are"
        )
    state = _read(checkpoint)
    kept = {name: value for name, value in state.items() if not name.startswith(f"{_HEADS}.")}
    exported = copy.deepcopy(conf)
    (exported.get("model_conf") or {}).pop(_HEADS, None)
    final = Path(output_dir)
    files = dict(_copied(config, conf))
    for keys, (_, name) in files.items():
        _parent(exported, keys)[keys[-1]] = _packed_name(final / name)
    llm = _llm_directory(conf)
    if llm is not None:
        _parent(exported, _LLM)[_LLM[-1]] = _packed_name(llm / _LLM_FILE)

    def write(partial: Path) -> None:
        torch.save(kept, partial / MODEL)
        for source, name in files.values():
            shutil.copyfile(source, partial / name)
        with open(partial / CONFIG, "w", encoding="utf-8") as stream:
            yaml.safe_dump(exported, stream, allow_unicode=True, sort_keys=False)

    write_directory(final, write)
    before, after = Path(checkpoint).stat().st_size, (final / MODEL).stat().st_size
    names = [CONFIG, MODEL, *(name for _, name in files.values())]
    options = [final / name for _, name in files.values()] + ([llm] if llm else [])
    return "\n".join(
        [
            f"wrote {final}: {', '.join(names)}",
            f"checkpoint: {before / 1e6:.3f} MB before, {after / 1e6:.3f} MB without "
            f"{len(state) - len(kept)} tensors of auxiliary heads",
            _how_to_pack(final, options),
        ]
    )


def _read(checkpoint: Union[str, Path]) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: the file is cut, empty, has more than tensors
        raise _no_model(checkpoint) from error
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise _no_model(checkpoint)
    return dict(state)


def _no_model(checkpoint: Union[str, Path]) -> UserError:
    return UserError(
        f"{checkpoint} is not the checkpoint of a model; expected a file such as valid.acc.ave.pth"
    )


def _copied(
    config: Union[str, Path], conf: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], tuple[Path, str]]]:
    """Place in the configuration, file, and name beside the model, of all files that there are."""
    for keys, name in _FILES.items():
        path = (_parent(conf, keys) or {}).get(keys[-1])
        if not isinstance(path, str):
            continue
        if keys == ("bpemodel",) and conf.get("token_type") == "hugging_face":
            continue  # an LLM
        if not Path(path).is_file():
            raise UserError(
                f"{config}: {'.'.join(keys)} is {path}, and there is no such file; run this where "
                "the model was trained"
            )
        suffix = "" if Path(name).suffix else Path(path).suffix
        yield keys, (Path(path), name + suffix)


def _parent(conf: Mapping[str, Any], keys: tuple[str, ...]) -> Optional[dict[str, Any]]:
    """The mapping that has the last of ``keys``, or None."""
    for key in keys[:-1]:
        conf = conf.get(key)
        if not isinstance(conf, Mapping):
            return None
    return conf


def _llm_directory(conf: Mapping[str, Any]) -> Optional[Path]:
    """The LLM's directory; None for an LLM of the hub."""
    llm = Path(str((_parent(conf, _LLM) or {}).get(_LLM[-1]))).expanduser()
    llm = llm.parent if llm.name == _LLM_FILE else llm
    return llm if (llm / _LLM_FILE).is_file() else None


def _packed_name(path: Path) -> str:
    """The name that ``espnet2.bin.pack`` gives a file."""
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _how_to_pack(final: Path, options: list[Path]) -> str:
    here = Path.cwd().resolve()
    outside = [path for path in (*options, final) if not path.resolve().is_relative_to(here)]
    if outside:
        return f"ESPnet cannot pack it from here, {outside[-1]} is not below the working directory"
    arguments = ["--asr_train_config", final / CONFIG, "--asr_model_file", final / MODEL]
    for path in options:
        arguments += ["--option", path]
    command = ["python", "-m", "espnet2.bin.pack", "asr", *arguments, "--outpath", f"{final}.zip"]
    return f"to pack it, from this directory: {shlex.join(map(str, command))}"
