"""More languages for a trained speech LLM: soft prompts to be trained while all else stays."""

import argparse
import copy
from pathlib import Path
from typing import Any, Mapping, Union

import torch
import yaml

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.languages import Languages, parameter_name

CONFIG, MODEL = "train.yaml", "model.pth"

# Of the training configuration, what belongs to one run of a training. (A recipe's `fold_length`
# would be appended to that of the configuration.)
_OF_A_RUN = (
    "allow_variable_data_keys",
    "collect_stats",
    "config",
    "distributed",
    "dry_run",
    "fold_length",
    "freeze_param",
    "init_param",
    "log_level",
    "multiprocessing_distributed",
    "ngpu",
    "output_dir",
    "preprocessor",
    "resume",
    "write_collected_feats",
)
_DATA = ("train_data_", "train_shape_", "valid_data_", "valid_shape_", "dist_")


def add_languages(
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    languages: Mapping[str, Any],
    output_dir: Union[str, Path],
) -> Path:
    """Write a model that also has ``languages``, and the configuration that trains only them.

    ``OUTPUT_DIR/model.pth`` is the checkpoint with soft prompts of the new languages (and rows of
    the language prediction), initialised as the configuration says; all else in it is bit by bit as
    it was. ``OUTPUT_DIR/train.yaml`` is the training configuration, without what belongs to one run
    (data, output directory), that starts from it with ``model_conf: {train_languages: ...}``.

    Args:
        config: ``config.yaml`` of the training.
        checkpoint: Of that model.
        languages: Name, or None, by code.
        output_dir: Made if it is missing.

    Returns:
        The path of ``train.yaml``.

    Raises:
        UserError: A model without soft prompts of languages, a language that it has already, or a
            checkpoint of another model.
    """
    from espnet2.tasks.asr import ASRTask

    known = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    conf = known.get("decoder_conf") or {}
    if known.get("model") != "speech_llm" or conf.get("soft_prompt") != "per_language":
        raise UserError(
            f"{config} is not of a speech LLM with `soft_prompt: per_language`, to which languages "
            "can be added"
        )
    extended = copy.deepcopy(known)
    soft = extended["decoder_conf"]["soft_prompt_conf"]
    soft["languages"] = _together(soft["languages"], languages)
    extended["model_conf"] = {**(known.get("model_conf") or {}), "train_languages": [*languages]}

    # 1. The model with freshly initialised soft prompts, and in it what was trained.
    model = ASRTask.build_model(argparse.Namespace(**copy.deepcopy(extended)))
    state = model.state_dict()
    trained = torch.load(checkpoint, map_location="cpu", weights_only=True)
    names = {parameter_name(code) for code in languages}
    new = {name for name in state if name.rpartition(".")[2] in names}
    if set(trained) != set(state) - new:
        different = sorted(set(trained) ^ (set(state) - new))
        raise UserError(
            f"{checkpoint} is not of the model of {config}: they differ in {len(different)} "
            f"tensors, e.g. {different[0]}"
        )
    state.update(trained)
    model.load_state_dict(state)
    directory = Path(output_dir)
    with atomic_write(directory / MODEL, "wb") as stream:
        torch.save(state, stream)

    # 2. How to go on.
    defaults = vars(ASRTask.get_parser().parse_args([]))
    options = {
        key: value
        for key, value in extended.items()
        if key in defaults
        and value != defaults[key]
        and key not in _OF_A_RUN
        and not key.startswith(_DATA)
    }
    options["preprocessor"] = "multilingual"
    options["allow_variable_data_keys"] = True
    options["init_param"] = [str((directory / MODEL).resolve())]
    with atomic_write(directory / CONFIG) as stream:
        stream.write(f"# Trains the soft prompts of {', '.join(languages)} alone.\n")
        yaml.safe_dump(options, stream, allow_unicode=True, sort_keys=True)
    return directory / CONFIG


def _together(before: Any, more: Mapping[str, Any]) -> Any:
    """All languages: a list of codes, or names by code if any has a name."""
    old = Languages(before)
    there = [code for code in more if code in old.codes]
    if there or not more:
        what = f"the model has {', '.join(there)} already" if there else "no languages to add"
        raise UserError(f"{what}; it knows {', '.join(old.codes)}")
    names = {**{code: old.names.get(code) for code in old.codes}, **more}
    together = names if any(names.values()) else list(names)
    Languages(together)  # all codes can be
    return together
