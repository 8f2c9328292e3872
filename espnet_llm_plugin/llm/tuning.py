"""The LLM of a speech model: frozen, with LoRA, or trained in full; only what is trained is saved.

B: batch, L: tokens, D: width of the embeddings, V: rows of the output layer.
"""

import copy
import logging
from typing import Any, Iterator, Mapping, Optional, Union

import torch
from torch import Tensor

from espnet_llm_plugin.compat import enable_gradient_checkpointing
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import backbone
from espnet_llm_plugin.llm.backbone import FrozenLLM, LLMIdentity
from espnet_llm_plugin.llm.context import context_of
from espnet_llm_plugin.llm.lora import (
    inject_lora,
    lora_options,
    lora_parameters,
    merge_lora,
    named_lora_parameters,
)

TUNINGS = ("frozen", "lora", "full")


class TunedLLM(torch.nn.Module):
    """A causal LM of which some parameters are trained and the rest is neither saved nor counted.

    [Prompting Large Language Models with Speech Recognition Abilities, arXiv 2307.11795: frozen
    and LoRA; LLMs and Speech: Integration vs. Combination, arXiv 2603.15045: full]

    The Hugging Face model is held outside of the module tree. Registered here, under the names of
    the LLM (``weights.model.layers.0.self_attn.q_proj.lora_A.weight``), are its trained parameters
    alone, so that ``parameters()``, ``state_dict()``, DDP and ESPnet's averaging see nothing else;
    and the identity of the LLM (:class:`LLMIdentity`), which is checked at load. Trained
    parameters are float32 whatever ``dtype`` is. What is not trained is loaded at the first
    :meth:`model` (never in ESPnet's ``collect_stats``), and shared by copies.

    Training part of the LLM only after some updates, or with another learning rate, is the
    optimizer's business: :mod:`espnet_llm_plugin.optimizers`.

    Args:
        llm: Directory or hub id.
        tuning: ``frozen``, ``lora`` (see ``lora_conf``) or ``full``.
        lora_conf: Options of LoRA, see :class:`espnet_llm_plugin.llm.lora.LoraOptions`.
        train_embeddings: Train the embeddings of input and output. By default with ``full`` alone.
        dtype: Of the frozen weights and the computation: ``float32``, ``bfloat16``, ``float16``
            or ``auto`` (as stored). If the LLM's own weights are trained, ``float32``.
        gradient_checkpointing: Trade compute for memory in training.
        attn_implementation: ``sdpa``, or any name that transformers knows.

    Raises:
        UserError: A wrong option or combination, LoRA targets that match nothing, an unusable LLM;
            at load also a missing tensor or another LLM than recorded.
    """

    def __init__(
        self,
        llm: str,
        tuning: str = "lora",
        lora_conf: Optional[Mapping[str, Any]] = None,
        train_embeddings: Optional[bool] = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        if tuning not in TUNINGS:
            raise UserError(
                f"unknown tuning {tuning!r}; expected one of {', '.join(TUNINGS)}. (Two stages: "
                "`optim: adamw_groups` with freeze_updates of the group decoder.llm.)"
            )
        if lora_conf is not None and tuning != "lora":
            raise UserError(f"lora_conf is for `tuning: lora`, got `tuning: {tuning}`.")
        self.tuning = tuning
        self.train_embeddings = tuning == "full" if train_embeddings is None else train_embeddings
        if dtype != "float32" and (tuning == "full" or self.train_embeddings):
            raise UserError(
                f"dtype {dtype} is for weights that are not trained; with `tuning: full` or "
                "`train_embeddings: true` leave it at float32 and set ESPnet's `use_amp: true`."
            )
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.source = FrozenLLM(llm, dtype=dtype)
        self.identity = LLMIdentity(self.source)
        self.weights = torch.nn.Module()
        self._loaded: tuple[Any, ...] = ()  # in a tuple: no module of this one
        self._placed: Optional[torch.device] = None
        self._to_merge = self._merged = False
        self._lora = lora_options(lora_conf) if tuning == "lora" else None
        if self._lora is not None:
            for name, parameter in lora_parameters(self.config, self._lora).items():
                _register(self.weights, name, parameter)
        if tuning == "full" or self.train_embeddings:
            for name, parameter in self._trained_base_parameters(self._load()).items():
                _register(self.weights, name, parameter)
            self._connect()

    @property
    def config(self) -> Any:
        """The LLM's configuration."""
        return self.source.config

    @property
    def hidden_size(self) -> int:
        """D, the width of what :meth:`embed` returns and ``inputs_embeds`` takes."""
        config = self.config.get_text_config()
        # OPT-350M projects its narrower embeddings to the width of its layers
        return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V; may exceed the number of tokens of the tokenizer."""
        return self.source.vocab_size

    @property
    def context(self) -> Optional[int]:
        """Tokens that the LLM can see; ``None``: any number."""
        return context_of(self)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return bool(self._loaded)

    def model(self, device: Union[str, torch.device] = "cpu") -> Any:
        """The Hugging Face causal LM on ``device``, in the mode (training or not) of this module.

        Its trained parameters are those registered here. Loads the weights at the first call.
        """
        device = torch.device(device)
        if not self._loaded or self._placed != device or self._to_merge != self._merged:
            # the first call may be one of decoding: the weights must remain fit for training
            with torch.inference_mode(False), torch.no_grad():
                self._prepare(device)
        return self._loaded[0]

    def merge(self) -> None:
        """Make LoRA part of the weights in memory: decoding then costs that of the plain LLM.

        ``state_dict()`` is as before. Training is not possible any more; copies made before are not
        concerned.
        """
        self.eval()
        self._to_merge = self._lora is not None

    def _prepare(self, device: torch.device) -> None:
        if not self._loaded:
            self._load()
            self._connect()
        (model,) = self._loaded
        model.to(device)
        self._placed = device
        if self._to_merge and not self._merged:
            merge_lora(model)
            self._merged = True

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., D), fit for ``inputs_embeds``."""
        return self.model(ids.device).get_input_embeddings()(ids)

    def _load(self) -> Any:
        logging.info("loading LLM %s (%s)", self.source.name, self.source.dtype)
        model = backbone.load_causal_lm(
            self.source.directory,
            dtype=self.source.dtype,
            attn_implementation=self.attn_implementation,
        )
        if self._lora is not None:
            inject_lora(model, self._lora)
        if self.gradient_checkpointing:
            try:
                enable_gradient_checkpointing(model)
            except ValueError as error:
                raise UserError(
                    f"LLM {self.source.name} has no gradient checkpointing ({error}); set "
                    "`gradient_checkpointing: false`."
                ) from error
        self._loaded, self._placed = (model,), None
        return model

    def _trained_base_parameters(self, model: Any) -> dict[str, torch.nn.Parameter]:
        tables = {
            id(parameter)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
            if module is not None
            for parameter in module.parameters()
        }
        return {
            name: torch.nn.Parameter(parameter.detach())
            for name, parameter in model.named_parameters()
            if (self.train_embeddings if id(parameter) in tables else self.tuning == "full")
        }

    def _connect(self) -> None:
        """Make the registered parameters those of the Hugging Face model."""
        if self._merged:
            return
        (model,) = self._loaded
        own = dict(model.named_parameters()) | named_lora_parameters(model)
        new = {id(own[name]): parameter for name, parameter in self.weights.named_parameters()}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                # tied tables are one parameter in two modules
                if parameter is not None and id(parameter) in new:
                    module._parameters[name] = new[id(parameter)]
        self._set_mode()

    def _set_mode(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        (model,) = self._loaded
        # dropout of the LLM's own is for an LLM that is trained
        model.train(self.training and self.tuning != "frozen")
        if self.gradient_checkpointing and self.training:
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def train(self, mode: bool = True) -> "TunedLLM":
        if mode and self._to_merge:
            raise RuntimeError("an LLM whose LoRA is merged for decoding cannot be trained")
        super().train(mode)
        if self._loaded:
            self._set_mode()
        return self

    def _apply(self, fn, recurse: bool = True) -> "TunedLLM":
        super()._apply(fn, recurse)
        self._placed = None
        if self._loaded:
            self._connect()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # ESPnet loads with strict=False, under which a wrong file would load in silence.
        own = {prefix + f"weights.{n}": p for n, p in self.weights.named_parameters()}
        missing = [name for name in own if name not in state_dict]
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} of the {len(own)} trained tensors of the LLM "
                f"(tuning: {self.tuning}), e.g. {', '.join(missing[:3])}; it is of another model."
            )
        unknown = [
            name for name in state_dict if name.startswith(f"{prefix}weights.") and name not in own
        ]
        if unknown:
            raise UserError(
                f"the checkpoint has {len(unknown)} tensors of the LLM that are not trained here "
                f"(tuning: {self.tuning}), e.g. {', '.join(unknown[:3])}; it is of another model."
            )
        for name, parameter in own.items():
            shape = tuple(state_dict[name].shape)
            if shape != tuple(parameter.shape):
                raise UserError(
                    f"the checkpoint's {name} is of shape {shape}, expected "
                    f"{tuple(parameter.shape)}; it is of another model."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._merged:  # with what was there before
            self._loaded, self._merged = (), False

    def _frozen_tensors(self) -> Iterator[Tensor]:
        trained = {id(parameter) for parameter in self.weights.parameters()}
        for model in self._loaded:
            for tensor in (*model.parameters(), *model.buffers()):
                if id(tensor) not in trained:
                    yield tensor

    def __deepcopy__(self, memo: dict) -> "TunedLLM":
        for tensor in self._frozen_tensors():
            # the same memory, until one of the two goes to another device
            shared = tensor.detach()
            if isinstance(tensor, torch.nn.Parameter):
                shared = torch.nn.Parameter(shared, requires_grad=False)
            memo[id(tensor)] = shared
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": (), "_placed": None, "_merged": False}

    def extra_repr(self) -> str:
        return f"{self.source.name}, tuning={self.tuning}, dtype={self.source.dtype}"


def _register(root: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Register ``parameter`` under a dotted name, with empty modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]
    root.register_parameter(last, parameter)
