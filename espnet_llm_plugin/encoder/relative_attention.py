"""Relative-position attention (Transformer-XL, arXiv 1901.02860, section 3.3) of blocks.

B * N blocks, S frames of a block, L of left context, P = L + S frames it attends to, D width,
H heads, E = P + S - 1 distances between a query and a key.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.encoder.blocks import Layout

# On import it tells standard output that flash-attn is missing, where transcripts may be expected.
_attention = import_quietly("espnet.nets.pytorch_backend.transformer.attention")


class Attended(NamedTuple):
    """Output (B, N, S, D) and the keys and values of the left context to come (B, L, 2 D)."""

    output: Tensor
    past: Tensor


class BlockRelPositionAttention(_attention.RelPositionMultiHeadedAttention):
    """ESPnet's attention ``rel_selfattn`` (``rel_pos_type: latest``), for blocks with a past.

    Same parameters and, for one block without a past, the same result.
    """

    def forward(self, blocks: Tensor, layout: Layout, past: Tensor, distances: Tensor) -> Attended:
        """Attend within the blocks and to their left contexts.

        Args:
            blocks: (B, N, S, D).
            layout: what lies where.
            past: (B, L, 2 D) keys and values before the first block.
            distances: (E, D) from :func:`embed_distances`.
        """
        own = torch.cat([self.linear_k(blocks), self.linear_v(blocks)], -1)
        seen, past = layout.with_past(own, past)
        query = self._split_heads(self.linear_q(blocks))
        key, value = (self._split_heads(x) for x in seen.chunk(2, dim=-1))
        positions = self.linear_pos(distances).view(-1, self.h, self.d_k).permute(1, 2, 0)
        by_distance = (query + self.pos_bias_v[:, None]) @ positions  # (B * N, H, S, E)
        bias = distances_to_keys(by_distance, key.size(2)) / math.sqrt(self.d_k)
        valid = layout.valid_keys.flatten(0, 1)[:, None, None]
        attended = scaled_dot_product_attention(
            query + self.pos_bias_u[:, None],
            key,
            value,
            attn_mask=bias.masked_fill(~valid, float("-inf")),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return Attended(self.linear_out(attended.transpose(1, 2).flatten(2)).view_as(blocks), past)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, P, D) -> (B * N, H, P, D / H)."""
        return x.flatten(0, 1).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)


def distances_to_keys(by_distance: Tensor, num_keys: int) -> Tensor:
    """Sort scores by distance (..., S, E) into scores by key (..., S, P).

    Of query i the distance to key j stands at S - 1 - i + j: each row is shifted one further than
    the one below it, which is a matter of reading the padded rows with another row length.
    """
    *batch, num_queries, num_distances = by_distance.shape
    padded = pad(by_distance, (1, 0)).reshape(*batch, num_distances + 1, num_queries)
    return padded[..., 1:, :].reshape(*batch, num_queries, num_distances)[..., :num_keys]


def embed_distances(num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    """Sinusoids (E, D) of the distances from a query back to a key, longest first.

    The queries are the last ``num_queries`` of the ``num_keys`` frames that keys stand for:
    distances from num_keys - 1 down to -(num_queries - 1). Width, device and dtype as ``like``.
    """
    dim = like.size(-1)
    distances = torch.arange(
        num_keys - 1, -num_queries, -1, device=like.device, dtype=torch.float32
    )
    rates = torch.exp(
        torch.arange(0, dim, 2, device=like.device, dtype=torch.float32)
        * -(math.log(10000.0) / dim)
    )
    angles = distances[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim].to(like.dtype)
