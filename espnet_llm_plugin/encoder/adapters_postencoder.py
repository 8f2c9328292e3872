"""Frame stacking as an ESPnet post-encoder, for any model: CTC, transducer or decoder after it."""

from typing import Any, Mapping, Optional

from espnet2.asr.postencoder.abs_postencoder import AbsPostEncoder
from torch import Tensor

from espnet_llm_plugin.encoder.adapters import FrameStackingAdapter
from espnet_llm_plugin.options import refuse_unknown


class FrameStackingPostEncoder(AbsPostEncoder):
    """``n`` encoder frames side by side, projected; see :class:`FrameStackingAdapter`.

    Everything after it, CTC included, runs at the lower rate: for an adapter between an encoder
    with CTC and an LLM use the speech LLM's own ``adapter`` instead.

    Args:
        input_size: E, width of the encoder.
        output_size: D; E if not given.
        stack: n.
        projection: ``linear`` or ``mlp``.
        projection_units: width within the MLP; D if not given.
        dropout_rate: before the projection's last layer.
        extra_layers: new encoder layers before the stacking.
        extra_layers_conf: see :class:`ExtraLayers`.
        unknown: refused.

    Raises:
        UserError: unknown option or one out of range.
    """

    def __init__(
        self,
        input_size: int,
        output_size: Optional[int] = None,
        stack: int = 2,
        projection: str = "linear",
        projection_units: Optional[int] = None,
        dropout_rate: float = 0.0,
        extra_layers: int = 0,
        extra_layers_conf: Optional[Mapping[str, Any]] = None,
        **unknown: Any,
    ):
        refuse_unknown("postencoder_conf", unknown, type(self), ("input_size",))
        super().__init__()
        self.adapter = FrameStackingAdapter(
            input_size,
            output_size or input_size,
            stack=stack,
            projection=projection,
            projection_units=projection_units,
            dropout_rate=dropout_rate,
            extra_layers=extra_layers,
            extra_layers_conf=extra_layers_conf,
        )

    def output_size(self) -> int:
        return self.adapter.hidden_size

    def forward(self, input: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, E), (B,) -> (B, ceil(longest / n), D), (B,) ceil(length / n)."""
        return self.adapter(input, input_lengths)
