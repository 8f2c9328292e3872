"""Prefix, sentence begin, text in one row each, and what a causal LM makes of them.

B: sentences, U: tokens of the longest text, P: of the longest prefix, L: of the longest row
(prefix, sos, text), V: vocabulary, D: width of the LLM.
"""

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch

from espnet_llm_plugin.llm.copy_noise import BLANK, NoisyPrefix

IGNORED = -100
_MASKED = -1.0e9


@dataclass
class CopyBatch:
    """Rows for a causal LM, without gaps, padded on the right with 0.

    Attributes:
        ids: Prefix, sos, text (B, L).
        targets: Text and eos at the positions from sos on, elsewhere -100 (B, L).
        in_prefix: Whether a position belongs to the prefix (B, L).
        noise: Standard deviation of the noise on the prefix's embeddings (B,), in units of their
            root mean square.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    in_prefix: torch.Tensor
    noise: torch.Tensor


@dataclass
class CopyScore:
    """Of the targets of a batch: mean negative log-likelihood, share of right ones, number."""

    nll: torch.Tensor
    accuracy: torch.Tensor
    tokens: torch.Tensor


def copy_batch(
    prefix: NoisyPrefix, text: torch.Tensor, lengths: torch.Tensor, sos: int
) -> CopyBatch:
    """Join B prefixes and texts.

    Args:
        prefix: Any of its lengths may be 0.
        text: (B, U), padded on the right.
        lengths: (B,).
        sos: Begins the text, and as eos ends it.

    Returns:
        On the device of ``text``.
    """
    device = text.device
    lengths = lengths.to(device)
    size = text.shape[0]

    def below(count: int, bound: torch.Tensor) -> torch.Tensor:
        return torch.arange(count, device=device) < bound.to(device)[:, None]

    in_prefix = below(prefix.ids.shape[1], prefix.lengths)
    following = torch.cat([text, text.new_zeros(size, 1)], dim=1)
    following[torch.arange(size, device=device), lengths] = sos  # as eos
    begin = torch.full_like(text[:, :1], sos)
    source = torch.cat([prefix.ids.to(device), begin, text], dim=1)
    target = torch.cat([torch.full_like(in_prefix, IGNORED, dtype=text.dtype), following], dim=1)
    real = torch.cat([in_prefix, below(following.shape[1], lengths + 1)], dim=1)
    totals = real.sum(dim=1)
    filled = below(int(totals.max()), totals)
    ids = source.new_zeros(filled.shape)
    ids[filled] = source[real]
    targets = torch.full_like(ids, IGNORED)
    targets[filled] = target[real]
    return CopyBatch(ids, targets, below(filled.shape[1], prefix.lengths), prefix.noise.to(device))


def copy_score(
    model: Any,
    prefix: Optional[NoisyPrefix],
    text: torch.Tensor,
    lengths: torch.Tensor,
    generator: Optional[torch.Generator] = None,
) -> CopyScore:
    """Score texts under a causal LM, each after its prefix.

    A prefix that does not fit into the LLM's context together with its text is left out.

    Args:
        model: Hugging Face causal LM over an ASR token list.
        prefix: Of B sentences, or ``None``: no prefixes.
        text: Token ids (B, U), padded on the right.
        lengths: (B,).
        generator: Of the CPU, for the noise on embeddings; the global one if ``None``.
    """
    config = model.config.get_text_config()
    if prefix is None:
        none = torch.zeros(len(text), dtype=torch.long)
        prefix = NoisyPrefix(text.new_zeros(len(text), 0), none, none.float())
    batch = copy_batch(
        fitting(prefix, lengths, getattr(config, "max_position_embeddings", None)),
        text,
        lengths,
        sos=config.vocab_size - 1,
    )
    embeddings = model.get_input_embeddings()(batch.ids)  # (B, L, D)
    if bool((batch.noise > 0).any()) and bool(batch.in_prefix.any()):
        scale = embeddings.detach()[batch.in_prefix].float().pow(2).mean().sqrt()
        gaussian = torch.randn(embeddings.shape, generator=generator).to(embeddings)
        amount = batch.in_prefix * (batch.noise * scale)[:, None]  # (B, L)
        embeddings = embeddings + gaussian * amount[..., None].to(embeddings)
    # Causality hides the padding; the mask is given because OPT counts positions in it.
    logits = model(
        inputs_embeds=embeddings, attention_mask=torch.ones_like(batch.ids), use_cache=False
    ).logits
    is_target = batch.targets != IGNORED
    # Only the rows of the text: the prefix is several times as long
    logits, targets = logits[is_target].float(), batch.targets[is_target]
    logits = logits.index_fill(-1, torch.tensor([BLANK], device=logits.device), _MASKED)
    return CopyScore(
        nll=torch.nn.functional.cross_entropy(logits, targets),
        accuracy=(logits.detach().argmax(-1) == targets).float().mean(),
        tokens=is_target.sum(),
    )


def fitting(prefix: NoisyPrefix, lengths: torch.Tensor, context: Optional[int]) -> NoisyPrefix:
    """The prefixes that leave room for sos and text within ``context`` positions.

    The others get length 0. ``None`` is a model without a limit.
    """
    if context is None:
        return prefix
    fits = prefix.lengths + 1 + lengths.cpu() <= context
    return replace(prefix, lengths=prefix.lengths * fits)
