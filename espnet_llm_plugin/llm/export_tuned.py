"""From the checkpoint of a speech LLM to the directory of its LLM, LoRA merged."""

import copy
from pathlib import Path
from typing import Any, Union

import torch

from espnet_llm_plugin.errors import UserError, first_line
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import load_causal_lm, quiet_transformers
from espnet_llm_plugin.llm.directory import (
    BPE_FILE,
    TOKENS_FILE,
    check_output_dir,
    llm_tokens,
    save_llm,
    write_directory,
)
from espnet_llm_plugin.llm.lora import merge_lora
from espnet_llm_plugin.llm.tuning import TunedLLM
from espnet_llm_plugin.model_parts import without_training_parts

# Largest difference of logits, relative to the largest logit, that rounding explains.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBE = (2, 32)


def export_tuned_llm(
    asr_train_config: Union[str, Path],
    asr_model_file: Union[str, Path],
    output_dir: Union[str, Path],
) -> str:
    """Write the LLM of a trained speech LLM as a Hugging Face directory, LoRA merged.

    The directory is written, loaded again and compared with the LLM as it was trained, by its
    logits on random tokens.

    Args:
        asr_train_config: ``config.yaml`` of ``asr_train``.
        asr_model_file: Its checkpoint, e.g. ``valid.acc.ave.pth``.
        output_dir: Directory to create; appears complete or not at all.

    Returns:
        What was written and how far the logits differ, one line.

    Raises:
        UserError: Missing or unreadable files, a model without a trained LLM, a merged LLM that is
            not the one that was trained.
    """
    from espnet2.tasks.asr import ASRTask

    check_output_dir(output_dir)
    for file, what in ((asr_train_config, "ASR training config"), (asr_model_file, "checkpoint")):
        if not Path(file).is_file():
            raise UserError(f"{what} {file} does not exist.")
    try:
        with without_training_parts():
            model, _ = ASRTask.build_model_from_file(asr_train_config, asr_model_file, "cpu")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{asr_model_file} cannot be loaded as a checkpoint of {asr_train_config} "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    tuned = [module for module in model.modules() if isinstance(module, TunedLLM)]
    if len(tuned) != 1:
        raise UserError(f"{asr_train_config} is of a model that has no LLM of its own to export.")
    (llm,) = tuned
    if not list(llm.parameters()):
        raise UserError(
            f"{asr_train_config} is of a frozen LLM, nothing of it was trained: its directory "
            f"{llm.source.name} is what an export would write."
        )
    return write_tuned_llm(llm.eval(), output_dir)


@torch.no_grad()
def write_tuned_llm(llm: TunedLLM, output_dir: Union[str, Path]) -> str:
    """As :func:`export_tuned_llm`, for an LLM in memory, which stays as it is."""
    generator = torch.Generator().manual_seed(0)
    rows, length = _PROBE
    length = min(length, llm.context or length)
    ids = torch.randint(llm.vocab_size, (rows, length), generator=generator)
    expected = llm.model("cpu")(input_ids=ids, use_cache=False).logits.float()
    merged = copy.deepcopy(llm).eval().model("cpu")
    merge_lora(merged)
    tolerance = _TOLERANCE[merged.dtype]
    note: list[str] = []

    def write(partial: Path) -> None:
        note.append(_save(llm, merged, partial, Path(output_dir)))
        again = load_causal_lm(partial, dtype="auto")
        found = again(input_ids=ids, use_cache=False).logits.float()
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:
            raise UserError(
                "the merged LLM is not the one that was trained: logits differ by "
                f"{difference:.1e} of the largest (rounding to {merged.dtype} explains "
                f"{tolerance:.0e}). Nothing was written; if the LLM was trained in half "
                "precision, set `dtype: float32` in the decoder_conf of the config to export it."
            )
        note.append(f"logits differ from those of training by {difference:.1e} of the largest")

    with quiet_transformers():
        write_directory(output_dir, write)
    return f"wrote {output_dir}: {'; '.join(note)}"


def _save(llm: TunedLLM, merged: Any, partial: Path, final: Path) -> str:
    """Write the merged model with what belongs to its tokens; returns a line on these."""
    directory = llm.source.directory
    if (directory / TOKENS_FILE).is_file():
        bpemodel = directory / BPE_FILE
        tokens = llm_tokens(directory)
        there = bpemodel if bpemodel.is_file() else None
        return save_llm(merged, partial, tokens, there, final_dir=final)
    merged.save_pretrained(partial)
    load_tokenizer(directory).save_pretrained(partial)
    return f"tokenizer: that of {llm.source.name}"
