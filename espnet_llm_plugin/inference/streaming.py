"""Speech to text while the samples arrive.

T encoder frames, D encoder size, n samples.

What has been recognised has two parts: labels that all live hypotheses of the search begin with,
which nothing that follows can change, and the rest of the best hypothesis.
"""

import math
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any, Optional, Sequence, Union

import numpy as np
import torch

from espnet_llm_plugin.encoder.latency import Latency, algorithmic_latency
from espnet_llm_plugin.encoder.streaming import AbsStreamingEncoder, StreamState
from espnet_llm_plugin.encoder.streaming_frontend import (
    FrontendState,
    StreamingFrontend,
    frame_geometry,
)
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.endpoint import EndpointRule, is_endpoint
from espnet_llm_plugin.inference.recognizer import Recognition, Recognizer
from espnet_llm_plugin.registry import ENTRIES
from espnet_llm_plugin.transducer.search_state import SearchState


@dataclass(frozen=True)
class RecognizerState:
    """All that is kept of one stream: later pieces make new states of it and leave it as it is.

    An old state may be gone back to as long as the memory for predictor states has not run out
    (``max_bytes`` of the search): then those that no hypothesis of the newest state reaches are
    given up.

    Attributes:
        frontend: Samples under windows that are not complete.
        encoder: Frames that wait for their chunk, and the context of the next.
        search: Hypotheses of the segment.
        begin: Encoder frame at which the segment began.
    """

    frontend: FrontendState
    encoder: StreamState
    search: SearchState
    begin: int

    @property
    def frame(self) -> int:
        """Encoder frames searched so far."""
        return self.begin + int(self.search.frame[0])


@dataclass(frozen=True)
class Partial:
    """What the segment says so far: the best hypothesis.

    Attributes:
        token_ids: All of it.
        num_stable: How many of them nothing can change any more.
        stable: Their text, which later results only continue.
        tail: The rest of the text.
    """

    token_ids: list[int]
    num_stable: int
    stable: str
    tail: str

    @property
    def text(self) -> str:
        """The whole."""
        return self.stable + self.tail


@dataclass(frozen=True)
class Segment:
    """A finished part of a stream.

    Attributes:
        begin: Its first encoder frame: the emission frames of its hypotheses count from there.
        num_frames: Encoder frames.
        begin_seconds: Where it begins in the stream.
        end_seconds: Where it ends.
        nbest: Hypotheses, best first.
    """

    begin: int
    num_frames: int
    begin_seconds: float
    end_seconds: float
    nbest: list[Recognition]


class StreamingRecognizer:
    """A recogniser of streams, whose results are those of the same recogniser on the whole.

    ::

        state = streaming.initial_state()
        for samples in stream:                               # any number of them
            segments, state = streaming.infer(samples, state)
            print(streaming.partial(state).text)
        segments = streaming.finish(state)                   # the last one is always there

    Samples can be given in any pieces; the results are the same. Without endpoint rules there is
    one segment, and its n-best list is the one that ``recognizer`` gives for the whole recording.
    At an endpoint the search (with its LMs) begins anew and what it kept is freed; the encoder
    goes on, with its left context. Between endpoints memory grows with the recognised text (an LM
    row and an LLM's keys and values a label), not with the audio.

    Args:
        recognizer: With a model that can stream, its encoder set to the wanted chunk size.
        endpoint_rules: See :func:`~espnet_llm_plugin.inference.endpoint.endpoint_rules`.

    Attributes:
        seconds_per_frame: Of an encoder frame.
        latency: Algorithmic.
        sample_rate: Of the samples (Hz).

    Raises:
        UserError: A part of the model needs the whole utterance; the message names it.
    """

    def __init__(self, recognizer: Recognizer, endpoint_rules: Sequence[EndpointRule] = ()):
        model = recognizer.asr.model
        check_streamable(model)
        self.recognizer = recognizer
        self.rules = tuple(endpoint_rules)
        self.frontend = StreamingFrontend(model.frontend, model.normalize)
        self.encoder: AbsStreamingEncoder = model.encoder
        self.latency: Latency = algorithmic_latency(model.frontend, model.encoder)
        geometry = self.frontend.geometry
        self.sample_rate = geometry.sample_rate
        shift = geometry.hop_length / geometry.sample_rate
        self.seconds_per_frame = self.encoder.subsampling * shift
        # A frame stands for the samples half a shift around its window's middle.
        self._origin = geometry.centre / geometry.sample_rate - shift / 2

    def initial_state(self) -> RecognizerState:
        """State before the first sample."""
        return RecognizerState(
            self.frontend.initial_state(), self.encoder.initial_state(1), self._start(), 0
        )

    def infer(
        self, samples: Union[np.ndarray, torch.Tensor], state: RecognizerState
    ) -> tuple[list[Segment], RecognizerState]:
        """The next samples (n,) of a stream: segments that ended, and the new state.

        ``state`` stays valid. The same as :meth:`encode` and then :meth:`search`.
        """
        frames, state = self.encode(samples, state)
        return self.search(frames, state)

    def finish(self, state: RecognizerState) -> list[Segment]:
        """The stream has ended: segments that ended, the last of them in any case."""
        frames, state = self.encode_rest(state)
        segments, state = self.search(frames, state)
        return [*segments, self.last_segment(state)]

    def encode(
        self, samples: Union[np.ndarray, torch.Tensor], state: RecognizerState
    ) -> tuple[torch.Tensor, RecognizerState]:
        """Encoder frames (T, D) that samples (n,) complete; T is often 0.

        Raises:
            UserError: No vector of floating-point samples.
        """
        samples = torch.as_tensor(samples)
        if not samples.is_floating_point():
            raise UserError(
                f"expected samples as numbers between -1 and 1, got {samples.dtype}: divide 16-bit "
                "samples by 32768"
            )
        feats, frontend = self.frontend.infer(samples, state.frontend)
        encoded, encoder = self.encoder.infer(feats[None], state.encoder)
        return encoded.frames[0], replace(state, frontend=frontend, encoder=encoder)

    def encode_rest(self, state: RecognizerState) -> tuple[torch.Tensor, RecognizerState]:
        """The last encoder frames (T, D) of a stream that has ended."""
        feats = self.frontend.finish(state.frontend)
        encoded, encoder = self.encoder.infer(feats[None], state.encoder)
        rest = self.encoder.finish(encoder)
        return torch.cat([encoded.frames[0], rest.frames[0]]), replace(state, encoder=encoder)

    def search(
        self, frames: torch.Tensor, state: RecognizerState
    ) -> tuple[list[Segment], RecognizerState]:
        """Search the next encoder frames (T, D): segments that ended, and the new state."""
        if not len(frames):
            return [], state
        if not self.rules:
            return [], self._step(frames, state)
        segments = []
        # Chunk by chunk, or endpoints would depend on how the samples were split.
        for chunk in frames.split(state.encoder.chunk):
            state = self._step(chunk, state)
            labels, emitted = state.search.best(0, self.recognizer.normalize_length)
            length = int(state.search.frame[0])
            silence = length - (emitted[-1] + 1 if labels else 0)
            seconds = self.seconds_per_frame
            if is_endpoint(self.rules, silence * seconds, length * seconds, bool(labels)):
                if labels:
                    segments.append(self.last_segment(state))
                state = replace(state, search=self._start(), begin=state.frame)
        return segments, state

    def last_segment(self, state: RecognizerState) -> Segment:
        """The running segment as if it ended here."""
        recognizer = self.recognizer
        hypotheses = state.search.nbest(recognizer.nbest, recognizer.normalize_length)[0]
        return Segment(
            begin=state.begin,
            num_frames=int(state.search.frame[0]),
            begin_seconds=self.seconds(state.begin),
            # the last frame is a whole one, the recording's end may be within it
            end_seconds=min(self.seconds(state.frame), state.frontend.received / self.sample_rate),
            nbest=[recognizer.recognition(hypothesis) for hypothesis in hypotheses],
        )

    def partial(self, state: RecognizerState) -> Partial:
        """What the segment says so far."""
        labels, _ = state.search.best(0, self.recognizer.normalize_length)
        token_ids = [label + 1 for label in labels]
        num_stable = state.search.num_stable()
        whole = self.text(token_ids)
        # The first bytes of a character that is written as several tokens are no text yet.
        stable = self.text(token_ids[:num_stable]).rstrip("\ufffd")
        stable = commonprefix([stable, whole])
        return Partial(token_ids, num_stable, stable, whole[len(stable) :])

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; their tokens where the model has no tokenizer."""
        converter = self.recognizer.asr.text
        tokens = converter.tokens(token_ids)
        text = converter.text(tokens)
        return " ".join(tokens) if text is None else text

    def seconds(self, frame: int) -> float:
        """Where encoder frame ``frame`` begins in the stream; the first one, at 0."""
        return max(0.0, frame * self.seconds_per_frame + self._origin)

    def _start(self) -> SearchState:
        return self.recognizer.search.start([self.recognizer.scales])

    def _step(self, frames: torch.Tensor, state: RecognizerState) -> RecognizerState:
        return replace(state, search=self.recognizer.search.step(state.search, frames))


def check_streamable(model: Any) -> None:
    """Refuse a model that needs whole utterances.

    Raises:
        UserError: Names the part that does.
    """
    encoder = model.encoder
    if not isinstance(encoder, AbsStreamingEncoder):
        names = ", ".join(entry.name for entry in ENTRIES if entry.kind == "encoder")
        raise UserError(
            f"the model's encoder {type(encoder).__name__} needs the whole utterance; train with a "
            f"streaming encoder (`encoder:` one of {names}), or decode whole recordings with "
            "espnet_llm_plugin.bin.asr_inference"
        )
    for part in ("preencoder", "postencoder"):
        module = getattr(model, part, None)
        if module is not None:
            raise UserError(
                f"cannot stream with the {part} {type(module).__name__}: it is made for whole "
                f"utterances. Train without `{part}`"
            )
    if encoder.chunk_size is None:
        raise UserError(
            "the encoder is set to whole utterances (chunk_size: null, or chunk_ms inf), which are "
            "no stream; give chunk_ms, as one of the chunk sizes it was trained with"
        )


def set_chunk_ms(model: Any, chunk_ms: Optional[float]) -> None:
    """Let a streaming encoder work in chunks of so many milliseconds; ``inf``: whole utterances.

    None leaves the chunk size of the configuration.

    Raises:
        UserError: The encoder knows no chunks, or not of this length.
    """
    if chunk_ms is None:
        return
    geometry = frame_geometry(model.frontend)
    if not isinstance(model.encoder, AbsStreamingEncoder) or geometry is None:
        raise UserError(
            f"chunk_ms {chunk_ms:g} is given, but {type(model.encoder).__name__} on "
            f"{type(model.frontend).__name__} has no chunks; leave it out"
        )
    if math.isinf(chunk_ms) and chunk_ms > 0:
        model.encoder.set_chunk_size(None)
        return
    shift_ms = 1000 * geometry.hop_length / geometry.sample_rate
    frames = chunk_ms / shift_ms
    # milliseconds of 12.5 or 11.6 are no round numbers; half a frame is a mistake
    if not math.isfinite(frames) or abs(frames - round(frames)) > 0.05 or round(frames) < 1:
        step = shift_ms * model.encoder.subsampling
        raise UserError(
            f"chunk_ms {chunk_ms:g} must be a multiple of {step:g} ms (frames of {shift_ms:g} ms, "
            f"subsampling {model.encoder.subsampling})"
        )
    model.encoder.set_chunk_size(round(frames))
