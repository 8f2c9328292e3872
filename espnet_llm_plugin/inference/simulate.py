"""A recording given to a streaming recogniser piece by piece, as a microphone would."""

import time
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
import torch

from espnet_llm_plugin.errors import UtteranceError
from espnet_llm_plugin.inference.recognizer import Recognition, Recognizer
from espnet_llm_plugin.inference.streaming import Partial, Segment, StreamingRecognizer
from espnet_llm_plugin.transducer.hypothesis import Hypothesis

NOTHING = Partial([], 0, "", "")


@dataclass(frozen=True)
class Piece:
    """What one piece of a recording led to.

    Attributes:
        given_seconds: Length of the recording up to the end of this piece.
        encoder_seconds: Compute time of frontend and encoder.
        search_seconds: Compute time of the search.
        segments: Segments that ended.
        partial: What the running segment says; the end of the recording leaves it empty.
    """

    given_seconds: float
    encoder_seconds: float
    search_seconds: float
    segments: list[Segment]
    partial: Partial

    @property
    def compute_seconds(self) -> float:
        """Encoder and search."""
        return self.encoder_seconds + self.search_seconds

    def as_dict(self) -> dict[str, Any]:
        """As a line of ``streaming.jsonl``."""
        return {
            "given_seconds": round(self.given_seconds, 4),
            "compute_seconds": round(self.compute_seconds, 6),
            "ended": [
                {
                    "begin_seconds": round(segment.begin_seconds, 4),
                    "end_seconds": round(segment.end_seconds, 4),
                    "text": text_of(segment.nbest[0]),
                }
                for segment in self.segments
            ],
            "stable": self.partial.stable,
            "tail": self.partial.tail,
        }


def simulate(
    streaming: StreamingRecognizer, samples: np.ndarray, piece_length: int = 0
) -> list[Piece]:
    """Recognise samples (n,) in pieces of ``piece_length``; 0: in one. The last ends the stream.

    Raises:
        UtteranceError: Not the samples of one channel.
    """
    if samples.ndim != 1:
        raise UtteranceError(f"has the shape {samples.shape}: a stream is one channel of samples")
    state = streaming.initial_state()
    pieces: list[Piece] = []
    length = piece_length or max(len(samples), 1)
    # After the last piece comes the end of the stream, which sets the rest free.
    for begin in range(0, len(samples) + length, length):
        part = samples[begin : begin + length] if begin < len(samples) else None
        start = time.perf_counter()
        if part is None:
            frames, state = streaming.encode_rest(state)
        else:
            frames, state = streaming.encode(part, state)
        if frames.is_cuda:
            torch.cuda.synchronize()
        middle = time.perf_counter()
        segments, state = streaming.search(frames, state)
        if part is None:
            segments, partial = [*segments, streaming.last_segment(state)], NOTHING
        else:
            partial = streaming.partial(state)
        end = time.perf_counter()
        given = min(begin + length, len(samples)) / streaming.sample_rate
        pieces.append(Piece(given, middle - start, end - middle, segments, partial))
    return pieces


def joined(recognizer: Recognizer, segments: Sequence[Segment]) -> list[Recognition]:
    """The n-best list of a recording: of its only segment, or the best of all in a row."""
    if len(segments) == 1:
        return segments[0].nbest
    best = [segment.nbest[0].hypothesis for segment in segments]
    blanks = [hypothesis.blank for hypothesis in best]
    names = ("total", "acoustic", "lm", "external_lm", "prior", "bonus")
    whole = Hypothesis(
        labels=tuple(label for hypothesis in best for label in hypothesis.labels),
        frames=tuple(
            segment.begin + frame
            for segment in segments
            for frame in segment.nbest[0].hypothesis.frames
        ),
        blank=None if None in blanks else sum(blanks),
        **{name: sum(getattr(hypothesis, name) for hypothesis in best) for name in names},
    )
    recognition = recognizer.recognition(whole)
    if recognition.text is None:
        return [recognition]
    # A segment's first piece begins a word, whether it says so or not.
    texts = [segment.nbest[0].text for segment in segments]
    text = " ".join(text for text in texts if text)
    return [Recognition(text, recognition.tokens, recognition.token_ids, whole)]


def text_of(recognition: Recognition) -> str:
    """Its text; its tokens where the model has no tokenizer."""
    return " ".join(recognition.tokens) if recognition.text is None else recognition.text
