"""What a recipe knows better than the configuration of a speech LLM: its languages and its pieces.

One configuration then serves every corpus, and any choice of its languages and of the pieces.
"""

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from espnet_llm_plugin.errors import UserError


def recipe_options(
    config: Mapping[str, Any], languages: Sequence[str] = (), pieces: str = ""
) -> list[str]:
    """Options of ESPnet's training that fill in what a configuration leaves to the recipe.

    * Soft prompts of languages get ``languages``, unless the configuration lists its own.
    * Vocabularies of a CTC and of auxiliary losses beside the LLM's tokens become ``pieces``: the
      files that a configuration names are those of one recipe.

    Args:
        config: The training configuration, see
            :func:`~espnet_llm_plugin.training_config.read_training_config`.
        languages: Codes of the recipe's languages.
        pieces: SentencePiece model of the recipe's CTC model, beside its ``tokens.txt``.

    Returns:
        Words of a command line, none of which has a space.
    """
    decoder, model = config.get("decoder_conf") or {}, config.get("model_conf") or {}
    options: list[str] = []
    soft = decoder.get("soft_prompt_conf") or {}
    if languages and decoder.get("soft_prompt") == "per_language" and not soft.get("languages"):
        options += _option("decoder_conf", "soft_prompt_conf.languages", [*languages])
    if not pieces:
        return options
    files = {"token_list": str(Path(pieces).parent / "tokens.txt"), "bpemodel": str(pieces)}
    if isinstance(model.get("ctc_vocabulary"), Mapping):
        for name, path in files.items():
            options += ["--model_conf", f"ctc_vocabulary.{name}={path}"]
    heads = model.get("auxiliary") or []
    filled = [_with_files(head, files) for head in heads]
    if filled != heads:
        options += _option("model_conf", "auxiliary", filled)
    return options


def _with_files(head: Any, files: Mapping[str, str]) -> Any:
    if not isinstance(head, Mapping) or not isinstance(head.get("vocabulary"), Mapping):
        return head
    return {**head, "vocabulary": {**head["vocabulary"], **files}}


def _option(conf: str, key: str, value: Any) -> list[str]:
    """In JSON, which is YAML: its quotation marks keep the code ``no`` from being read as False."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if " " in text:
        raise UserError(
            f"{conf}: {key} is given on the command line and cannot have spaces: {text}"
        )
    return [f"--{conf}", f"{key}={text}"]
