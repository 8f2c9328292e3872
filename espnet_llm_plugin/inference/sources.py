"""Samples as they arrive: a recording, standard input, the microphone.

Each source yields float32 samples (n,) between -1 and 1, of one channel, at the model's rate.
"""

import queue
import time
from io import BufferedIOBase
from pathlib import Path
from typing import Iterator, Union

import numpy as np

from espnet_llm_plugin.data.audio import resample
from espnet_llm_plugin.errors import UserError


def wav_file(
    path: Union[str, Path], sample_rate: int, piece_length: int, real_time: bool = False
) -> Iterator[np.ndarray]:
    """A recording in any format that soundfile reads, resampled if need be.

    Args:
        path: Of the file.
        sample_rate: The model's.
        piece_length: Samples at a time.
        real_time: Wait as long as a microphone would need.

    Raises:
        UserError: It cannot be read, or has several channels.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if samples.shape[1] != 1:
        raise UserError(f"{path} has {samples.shape[1]} channels, expected one: choose a channel")
    samples = resample(samples[:, 0], rate, sample_rate)
    start = time.monotonic()
    for begin in range(0, len(samples), piece_length):
        piece = samples[begin : begin + piece_length]
        if real_time:
            due = start + (begin + len(piece)) / sample_rate
            time.sleep(max(0.0, due - time.monotonic()))
        yield piece


def raw_pcm(stream: BufferedIOBase, piece_length: int) -> Iterator[np.ndarray]:
    """Signed 16-bit little-endian samples, as ``arecord -f S16_LE`` and ``sox -e signed`` write.

    Samples are passed on as soon as there are some, ``piece_length`` at most. Half a sample at the
    end is dropped.
    """
    left = b""
    while data := stream.read1(2 * piece_length):
        data = left + data
        whole = len(data) - len(data) % 2
        left = data[whole:]
        if whole:
            yield np.frombuffer(data[:whole], dtype="<i2").astype(np.float32) / 32768


def microphone(sample_rate: int, piece_length: int) -> Iterator[np.ndarray]:
    """The default input device, until the consumer stops.

    Raises:
        UserError: sounddevice is not installed, or there is no microphone.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the PortAudio library is missing
        raise UserError(
            f"the microphone needs sounddevice and PortAudio ({error}): pip install "
            "'espnet_llm_plugin[microphone]', and on Linux the package libportaudio2; or pipe the "
            "samples in: arecord -f S16_LE -r RATE -c 1 -t raw | ... --stdin"
        ) from error

    pieces: queue.Queue[np.ndarray] = queue.Queue()

    def keep(data: np.ndarray, frames: int, when: object, status: object) -> None:
        pieces.put(data[:, 0].copy())

    try:
        with sounddevice.InputStream(
            samplerate=sample_rate,
            blocksize=piece_length,
            channels=1,
            dtype="float32",
            callback=keep,
        ):
            while True:
                yield pieces.get()
    except sounddevice.PortAudioError as error:
        raise UserError(
            f"the microphone does not give {sample_rate} samples a second: {error}"
        ) from error
