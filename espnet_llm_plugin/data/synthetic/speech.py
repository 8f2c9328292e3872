"""espeak-ng through ctypes: invented speakers, phonemes, 16 kHz speech.

espeak-ng comes from the package ``espeakng-loader`` (an optional dependency): no binary, no audio
device. Although its random generator is seeded here, what it returns depends on the earlier calls
in the process; callers that need the same bytes again make the same calls in a fresh process
(``corpus`` does).
"""

import ctypes
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from espnet_llm_plugin.errors import UserError

SAMPLE_RATE = 16000
# espeak-ng's file names of the accents; twice as many speakers have the first one.
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland")
VARIANTS = tuple(f"m{i}" for i in range(1, 9)) + tuple(f"f{i}" for i in range(1, 6))
SLOWEST, FASTEST = 140, 200  # words a minute, as espeak-ng counts

# Constants of espeak-ng's speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Speaker(NamedTuple):
    """A voice: accent and variant of espeak-ng, mean pitch and pitch range (0..99 each)."""

    accent: str
    variant: str
    pitch: int
    pitch_range: int

    @property
    def name(self) -> str:
        """Identifier of letters, digits and underscores, e.g. ``en_us_f2_p40``."""
        return f"{self.accent.replace('-', '_')}_{self.variant}_p{self.pitch:02d}"


def speakers(split: str) -> list[Speaker]:
    """The speakers of ``train``, ``dev`` or ``test``.

    Every accent and every variant is heard in training, but a combination of the two belongs to
    one split only, so the speakers of dev and test are new.
    """
    result = []
    for (a, accent), (v, variant) in product(enumerate(ACCENTS), enumerate(VARIANTS)):
        place = (v + 5 * a) % len(VARIANTS)
        owner = "test" if place in (0, 6) else "dev" if place == 3 else "train"
        if owner != split:
            continue
        count = 4 if a == 0 else 2
        for i in range(count):
            pitch = 25 + (50 * i) // max(1, count - 1) + (3 * v) % 5
            result.append(Speaker(accent, variant, pitch, 35 + (7 * v + 11 * i) % 35))
    return result


def espeak_library():
    """The module ``espeakng_loader``.

    Raises:
        UserError: It is not installed.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "the synthetic corpus needs the Python package 'espeakng-loader', which is not "
            "installed: run  pip install espeakng-loader  (or install this package with its "
            "extra 'demo')"
        ) from None
    return espeakng_loader


class Synthesizer:
    """espeak-ng in this process (one instance a process: the library has global state)."""

    def __init__(self) -> None:
        loader = espeak_library()
        self._data = Path(loader.get_data_path())
        self._lib = ctypes.CDLL(str(loader.get_library_path()))
        rate = self._lib.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self._data).encode(), _DONT_EXIT
        )
        if rate <= 0:
            raise UserError(f"espeak-ng could not be started with its data in {self._data}")
        self._variants = sorted(path.name for path in (self._data / "voices" / "!v").iterdir())
        self._rate = rate
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept: ctypes does not hold a reference
        self._lib.espeak_SetSynthCallback(self._callback)
        self._lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._lib.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._lib.espeak_TextToPhonemes.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.c_int,
        ]

    def _receive(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def set_voice(self, accent: str, variant: str = "") -> None:
        """Select a voice.

        Raises:
            UserError: Unknown accent, or unknown variant (which espeak-ng would ignore silently).
        """
        if variant and variant not in self._variants:
            raise UserError(
                f"espeak-ng has no voice variant {variant!r}: choose one of "
                + ", ".join(self._variants)
            )
        name = f"{accent}+{variant}" if variant else accent
        if self._lib.espeak_SetVoiceByName(name.encode()) != 0:
            raise UserError(
                f"espeak-ng has no voice {accent!r}: choose one of {', '.join(ACCENTS)} or "
                "another of its language files"
            )

    def speak(self, text: str, speaker: Speaker, rate: int) -> np.ndarray:
        """Speech of one utterance.

        Args:
            text: Lower-case English words.
            speaker: The voice.
            rate: Speed in words a minute.

        Returns:
            Waveform (samples,), float32 in [-1, 1], 16 kHz.
        """
        self.set_voice(speaker.accent, speaker.variant)
        for parameter, value in (
            (_RATE, rate),
            (_PITCH, speaker.pitch),
            (_RANGE, speaker.pitch_range),
        ):
            self._lib.espeak_SetParameter(parameter, value, 0)
        # The noise of breath would otherwise depend on the time of day.
        self._lib.espeak_ng_SetRandSeed(1)
        data = text.encode()
        self._chunks = []
        status = self._lib.espeak_Synth(
            data, len(data) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng produced no speech for {text!r} (status {status})")
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        return soxr.resample(wave, self._rate, SAMPLE_RATE)

    def phonemes(self, text: str, accent: str) -> str:
        """espeak-ng's own phoneme string of ``text``."""
        self.set_voice(accent)
        buffer = ctypes.create_string_buffer(text.encode())
        position = ctypes.c_void_p(ctypes.addressof(buffer))
        parts = []
        while position.value:
            part = self._lib.espeak_TextToPhonemes(ctypes.byref(position), _CHARS_UTF8, 0)
            parts.append(part.decode())
        return " ".join(parts)
