"""How attention layers of a Hugging Face LLM are made to read what an interface gives them.

B utterances, Q queries, K keys, H query heads, J key/value heads, D head dimension.

transformers hands the keyword arguments of a forward down to its attention function. Ours looks
for the argument ``speech``, a :class:`Reading`, and lets it attend; without it, it is SDPA.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Optional, Protocol

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError

NAME = "speech"  # of the attention function
ARGUMENT = "speech"  # of a model's forward


class Reading(Protocol):
    """What the attention layers of one forward read.

    Attributes:
        calls: Layers that have attended.
    """

    calls: int

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Optional[Tensor],
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Attention of a layer.

        Args:
            module: The layer's attention; has ``layer_idx``.
            query: (B, H, Q, D).
            key: Of the same positions (B, J, Q, D).
            value: As ``key``.
            mask: As given to the model.
            scaling: Of the scores.
            dropout: Of the weights.

        Returns:
            (B, Q, H, D).
        """
        ...


def sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], **options: Any
) -> Tensor:
    """SDPA as transformers calls it, causal without a mask: (B, Q, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    speech: Optional[Reading] = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    if speech is None:
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, **options), None
    speech.calls += 1
    scaling = options.get("scaling")
    if scaling is None:
        scaling = query.size(-1) ** -0.5
    return speech.attend(module, query, key, value, attention_mask, scaling, dropout), None


def install(model: Any) -> None:
    """Make ours the attention function of a model for good; without a reading it stays SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME


@contextmanager
def installed(model: Any) -> Iterator[None]:
    """Make ours the attention function for the duration of the block."""
    before = model.config._attn_implementation
    install(model)
    try:
        yield
    finally:
        model.config._attn_implementation = before


def check_read(model: Any, reading: Reading) -> None:
    """Refuse a model whose layers have not all attended through ``reading``."""
    layers = model.config.get_text_config().num_hidden_layers
    if reading.calls != layers:
        raise UserError(
            f"{type(model).__name__}: {reading.calls} of {layers} attention layers can be given "
            "the audio. Use an LLM of the LLaMA, Qwen, GPT-2 or OPT family."
        )


def why_no_reading(config: Any) -> Optional[str]:
    """Why a model's attention is more than a softmax over keys that a mask allows."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds):
        return f"attention windows of {window} tokens"
    if set(kinds or ()) - {"full_attention", "sliding_attention"}:
        return f"layers {', '.join(sorted(set(kinds) - {'full_attention'}))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "soft-capped attention"
    return None


class Plain:
    """A reading that attends as if it were not there."""

    def __init__(self) -> None:
        self.calls = 0

    def attend(self, module, query, key, value, mask, scaling, dropout):
        return sdpa(module, query, key, value, mask, scaling=scaling, dropout=dropout)


class Weighing:
    """A reading that measures how much attention some queries give to some keys.

    Args:
        queries: (B, Q) bool, whose attention counts.
        keys: (B, K) bool, the attention to which counts.
        before: Per layer keys and values (B, J, K - Q, D) that come before the layer's own.

    Attributes:
        mass: Per layer (B,), mean over heads and queries of the sum over keys.
    """

    def __init__(self, queries: Tensor, keys: Tensor, before: Optional[list] = None):
        self.calls = 0
        self.queries, self.keys, self.before = queries, keys, before
        self.mass: list[Tensor] = []

    def attend(self, module, query, key, value, mask, scaling, dropout):
        if self.before is not None:
            first_key, first_value = self.before[module.layer_idx]
            key, value = torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2)
        groups = query.size(1) // key.size(1)
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).float()
        if mask is None:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        counted = torch.einsum("bhqk,bk->bhq", weights, self.keys.to(weights)).mean(dim=1)
        number = self.queries.sum(dim=1).clamp(min=1)
        self.mass.append((counted * self.queries).sum(dim=1) / number)
        return (weights.to(value.dtype) @ value).transpose(1, 2)
