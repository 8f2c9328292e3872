"""The parts of a Hugging Face causal LM that an interface calls.

B rows, L positions, D width of the embeddings, V output rows.
"""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.attention import ARGUMENT, NAME, Reading, why_no_reading


def llm_outputs(
    model: Any,
    embeddings: Tensor,
    *,
    mask: Optional[Tensor] = None,
    positions: Optional[Tensor] = None,
    reading: Optional[Reading] = None,
) -> Tensor:
    """Outputs (B, L, .) of the last layer, before the output layer.

    Args:
        model: The causal LM.
        embeddings: Its input (B, L, D).
        mask: Keys that each query may see (B or 1, 1, L, K) bool; None: those not after it.
        positions: (B, L); None: 0 ... L - 1.
        reading: What the attention layers read.

    Raises:
        UserError: The LLM's attention function takes no such mask.
    """
    kernel = model.config._attn_implementation
    if mask is not None and kernel == "eager":
        least = torch.finfo(embeddings.dtype).min
        mask = torch.zeros_like(mask, dtype=embeddings.dtype).masked_fill_(~mask, least)
    elif mask is not None and kernel not in ("sdpa", NAME):
        raise UserError(
            f"attn_implementation {kernel!r} knows no masks like this one: use `sdpa`, or the "
            "interface `prefix` with a causal mask and padding on the right."
        )
    options = {"attention_mask": mask, "position_ids": positions, ARGUMENT: reading}
    given = {name: value for name, value in options.items() if value is not None}
    output = model.base_model(inputs_embeds=embeddings, use_cache=False, **given)
    return output.last_hidden_state


def llm_logits(model: Any, outputs: Tensor) -> Tensor:
    """Logits (..., V) of outputs (..., .), as the causal LM makes them."""
    logits = model.get_output_embeddings()(outputs)
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if cap:
        logits = (logits / cap).tanh() * cap
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    return logits


class Layer(NamedTuple):
    """Of an LLM."""

    whole: torch.nn.Module
    norm: torch.nn.Module  # of the input of ``attention``
    attention: torch.nn.Module


_ROTARY = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*_ROTARY, "gpt2", "opt")


# What can be done about :func:`why_no_layers`.
ALTERNATIVE = "use `interface: prefix`, which takes any causal LM"


def why_no_layers(config: Any) -> Optional[str]:
    """Why an interface that needs the layers of an LLM cannot have them; None: it can."""
    if config.model_type not in FAMILIES:
        return f"the model type {config.model_type}, not one of {', '.join(FAMILIES)}"
    return why_no_reading(config)


def llm_layers(model: Any) -> list[Layer]:
    """The layers of an LLM of one of ``FAMILIES``."""
    config, base = model.config, model.base_model
    if config.model_type == "gpt2":
        return [Layer(layer, layer.ln_1, layer.attn) for layer in base.h]
    if config.model_type == "opt":
        first = torch.nn.Identity()
        return [
            Layer(
                layer,
                layer.self_attn_layer_norm if config.do_layer_norm_before else first,
                layer.self_attn,
            )
            for layer in base.decoder.layers
        ]
    return [Layer(layer, layer.input_layernorm, layer.self_attn) for layer in base.layers]


def layer_input(model: Any, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, dict]:
    """What the first layer gets of embeddings (B, L, D) at positions (B, L), and what its attention
    needs to know of the positions."""
    base = model.base_model
    if model.config.model_type == "gpt2":
        return embeddings + base.wpe(positions), {}
    if model.config.model_type == "opt":
        decoder = base.decoder
        if decoder.project_in is not None:
            embeddings = decoder.project_in(embeddings)
        return embeddings + decoder.embed_positions(None, position_ids=positions), {}
    return embeddings, {"position_embeddings": base.rotary_emb(embeddings, positions)}
