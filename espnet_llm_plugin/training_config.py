"""A training configuration before ESPnet has it: its YAML file, and options that change it."""

import argparse
from pathlib import Path
from typing import Any, Union

import yaml

from espnet_llm_plugin.errors import UserError

CONFS = ("decoder_conf", "model_conf")


def read_training_config(path: Union[str, Path], options: str = "") -> dict[str, Any]:
    """The keys of a YAML file, with ``decoder_conf`` and ``model_conf`` as ESPnet will see them.

    Args:
        path: The file of ``--config``.
        options: Further options of the training, of which ``--decoder_conf KEY.KEY=VALUE`` and
            ``--model_conf ...`` change the values of the file.

    Raises:
        UserError: No such file, or its content is not a mapping.
    """
    from espnet2.utils.nested_dict_action import NestedDictAction

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: there is no such training configuration") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a training configuration: expected `key: value` lines")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in CONFS:
        parser.add_argument(f"--{name}", action=NestedDictAction, default=config.get(name) or {})
    given, _ = parser.parse_known_args(options.split())
    return {**config, **vars(given)}


def add_config_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options ``--config`` and ``--asr_args``, which :func:`read_training_config` takes."""
    parser.add_argument("--config", required=required, help="Training configuration (YAML)")
    parser.add_argument(
        "--asr_args",
        default="",
        help="Options of the training beside it, as one string: those of asr_llm.sh's --asr_args",
    )


def initial_values(config: dict[str, Any]) -> list[str]:
    """``init_param`` of a configuration, in ESPnet's form ``FILE[:SOURCE:TARGET[:EXCLUDED]]``.

    Raises:
        UserError: It is not a list.
    """
    values = config.get("init_param") or []
    if not isinstance(values, list):
        raise UserError(f"init_param must be a list of files, got {values!r}")
    return [str(value) for value in values]
