"""Adapters: what an encoder says of an utterance, as input embeddings of an LLM.

B utterances, T encoder frames, E encoder width, n frames stacked, P embeddings, D width of the LLM,
C rows of the CTC output (row 0 blank).

    adapter = build_adapter("frame_stacking", E, D, stack=3)
    embeddings, lengths = adapter(hs, hlens)                    # (B, P, D), (B,)

All are vectorised over the batch, an utterance of a ragged batch gives what it gives alone, and
the embeddings beyond an utterance's length are zero. Every utterance of at least one frame gives
at least one embedding; zero frames give zero embeddings, for the caller to refuse or to count.
"""

from abc import ABC, abstractmethod
from typing import Any, Mapping, Optional

import torch
from torch import Tensor

from espnet_llm_plugin.encoder.adapters_layers import ExtraLayers
from espnet_llm_plugin.encoder.adapters_projection import TextScale, make_projection
from espnet_llm_plugin.encoder.adapters_reduction import (
    beyond,
    check_stack,
    mean_of_segments,
    stack_frames,
)
from espnet_llm_plugin.encoder.ctc_segments import ctc_segments
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown


class SpeechAdapter(torch.nn.Module, ABC):
    """New encoder layers, if any, then fewer frames of the LLM's width.

    Args:
        encoder_output_size: E.
        hidden_size: D.
        extra_layers: new encoder layers before the reduction (arXiv 2603.15045: 2).
        extra_layers_conf: see :class:`ExtraLayers`.

    Attributes:
        needs_ctc: whether ``forward`` needs ``ctc_log_probs``.
        needs_label_embeddings: whether it needs ``label_embeddings``.
        stack: n; None if the reduction depends on the utterance.
    """

    needs_ctc = False
    needs_label_embeddings = False
    stack: Optional[int] = None

    def __init__(
        self,
        encoder_output_size: int,
        hidden_size: int,
        extra_layers: int,
        extra_layers_conf: Optional[Mapping[str, Any]],
    ):
        super().__init__()
        self.hidden_size = hidden_size
        conf = dict(extra_layers_conf or {})
        refuse_unknown("extra_layers_conf", conf, ExtraLayers, ("size", "num_blocks"))
        if extra_layers < 0:
            raise UserError(f"extra_layers must be 0 or more, got {extra_layers}")
        if conf and not extra_layers:
            raise UserError("extra_layers_conf is given, but extra_layers is 0: set their number")
        self.extra_layers = None
        if extra_layers:
            self.extra_layers = ExtraLayers(encoder_output_size, extra_layers, **conf)

    def forward(
        self,
        hs: Tensor,
        hlens: Tensor,
        ctc_log_probs: Optional[Tensor] = None,
        label_embeddings: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of a batch of utterances.

        Args:
            hs: (B, T, E) encoder output.
            hlens: (B,) its frames; the longest may be shorter than T.
            ctc_log_probs: (B, T, C) of the encoder's CTC, row 0 blank.
            label_embeddings: (C, D) the LLM's embedding of every CTC label; row 0 is the one that
                shall stand for silence, e.g. of ``<blank>``, ``<unk>`` or the padding token.

        Returns:
            (B, P, D) and (B,); P is the largest length.

        Raises:
            UserError: CTC output or label embeddings are needed and missing or do not fit.
        """
        self._check(hs, hlens, ctc_log_probs, label_embeddings)
        longest = int(hlens.max())
        if longest == 0:
            return hs.new_zeros(len(hs), 0, self.hidden_size), torch.zeros_like(hlens)
        hs = hs[:, :longest].masked_fill(beyond(hlens, longest)[..., None], 0.0)
        if ctc_log_probs is not None:
            ctc_log_probs = ctc_log_probs[:, :longest]
        if self.extra_layers is not None:
            hs = self.extra_layers(hs, hlens)
        embeddings, lengths = self.reduce(hs, hlens, ctc_log_probs, label_embeddings)
        padding = beyond(lengths, embeddings.size(1))[..., None]
        return embeddings.masked_fill(padding, 0.0), lengths.to(hlens.dtype)

    @abstractmethod
    def describe(self, frame_ms: Optional[float]) -> str:
        """What an embedding stands for, in words for the log.

        Args:
            frame_ms: milliseconds per encoder frame, None if not known; see
                :func:`~espnet_llm_plugin.encoder.stride.encoder_frame_ms`.
        """

    @abstractmethod
    def reduce(
        self,
        hs: Tensor,
        hlens: Tensor,
        ctc_log_probs: Optional[Tensor],
        label_embeddings: Optional[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, with T > 0 the longest of ``hlens``; anything in the padding."""

    def _check(
        self,
        hs: Tensor,
        hlens: Tensor,
        ctc_log_probs: Optional[Tensor],
        label_embeddings: Optional[Tensor],
    ) -> None:
        if int(hlens.max()) > hs.size(1):
            raise ValueError(f"lengths up to {int(hlens.max())} of {hs.size(1)} frames")
        if self.needs_ctc:
            if ctc_log_probs is None:
                raise UserError(
                    f"the adapter {type(self).name!r} needs the encoder's CTC output: give the "
                    "model a CTC branch (ctc_weight above 0), best a trained one (--init_param)"
                )
            if ctc_log_probs.shape[:2] != hs.shape[:2]:
                raise UserError(
                    f"CTC output {tuple(ctc_log_probs.shape[:2])} (utterances, frames) does not "
                    f"belong to encoder output {tuple(hs.shape[:2])}: the adapter "
                    f"{type(self).name!r} needs a CTC on the encoder's own frames"
                )
        if self.needs_label_embeddings:
            expected = (ctc_log_probs.size(2), self.hidden_size)
            if label_embeddings is None or label_embeddings.shape != expected:
                given = None if label_embeddings is None else tuple(label_embeddings.shape)
                raise UserError(
                    f"the adapter {type(self).name!r} needs the LLM's embedding of every CTC "
                    f"label, {expected}, got {given}: the CTC must have the LLM's labels"
                )


class FrameStackingAdapter(SpeechAdapter):
    """``n`` frames side by side, projected (arXiv 2307.11795; 2603.15045).

    Args:
        encoder_output_size: E.
        hidden_size: D.
        stack: n. With 80 ms frames, 3 is 240 ms and 12 is 960 ms.
        projection: ``linear`` or ``mlp``.
        projection_units: width within the MLP; D if not given.
        dropout_rate: before the projection's last layer.
        match_text_scale: RMS normalisation to the scale of the text embeddings.
        text_scale: root mean square of the LLM's text embeddings; for ``match_text_scale``.
        extra_layers: see :class:`SpeechAdapter`.
        extra_layers_conf: see :class:`SpeechAdapter`.
    """

    name = "frame_stacking"

    def __init__(
        self,
        encoder_output_size: int,
        hidden_size: int,
        stack: int = 1,
        projection: str = "linear",
        projection_units: Optional[int] = None,
        dropout_rate: float = 0.0,
        match_text_scale: bool = False,
        text_scale: Optional[float] = None,
        extra_layers: int = 0,
        extra_layers_conf: Optional[Mapping[str, Any]] = None,
    ):
        check_stack(stack)
        super().__init__(encoder_output_size, hidden_size, extra_layers, extra_layers_conf)
        self.stack = stack
        self.projection = make_projection(
            projection, stack * encoder_output_size, hidden_size, projection_units, dropout_rate
        )
        self.scale = TextScale(hidden_size, text_scale) if match_text_scale else None

    def describe(self, frame_ms: Optional[float]) -> str:
        return _describe_stack(self.stack, frame_ms)

    def reduce(self, hs, hlens, ctc_log_probs, label_embeddings):
        stacked, lengths = stack_frames(hs, hlens, self.stack)
        embeddings = self.projection(stacked)
        return embeddings if self.scale is None else self.scale(embeddings), lengths


class CTCCompressionAdapter(SpeechAdapter):
    """Runs of frames with one sure CTC label averaged, then projected (arXiv 2603.15045).

    Args:
        encoder_output_size: E.
        hidden_size: D.
        threshold: tau, the probability from which on a frame's best label is sure; see
            :func:`ctc_segments`.
        projection: see :class:`FrameStackingAdapter`, as all that follow.
    """

    name = "ctc_compression"
    needs_ctc = True

    def __init__(
        self,
        encoder_output_size: int,
        hidden_size: int,
        threshold: float = 0.9,
        projection: str = "linear",
        projection_units: Optional[int] = None,
        dropout_rate: float = 0.0,
        match_text_scale: bool = False,
        text_scale: Optional[float] = None,
        extra_layers: int = 0,
        extra_layers_conf: Optional[Mapping[str, Any]] = None,
    ):
        if not 0.0 <= threshold <= 1.0:
            raise UserError(f"threshold is a probability, 0 to 1, got {threshold}")
        super().__init__(encoder_output_size, hidden_size, extra_layers, extra_layers_conf)
        self.threshold = threshold
        self.projection = make_projection(
            projection, encoder_output_size, hidden_size, projection_units, dropout_rate
        )
        self.scale = TextScale(hidden_size, text_scale) if match_text_scale else None

    def describe(self, frame_ms: Optional[float]) -> str:
        frames = "encoder frames" if frame_ms is None else f"encoder frames of {frame_ms:g} ms"
        return (
            f"one embedding per run of {frames} with one CTC label (probability from "
            f"{self.threshold:g} on)"
        )

    def reduce(self, hs, hlens, ctc_log_probs, label_embeddings):
        segments, counts = ctc_segments(ctc_log_probs, hlens, self.threshold)
        embeddings = self.projection(mean_of_segments(hs, hlens, segments, counts))
        return embeddings if self.scale is None else self.scale(embeddings), counts


class CTCEmbeddingAdapter(SpeechAdapter):
    """The text embedding that the CTC expects, plus a small learnt part.

    Starts as what the CTC recognises, in the LLM's own embeddings, so that a new model need not
    find the alignment of speech and text by itself:

        a = (sum_{v > 0} p(v) E[v] + w E[0]) / (sum_{v > 0} p(v) + w) + g s RMSnorm(MLP(h))

    with p the CTC posterior summed over the n stacked frames, E the embeddings of the labels (E[0]
    stands for silence), w ``blank_weight``, g the gate and s the text scale, both learnt. No
    published recipe has it; it needs a CTC with the labels of the LLM and gives the LLM little
    that the CTC does not know, so that it is an option and no default.

    Args:
        encoder_output_size: E.
        hidden_size: D.
        text_scale: root mean square of the LLM's text embeddings.
        stack: n.
        blank_weight: w, in frames; must be positive, because a sure blank has no other embedding.
        gate: g at the start.
        projection: see :class:`FrameStackingAdapter`, as all that follow.
    """

    name = "ctc_embedding"
    needs_ctc = True
    needs_label_embeddings = True

    def __init__(
        self,
        encoder_output_size: int,
        hidden_size: int,
        text_scale: Optional[float] = None,
        stack: int = 1,
        blank_weight: float = 0.1,
        gate: float = 0.1,
        projection: str = "mlp",
        projection_units: Optional[int] = None,
        dropout_rate: float = 0.0,
        extra_layers: int = 0,
        extra_layers_conf: Optional[Mapping[str, Any]] = None,
    ):
        check_stack(stack)
        if not blank_weight > 0.0:
            raise UserError(f"blank_weight must be positive, got {blank_weight}")
        super().__init__(encoder_output_size, hidden_size, extra_layers, extra_layers_conf)
        self.stack = stack
        self.blank_weight = blank_weight
        self.projection = make_projection(
            projection, stack * encoder_output_size, hidden_size, projection_units, dropout_rate
        )
        self.scale = TextScale(hidden_size, text_scale)
        self.gate = torch.nn.Parameter(torch.tensor(float(gate)))

    def describe(self, frame_ms: Optional[float]) -> str:
        return _describe_stack(self.stack, frame_ms) + ", with the CTC's expected text embedding"

    def reduce(self, hs, hlens, ctc_log_probs, label_embeddings):
        stacked, lengths = stack_frames(hs, hlens, self.stack)
        learnt = self.gate * self.scale(self.projection(stacked))
        padding = beyond(hlens, ctc_log_probs.size(1))[..., None]
        posteriors = ctc_log_probs.float().masked_fill(padding, -torch.inf).exp()
        posteriors, _ = stack_frames(posteriors, hlens, self.stack)
        summed = posteriors.unflatten(2, (self.stack, -1)).sum(2)[..., 1:]  # (B, P, C - 1)
        total = summed.sum(-1, keepdim=True) + self.blank_weight
        silence, labels = label_embeddings[0], label_embeddings[1:]
        expected = (summed / total).to(labels.dtype) @ labels
        expected = expected + (self.blank_weight / total).to(labels.dtype) * silence
        return expected.to(learnt.dtype) + learnt, lengths


def _describe_stack(stack: int, frame_ms: Optional[float]) -> str:
    if frame_ms is None:
        return f"one embedding per {stack} encoder frames"
    return f"one embedding per {stack * frame_ms:g} ms ({stack} encoder frames of {frame_ms:g} ms)"


ADAPTERS: dict[str, type[SpeechAdapter]] = {
    adapter.name: adapter
    for adapter in (FrameStackingAdapter, CTCCompressionAdapter, CTCEmbeddingAdapter)
}
_PASSED = ("encoder_output_size", "hidden_size", "text_scale")


def build_adapter(
    name: str,
    encoder_output_size: int,
    hidden_size: int,
    *,
    text_scale: Optional[float] = None,
    **conf: Any,
) -> SpeechAdapter:
    """The adapter of a configuration.

    Args:
        name: ``frame_stacking``, ``ctc_compression`` or ``ctc_embedding``.
        encoder_output_size: E.
        hidden_size: D.
        text_scale: root mean square of the LLM's text embeddings; needed for ``match_text_scale:
            true`` and for ``ctc_embedding``.
        conf: options of the adapter.

    Raises:
        UserError: Unknown adapter or option, an option out of range, no ``text_scale``.
    """
    if name not in ADAPTERS:
        raise UserError(f"unknown adapter {name!r}; choose one of: {', '.join(ADAPTERS)}")
    cls = ADAPTERS[name]
    refuse_unknown(f"adapter_conf of {name!r}", conf, cls, _PASSED)
    return cls(encoder_output_size, hidden_size, text_scale=text_scale, **conf)
