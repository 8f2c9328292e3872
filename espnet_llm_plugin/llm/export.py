"""From an ESPnet LM checkpoint of ``causal_llm`` to an LLM directory."""

from pathlib import Path
from typing import Any, Union

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import quiet_transformers, resolve_llm
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.directory import check_output_dir, save_llm, write_directory
from espnet_llm_plugin.llm.export_tuned import write_tuned_llm
from espnet_llm_plugin.llm.own_tokens import has_own_tokens
from espnet_llm_plugin.token_list import check_tokens


def export_llm(
    lm_train_config: Union[str, Path], lm_file: Union[str, Path], output_dir: Union[str, Path]
) -> str:
    """Write a trained ``causal_llm`` as a Hugging Face directory over its token list, LoRA merged.

    Args:
        lm_train_config: ``config.yaml`` of ``lm_train``.
        lm_file: Its checkpoint, e.g. ``valid.loss.ave.pth``.
        output_dir: Directory to create; appears complete or not at all.

    Returns:
        What was written, one line.

    Raises:
        UserError: Missing or unreadable files, another kind of LM, a checkpoint that does not
            belong to the config, LoRA that cannot be merged.
    """
    import yaml
    from espnet2.tasks.lm import LMTask

    check_output_dir(output_dir)
    for file, what in ((lm_train_config, "LM training config"), (lm_file, "LM checkpoint")):
        if not Path(file).is_file():
            raise UserError(f"{what} {file} does not exist.")
    try:
        conf = yaml.safe_load(Path(lm_train_config).read_text(encoding="utf-8"))
        kind, tokens = conf["lm"], conf["token_list"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{lm_train_config} is not the config.yaml of an lm_train run ({reason})."
        ) from None
    if kind != "causal_llm":
        raise UserError(f"{lm_train_config} is of a {kind} LM; only causal_llm can be exported.")
    if conf.get("lm_conf", {}).get("frozen"):
        raise UserError(
            f"{lm_train_config} is of a frozen LLM, nothing was trained: its directory "
            f"{conf['lm_conf'].get('llm')} is what an export would write."
        )
    llm = (conf.get("lm_conf") or {}).get("llm")
    own = llm is not None and has_own_tokens(llm)
    if not own:
        check_tokens(tokens, f"in {lm_train_config}")
    bpemodel = None if own else conf.get("bpemodel")
    if bpemodel is not None and not Path(bpemodel).is_file():
        raise UserError(
            f"{lm_train_config} names the sentencepiece model {bpemodel}, which does not exist; "
            "run from the directory where the LM was trained."
        )
    try:
        model, _ = LMTask.build_model_from_file(lm_train_config, lm_file, "cpu")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{lm_file} cannot be loaded as a checkpoint of {lm_train_config} "
            f"({type(error).__name__}: {reason})."
        ) from error
    assert isinstance(model.lm, CausalLLM)
    if hasattr(model.lm, "tuned"):
        return write_tuned_llm(model.lm.tuned.eval(), output_dir)
    if own:
        with quiet_transformers():
            write_directory(output_dir, lambda partial: _save_own(model.lm.llm, llm, partial))
        return f"wrote {output_dir}: {len(tokens)} tokens of its own; tokenizer: that of {llm}"
    note: list[str] = []
    with quiet_transformers():
        write_directory(
            output_dir,
            lambda partial: note.append(
                save_llm(model.lm.llm, partial, tokens, bpemodel, final_dir=output_dir)
            ),
        )
    return f"wrote {output_dir}: {len(tokens)} tokens; {note[0]}"


def _save_own(model: Any, llm: str, directory: Path) -> None:
    """The model, with the tokenizer of the LLM it was made from."""
    model.save_pretrained(directory)
    load_tokenizer(resolve_llm(llm)).save_pretrained(directory)
