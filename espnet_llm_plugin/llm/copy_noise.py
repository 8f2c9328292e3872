"""Noisy copies of token sequences: what a language model learns to copy from.

B: sentences, U: tokens of the longest, P: positions of the longest prefix, V: vocabulary, with
``<blank>`` 0, ``<unk>`` 1 and ``<sos/eos>`` V-1.
"""

from dataclasses import dataclass, fields
from typing import Optional

import torch

from espnet_llm_plugin.errors import UserError

BLANK = 0
_FIRST_PIECE = 2


@dataclass(frozen=True)
class CopyNoise:
    """What happens to a sentence on its way into the prefix.

    It imitates the frames of a speech encoder: wrong, missing and superfluous pieces, pieces that
    last for several frames, blank frames between them, and vectors beside those of the table.

    Attributes:
        drop: Probability that a piece is left out.
        replace: Probability that a piece is replaced by a random one.
        insert: Probability that a random piece follows a piece.
        max_repeats: A piece stands 1 to so many times in a row.
        max_blanks: 0 to so many blanks follow a piece.
        embedding_noise: Standard deviation of Gaussian noise on the embeddings of the prefix, in
            units of their root mean square.
    """

    drop: float = 0.05
    replace: float = 0.1
    insert: float = 0.05
    max_repeats: int = 2
    max_blanks: int = 3
    embedding_noise: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            low = 1 if field.name == "max_repeats" else 0
            high = 1 if field.name in ("drop", "replace", "insert") else None
            if value < low or (high is not None and value > high):
                expected = f"{low} to {high}" if high is not None else f"at least {low}"
                raise UserError(f"copy noise: {field.name} is {value}; expected {expected}.")


@dataclass
class NoisyPrefix:
    """Noisy copies of B sentences.

    Attributes:
        ids: Pieces and blanks (B, P), padded on the right with blank.
        lengths: (B,), 0 where every piece was left out.
        noise: Standard deviation of the embeddings' noise (B,), in units of their root mean square.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    noise: torch.Tensor


def noisy_prefix(
    text: torch.Tensor,
    lengths: torch.Tensor,
    noise: CopyNoise,
    vocab_size: int,
    *,
    full: bool = False,
    generator: Optional[torch.Generator] = None,
) -> NoisyPrefix:
    """Draw one noisy copy of each sentence, on the CPU.

    Of each sentence two numbers between 0 and 1 are drawn: one multiplies the probabilities of
    errors and the embeddings' noise, the other the largest numbers of repetitions and blanks, so
    that clean and noisy, dense and sparse prefixes are learnt.

    Args:
        text: Token ids (B, U), padded on the right.
        lengths: (B,).
        noise: Its bounds.
        vocab_size: V.
        full: Both numbers are 1 instead.
        generator: Of the CPU; the global one if ``None``.
    """
    text, lengths = text.cpu(), lengths.cpu()
    size, longest = text.shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    errors, pace = torch.ones(2, size, 1) if full else draw(2, size, 1)
    real = torch.arange(longest) < lengths[:, None]
    kept = real & (draw(size, longest) >= noise.drop * errors)
    replaced = draw(size, longest) < noise.replace * errors
    inserted = real & (draw(size, longest) < noise.insert * errors)
    piece = torch.where(replaced, random_pieces((size, longest), vocab_size, generator), text)
    other = random_pieces((size, longest), vocab_size, generator)
    repeats = 1 + (draw(size, longest) * (1 + pace * (noise.max_repeats - 1))).long()
    blanks = (draw(size, longest) * (1 + pace * noise.max_blanks)).long()
    # Of every piece: itself, what is inserted after it, blanks; each so many times.
    ids = torch.stack([piece, other, torch.full_like(text, BLANK)], dim=-1).reshape(size, -1)
    counts = torch.stack([repeats * kept, inserted, blanks * real], dim=-1).reshape(size, -1)
    totals = counts.sum(dim=1)
    prefix = torch.full((size, int(totals.max())), BLANK)
    prefix[torch.arange(prefix.shape[1]) < totals[:, None]] = ids.flatten().repeat_interleave(
        counts.flatten()
    )
    return NoisyPrefix(prefix, totals, noise.embedding_noise * errors[:, 0])


def random_pieces(
    shape: tuple[int, ...], vocab_size: int, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """Ids of ``shape``, neither blank nor unknown nor end of sentence, all alike."""
    return torch.randint(_FIRST_PIECE, vocab_size - 1, shape, generator=generator)
