"""Putting ragged parts (prompt, audio, text) side by side.

B utterances, L columns, D width.
"""

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError

PADDINGS = ("right", "left")


class Composed(NamedTuple):
    """Parts side by side, without padding between them."""

    embeddings: Tensor  # (B, L, D)
    lengths: Tensor  # (B,) of all parts together
    starts: list[Tensor]  # columns (B,) where the parts begin
    first: Tensor  # columns (B,) where the utterances begin: 0 if padded on the right

    @property
    def positions(self) -> Tensor:
        """(B, L), 0 in the padding on the left."""
        columns = torch.arange(self.embeddings.size(1), device=self.first.device)
        return (columns - self.first[:, None]).clamp(min=0)

    def span(self, part: int, lengths: Tensor, extra: int = 0) -> Tensor:
        """Columns of a part of ``lengths`` (B,), and ``extra`` before it: (B, L) bool."""
        columns = torch.arange(self.embeddings.size(1), device=self.first.device)
        start = self.starts[part][:, None]
        return (columns >= start - extra) & (columns < start + lengths[:, None])


def compose(parts: Sequence[tuple[Tensor, Tensor]], padding: str = "right") -> Composed:
    """Parts (B, L', D) of lengths (B,), each padded on the right -> side by side."""
    embeddings = torch.cat([part for part, _ in parts], dim=1)
    lengths = torch.stack([length for _, length in parts])
    total = lengths.sum(dim=0)
    longest = int(total.max())
    valid = torch.cat([length_mask(length, part.size(1)) for part, length in parts], dim=1)
    if not bool(valid.all()):
        # the columns of each part stay in order, those of the padding go to the end
        order = (~valid).byte().argsort(dim=1, stable=True)[:, :longest]
        first = torch.zeros_like(total)
        if padding == "left":
            first = longest - total
            columns = torch.arange(longest, device=total.device)
            order = order.gather(1, (columns - first[:, None]) % longest)
        embeddings = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.size(2)))
    else:
        first = torch.zeros_like(total)
    starts = first + lengths.cumsum(dim=0) - lengths
    return Composed(embeddings, total, list(starts), first)


def take(outputs: Tensor, starts: Tensor, length: int) -> Tensor:
    """``length`` columns of outputs (B, L, D) from ``starts`` (B,) on: (B, length, D).

    Beyond the end of an utterance they are whatever there is.
    """
    columns = torch.arange(length, device=starts.device) + starts[:, None]
    columns = columns.clamp(max=max(outputs.size(1) - 1, 0))
    return outputs.gather(1, columns[..., None].expand(-1, -1, outputs.size(2)))


def length_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B, longest) bool: what is within the lengths (B,)."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def check_length(longest: int, context: int | None, what: str) -> None:
    """Refuse more positions than the LLM can see."""
    if context is not None and longest > context:
        raise UserError(
            f"{what} take {longest} positions of the LLM, which sees {context}. Stack more frames "
            "(adapter_conf), shorten the prompt, or use shorter segments (training: filter long "
            "utterances; decoding: bin.asr_inference cuts long audio)."
        )
