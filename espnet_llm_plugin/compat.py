"""Work-arounds for the versions of ESPnet, transformers and torchaudio that we run on.

With :mod:`espnet_llm_plugin.compat_imports`, the only file that patches or silences somebody else's
code; each function says why it exists and has a test in ``tests/test_compat.py``.
"""

import contextlib
import datetime
import importlib
import io
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Iterator

from espnet_llm_plugin.compat_imports import cheap_imports
from espnet_llm_plugin.errors import UserError

SUPPORTED_ESPNET = ("202511",)

# Printed by ESPnet's imports although nothing is wrong: the optional flash-attn is absent.
_HARMLESS = ("Failed to import Flash Attention",)


def check_espnet_version() -> str:
    """Return ESPnet's version.

    Raises:
        UserError: ESPnet is missing, or is a version whose internals we have not verified.
    """
    try:
        found = version("espnet")
    except PackageNotFoundError:
        raise UserError(
            f"ESPnet is not installed. Expected one of {', '.join(SUPPORTED_ESPNET)}: "
            f"run `pip install espnet=={SUPPORTED_ESPNET[-1]}`"
        ) from None
    if found not in SUPPORTED_ESPNET:
        raise UserError(
            f"ESPnet {found} is installed, but this plugin supports "
            f"{', '.join(SUPPORTED_ESPNET)} only. Run `pip install "
            f"espnet=={SUPPORTED_ESPNET[-1]}`, or install a version of the plugin made for {found}"
        )
    return found


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop the harmless lines that importing ESPnet's tasks prints; pass on all others."""
    caught = {name: io.StringIO() for name in ("stdout", "stderr")}
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(caught["stdout"]),
            contextlib.redirect_stderr(caught["stderr"]),
        ):
            # ESPnet uses deprecated names of torch; nothing a user can do about it.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"espnet")
            yield
    finally:
        for name, text in caught.items():
            for line in text.getvalue().splitlines(keepends=True):
                if not line.startswith(_HARMLESS):
                    getattr(sys, name).write(line)


def import_quietly(module: str):
    """Import ``module`` under :func:`quiet_imports` and :func:`compat_imports.cheap_imports`."""
    with quiet_imports(), cheap_imports():
        return importlib.import_module(module)


def patch_asr_statistics() -> None:
    """Let ``asr_train --collect_stats`` build a speech LLM without loading its LLM. Idempotent.

    ESPnet builds the whole model there and uses its frontend alone. A frozen LLM and one with LoRA
    are loaded when they are first used; one that is trained has to be loaded when it is built.
    """
    task = importlib.import_module("espnet2.tasks.asr").ASRTask
    original = task.build_model.__func__
    if getattr(original, "freezes_llm_for_statistics", False):
        return

    def build_model(cls, args):
        if not getattr(args, "collect_stats", False) or args.decoder != "speech_llm":
            return original(cls, args)
        conf = args.decoder_conf
        rest = {k: v for k, v in conf.items() if k not in ("lora_conf", "train_embeddings")}
        args.decoder_conf = {**rest, "tuning": "frozen"}
        try:
            return original(cls, args)
        finally:
            args.decoder_conf = conf

    build_model.freezes_llm_for_statistics = True
    task.build_model = classmethod(build_model)


def patch_lm_token_types() -> None:
    """Let ``lm_train`` take ``--token_type hugging_face``, as ``asr_train`` does. Idempotent.

    ESPnet's preprocessor knows it, its LM task alone does not offer it.
    """
    task = importlib.import_module("espnet2.tasks.lm").LMTask
    original = task.add_task_arguments.__func__
    if getattr(original, "offers_hugging_face", False):
        return

    def add_task_arguments(cls, parser):
        original(cls, parser)
        for action in parser._actions:
            if action.dest == "token_type" and "hugging_face" not in action.choices:
                action.choices = [*action.choices, "hugging_face"]
        return parser

    add_task_arguments.offers_hugging_face = True
    task.add_task_arguments = classmethod(add_task_arguments)


def patch_espnet_trainer() -> None:
    """Make ESPnet's checkpoints safe to average and safe to kill. Idempotent."""
    _patch_average_nbest_models()
    _patch_torch_save()


def _patch_average_nbest_models() -> None:
    """Average each n-best set from freshly loaded files.

    ESPnet 202511 sums into the first loaded state dict by reference and keeps it cached, so the
    second and later averages of a run are wrong (``ave_3best`` of 1, 2, 3 after ``ave_2best``
    gives 1.83). One call per criterion and per n never meets the cache, and holds fewer epochs in
    memory at once.
    """
    trainer = importlib.import_module("espnet2.train.trainer")
    original = trainer.average_nbest_models
    if getattr(original, "one_average_per_call", False):
        return

    def average_nbest_models(
        output_dir, reporter, best_model_criterion, nbest, suffix=None, use_deepspeed=False
    ):
        wanted = sorted([nbest] if isinstance(nbest, int) else set(nbest)) or [1]
        for phase, key, mode in best_model_criterion:
            if not reporter.has(phase, key):
                continue
            available = len(reporter.sort_epochs_and_values(phase, key, mode))
            # Ascending, because the last call decides where the link `*.ave.pth` points.
            for n in [n for n in wanted if n <= available] or [1]:
                original(output_dir, reporter, [(phase, key, mode)], [n], suffix, use_deepspeed)

    average_nbest_models.one_average_per_call = True
    trainer.average_nbest_models = average_nbest_models


def _patch_torch_save() -> None:
    """Let ``torch.save(obj, path)`` replace the file atomically.

    ESPnet's trainer overwrites ``checkpoint.pth`` in place: a kill or a full disk in that moment
    destroys the only file a run can resume from.
    """
    import torch

    original = torch.save
    if getattr(original, "replaces_atomically", False):
        return

    def save(obj, f, *args, **kwargs):
        if not isinstance(f, (str, Path)):
            return original(obj, f, *args, **kwargs)
        path = Path(f)
        # A fixed name, not a random one: what a killed run left is overwritten by the next.
        partial = path.with_name(f".{path.name}.partial")
        try:
            original(obj, partial, *args, **kwargs)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    save.replaces_atomically = True
    torch.save = save


def enable_gradient_checkpointing(model) -> None:
    """Recompute the layers of a Hugging Face model in the backward pass, where it is in training.

    transformers 5.23 deprecates ``gradient_checkpointing_enable`` for a name that 5.0 has not. Both
    also make all embeddings require gradients, which only the reentrant kind of checkpointing
    needs, and which fails under ``torch.inference_mode``.

    Raises:
        ValueError: The model has no checkpointing.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


@contextlib.contextmanager
def same_day_in_chat_templates() -> Iterator[None]:
    """Let chat templates believe, for the duration of the block, that it is always the same day.

    Some print the date (Llama 3.2): a prompt would be another one the day after the training, and
    transformers takes the clock from its module, whatever a caller passes.
    """
    from transformers.utils import chat_template_utils

    class SameDay(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26, tzinfo=tz)  # the day that Llama 3's template falls back to

    before = chat_template_utils.datetime
    chat_template_utils.datetime = SameDay
    try:
        yield
    finally:
        chat_template_utils.datetime = before
