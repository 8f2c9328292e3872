"""From the width of (stacked) encoder frames to that of the LLM, on the scale of its embeddings.

F input width, D width of the LLM.
"""

from typing import Optional

import torch

from espnet_llm_plugin.errors import UserError

PROJECTIONS = ("linear", "mlp")


def make_projection(
    kind: str,
    input_size: int,
    output_size: int,
    units: Optional[int] = None,
    dropout_rate: float = 0.0,
) -> torch.nn.Module:
    """Module (..., F) -> (..., D).

    Args:
        kind: ``linear``: one layer (arXiv 2307.11795, 2603.15045). ``mlp``: two with a GELU
            between them.
        input_size: F.
        output_size: D.
        units: Width between the two layers; D if not given.
        dropout_rate: Before the last layer.

    Raises:
        UserError: Unknown kind, or ``units`` for a linear layer.
    """
    if kind not in PROJECTIONS:
        raise UserError(
            f"unknown projection {kind!r} of an adapter; choose one of: {', '.join(PROJECTIONS)}"
        )
    dropout = torch.nn.Dropout(dropout_rate)
    if kind == "linear":
        if units is not None:
            raise UserError(
                f"projection_units ({units}) is for `projection: mlp`; a linear projection has no "
                "layer between input and output"
            )
        return torch.nn.Sequential(dropout, torch.nn.Linear(input_size, output_size))
    units = units or output_size
    return torch.nn.Sequential(
        torch.nn.Linear(input_size, units),
        torch.nn.GELU(),
        dropout,
        torch.nn.Linear(units, output_size),
    )


class TextScale(torch.nn.RMSNorm):
    """RMS normalisation that starts on the scale of the LLM's text embeddings.

    A fresh projection gives vectors of another size than the embeddings that the first layer of
    the LLM was trained on (these may be ten times smaller than 1). The scale is a parameter, one
    value per dimension.

    Args:
        size: D.
        text_scale: Root mean square of the text embeddings' entries.

    Raises:
        UserError: No positive ``text_scale``.
    """

    def __init__(self, size: int, text_scale: Optional[float]):
        if text_scale is None or not text_scale > 0.0:
            raise UserError(
                f"the scale of the LLM's text embeddings must be a positive number, got "
                f"{text_scale!r}: their root mean square is needed to match it"
            )
        super().__init__(size, eps=1e-6)
        torch.nn.init.constant_(self.weight, text_scale)
