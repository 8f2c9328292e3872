"""Sample texts from a causal LM, in batches.

B texts of a batch, L tokens of the longest.
"""

from typing import Any, Iterator, NamedTuple, Optional

import torch

from espnet_llm_plugin.errors import UserError


class Sample(NamedTuple):
    """A text, and whether the model ended it itself (else its last words may be cut)."""

    text: str
    complete: bool


def sample_batches(
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    temperature: float = 0.8,
    max_tokens: int = 380,
    batch_size: int = 256,
    first: int = 0,
) -> Iterator[list[Sample]]:
    """Sample from the whole distribution, for ever; batch ``n`` depends on ``seed`` and ``n`` only.

    A text begins after the beginning-of-sentence token and ends where the model produces that
    token again (as llama2.c's models do between stories) or its end-of-sentence token.

    Args:
        model: Causal LM of ``transformers``.
        tokenizer: Its tokenizer.
        seed: Any integer >= 0.
        temperature: Of the softmax; lower is plainer and more repetitive.
        max_tokens: Longest text in tokens; bounded by the model's context.
        batch_size: B.
        first: Number of the first batch, to continue a run.

    Yields:
        B samples.

    Raises:
        UserError: A temperature or length that is not positive; a tokenizer without beginning of
            sentence.
    """
    if temperature <= 0:
        raise UserError(f"the temperature must be positive, not {temperature:g}")
    if max_tokens < 1 or batch_size < 1:
        raise UserError(
            f"max_tokens and batch_size must be at least 1, not {max_tokens} and {batch_size}"
        )
    bos = tokenizer.bos_token_id
    if bos is None:
        raise UserError("the LLM's tokenizer has no beginning-of-sentence token to start from")
    ends = sorted({bos, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max_tokens if context is None else min(max_tokens, context - 1)
    start = torch.full((batch_size, 1), bos, device=model.device)
    batch = first
    while True:
        rows = _generate(model, start, ends, longest, temperature, _seed_of(seed, batch))
        yield [_sample(tokenizer, row, ends) for row in rows.tolist()]
        batch += 1


def _seed_of(seed: int, batch: int) -> int:
    """Neighbouring seeds must not share batches."""
    return (seed * 1_000_003 + batch) % 2**63


@torch.no_grad()
def _generate(
    model: Any, start: torch.Tensor, ends: list[int], longest: int, temperature: float, seed: int
) -> torch.Tensor:
    """(B, L) token ids after ``start``, filled up with an end token."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        eos_token_id=ends,
        bos_token_id=ends[0],
        pad_token_id=ends[0],
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        mask = torch.ones_like(start)
        return model.generate(start, attention_mask=mask, generation_config=settings)[:, 1:]


def _sample(tokenizer: Any, ids: list[int], ends: list[int]) -> Sample:
    stop: Optional[int] = next((n for n, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return Sample(text, complete=stop is not None)
