"""Partial results in the terminal while a stream is recognised."""

import shutil
from typing import Iterable, TextIO

import numpy as np

from espnet_llm_plugin.inference.simulate import text_of
from espnet_llm_plugin.inference.streaming import Partial, Segment, StreamingRecognizer
from espnet_llm_plugin.scoring.table import width

CLEAR_LINE = "\r\x1b[2K"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class LiveDisplay:
    """Shows what is being said.

    On a terminal the running segment is one line that changes in place: what is stable as it is,
    the rest dimmed; of a long one the end. Elsewhere every change is a line of its own:
    ``partial SECONDS<tab>stable<tab>rest``, and every segment ``final BEGIN-END<tab>text``.

    Args:
        output: Where to write.
    """

    def __init__(self, output: TextIO):
        self.output = output
        self.is_terminal = output.isatty()
        self._shown = ("", "")

    def partial(self, partial: Partial, seconds: float) -> None:
        """Show what the running segment says ``seconds`` into the stream, if it has changed."""
        shown = (partial.stable, partial.tail)
        if shown == self._shown:
            return
        self._shown = shown
        if self.is_terminal:
            columns = shutil.get_terminal_size().columns - 1
            stable, tail = last_columns(partial.stable, partial.tail, columns)
            self._write(f"{CLEAR_LINE}{stable}{DIM}{tail}{PLAIN}")
        else:
            self._write(f"partial {seconds:.2f}\t{partial.stable}\t{partial.tail}\n")

    def final(self, segment: Segment) -> None:
        """Show a finished segment."""
        self._shown = ("", "")
        text = text_of(segment.nbest[0])
        if self.is_terminal:
            self._write(f"{CLEAR_LINE}{text}\n")
        else:
            self._write(f"final {segment.begin_seconds:.2f}-{segment.end_seconds:.2f}\t{text}\n")

    def _write(self, text: str) -> None:
        self.output.write(text)
        self.output.flush()


def last_columns(stable: str, tail: str, columns: int) -> tuple[str, str]:
    """Both, shortened at the beginning to what fits into ``columns``."""
    too_many = width(stable) + width(tail) - columns
    if too_many <= 0:
        return stable, tail
    too_many += 1  # for the ellipsis
    whole, begin = stable + tail, 0
    while too_many > 0 and begin < len(whole):
        too_many -= width(whole[begin])
        begin += 1
    if begin < len(stable):
        return "…" + stable[begin:], tail
    return "…", whole[begin:]


def transcribe(
    streaming: StreamingRecognizer, source: Iterable[np.ndarray], display: LiveDisplay
) -> list[Segment]:
    """Recognise a source to its end, or until the user interrupts; returns the segments."""
    state, segments, received = streaming.initial_state(), [], 0
    try:
        for samples in source:
            ended, state = streaming.infer(samples, state)
            for segment in ended:
                display.final(segment)
            segments += ended
            received += len(samples)
            display.partial(streaming.partial(state), received / streaming.sample_rate)
    except KeyboardInterrupt:
        pass
    for segment in streaming.finish(state):
        # After an endpoint the rest may be silence; but something is always shown.
        if segment.nbest[0].token_ids or not segments:
            display.final(segment)
            segments.append(segment)
    return segments
