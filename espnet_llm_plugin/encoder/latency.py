"""Algorithmic latency: how long an output waits for input, on an infinitely fast computer.

A frame stands for the ``hop_length`` samples around the centre of its analysis window, a chunk for
those of its frames.
"""

import logging
from dataclasses import dataclass
from typing import Any, Optional

from espnet_llm_plugin.encoder.streaming import AbsStreamingEncoder
from espnet_llm_plugin.encoder.streaming_frontend import frame_geometry


@dataclass(frozen=True)
class Latency:
    """The parts of the algorithmic latency, in milliseconds.

    Attributes:
        chunk: length of a chunk; its first frame waits for all of it.
        right_context: look-ahead beyond the chunk.
        window: how far the analysis window of the last frame reaches beyond the samples that
            the frame stands for.
    """

    chunk: float
    right_context: float
    window: float

    @property
    def longest(self) -> float:
        """From the beginning of a chunk to the last sample that its first output depends on."""
        return self.chunk + self.right_context + self.window

    @property
    def mean(self) -> float:
        """Averaged over the frames of a chunk; Emformer's EIL (arXiv 2010.10759) + the window."""
        return self.chunk / 2 + self.right_context + self.window

    def __str__(self) -> str:
        return (
            f"algorithmic latency {self.longest:.5g} ms (chunk {self.chunk:.5g} + right context "
            f"{self.right_context:.5g} + analysis window {self.window:.5g}), mean over a chunk "
            f"{self.mean:.5g} ms"
        )


def algorithmic_latency(frontend: Any, encoder: Any) -> Optional[Latency]:
    """Latency of an ESPnet model's frontend and encoder; None if they cannot stream.

    Args:
        frontend: ``model.frontend``.
        encoder: ``model.encoder``, with the chunk size that is set now.
    """
    geometry = frame_geometry(frontend)
    if not isinstance(encoder, AbsStreamingEncoder) or encoder.chunk_size is None:
        return None
    if geometry is None:
        return None
    shift = geometry.hop_length * 1000 / geometry.sample_rate
    window = geometry.reach * 1000 / geometry.sample_rate
    return Latency(encoder.chunk_size * shift, encoder.right_context * shift, window)


def log_latency(frontend: Any, encoder: Any) -> None:
    """Log the algorithmic latency of a model that can stream; nothing for one that cannot."""
    latency = algorithmic_latency(frontend, encoder)
    if latency is not None:
        logging.info(f"streaming encoder: {latency}")
