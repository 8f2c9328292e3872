"""Low-rank adaptation (LoRA) of a Hugging Face causal LM, by peft: where, how, and merged.

``W x + scaling * B A dropout(x)`` in place of ``W x``, with A (r, in), B (out, r), B = 0 at the
start and ``scaling = alpha / r``. [LoRA, arXiv 2106.09685]
"""

import copy
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import quiet_transformers
from espnet_llm_plugin.options import refuse_unknown

_ADAPTER = "default"
_GROUPS = ("attention", "all-linear")


@dataclass(frozen=True)
class LoraOptions:
    """``lora_conf`` of a speech LLM.

    Attributes:
        r: Rank.
        alpha: Numerator of the scaling.
        targets: ``attention`` (all linear layers of the attention: q, k, v, o), ``all-linear``
            (also those of the MLP, not the output layer), or names of modules such as
            ``[q_proj, v_proj]``, of each of which every layer's is adapted.
        rslora: ``scaling = alpha / sqrt(r)``. [rsLoRA, arXiv 2312.03732]
        dropout: Of the input of A, in training.

    Raises:
        UserError: A value out of range.
    """

    r: int = 8
    alpha: float = 16
    targets: Union[str, Sequence[str]] = "attention"
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise UserError(
                f"lora_conf: r (the rank) must be a positive integer, got {self.r!r}; for an LLM "
                "without LoRA set `tuning: frozen`."
            )
        for name, value, low, high in (
            ("alpha", self.alpha, 0, float("inf")),
            ("dropout", self.dropout, 0, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"lora_conf: {name} must be a number, got {value!r}.")
            if not low <= value < high or (name == "alpha" and value == 0):
                raise UserError(
                    f"lora_conf: {name} must be {'positive' if name == 'alpha' else 'in [0, 1)'}, "
                    f"got {value!r}."
                )
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        if (
            not isinstance(targets, Sequence)
            or not targets
            or not all(isinstance(target, str) and target for target in targets)
        ):
            raise UserError(
                f"lora_conf: targets must be one of {', '.join(_GROUPS)} or a list of module names "
                f"such as [q_proj, v_proj], got {self.targets!r}."
            )


def lora_options(conf: Optional[Mapping[str, Any]]) -> LoraOptions:
    """:class:`LoraOptions` from a configuration; unknown keys are a :class:`UserError`."""
    conf = {} if conf is None else conf
    if not isinstance(conf, Mapping):
        raise UserError(f"lora_conf must be a mapping such as {{r: 8}}, got {conf!r}.")
    refuse_unknown("lora_conf", conf, LoraOptions)
    return LoraOptions(**conf)


def lora_parameters(config: Any, options: LoraOptions) -> dict[str, torch.nn.Parameter]:
    """A and B of every adapted layer, float32, freshly initialised, without loading the LLM.

    Args:
        config: Of the LLM.
        options: Where and how large.

    Returns:
        By name, as in :func:`named_lora_parameters`.
    """
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    inject_lora(model, options)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.to_empty(device="cpu")
            module.lora_B.to_empty(device="cpu")
            module.reset_lora_parameters(_ADAPTER, True)
    return named_lora_parameters(model)


def inject_lora(model: Any, options: LoraOptions) -> None:
    """Adapt the layers of ``model`` in place; A and B are left on the meta device."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    targets = target_modules(model, options.targets)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=targets,
        # GPT-2 keeps its weights transposed
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        use_rslora=options.rslora,
        lora_dropout=options.dropout,
    )
    inject_adapter_in_model(config, model, _ADAPTER, low_cpu_mem_usage=True)


def named_lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """A and B by names that say nothing of peft's adapters, e.g. ``...q_proj.lora_A.weight``."""
    return {
        name.replace(f".{_ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def target_modules(model: Any, targets: Union[str, Sequence[str]]) -> list[str]:
    """Full names of the layers that ``targets`` (see :class:`LoraOptions`) selects.

    Raises:
        UserError: A name that no linear layer has, or the output layer of tied embeddings.
    """
    linear, attention = _linear_layers(model)
    if targets == "all-linear":
        return linear
    if targets == "attention" and attention:
        return attention
    names = [targets] if isinstance(targets, str) else list(targets)
    selected: list[str] = []
    for name in names:
        found = [layer for layer in linear if layer == name or layer.endswith(f".{name}")]
        if not found:
            candidates = sorted({layer.rpartition(".")[2] for layer in linear})
            raise UserError(
                f"lora_conf: target {name!r} matches {_mismatch(model, name)}; linear layers of "
                f"this LLM ({type(model).__name__}) are: {', '.join(candidates)}. Give some of "
                f"them, or {' or '.join(_GROUPS)}."
            )
        selected += [layer for layer in found if layer not in selected]
    return selected


def _linear_layers(model: Any) -> tuple[list[str], list[str]]:
    """Names of all linear layers but the output layer, and of those inside attention."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not model.get_output_embeddings()
    ]
    attention = []
    for name in linear:
        parts = name.split(".")
        ancestors = (modules[".".join(parts[:i])] for i in range(1, len(parts)))
        if any("attention" in type(module).__name__.lower() for module in ancestors):
            attention.append(name)
    return linear, attention


def _mismatch(model: Any, target: str) -> str:
    for name, module in model.named_modules():
        if name != target and not name.endswith(f".{target}"):
            continue
        if module is model.get_output_embeddings() or module is model.get_input_embeddings():
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            table = "an embedding table" + (
                ", one and the same at input and output (tie_word_embeddings), which LoRA at one "
                "of them would untie"
                if tied
                else ""
            )
            return f"{table} (set train_embeddings: true to train it)"
        return f"a {type(module).__name__}, which is not a linear layer"
    return "nothing"


def merge_lora(model: Any) -> None:
    """Add ``scaling * B A`` to the weights and put the plain layers back, in place.

    Raises:
        UserError: The merged weights are not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        try:
            module.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"LoRA of {name} cannot be merged ({error}).") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    # what transformers remembers of the adapters would be written beside the weights
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in model.__dict__:
            delattr(model, attribute)
