"""Noise for synthetic speech: coloured noise and babble at a random signal-to-noise ratio."""

from typing import Sequence

import numpy as np

LOWEST_SNR_DB, HIGHEST_SNR_DB = 5.0, 25.0
LEVEL_DB = (-29.0, -23.0)  # RMS of the speech, relative to full scale
PEAK = 0.95
TALKERS = 4


def coloured_noise(samples: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with RMS 1 whose spectrum changes by ``slope`` dB an octave.

    Args:
        samples: Length, at least 2.
        slope: 0 is white, -3 pink, -6 brown.
        rng: Source of randomness.
    """
    length = -(-samples // 4096) * 4096  # a length with small prime factors: a fast FFT
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[0] = 0.0
    frequency = np.arange(1, len(spectrum))
    # 20 log10(2 ** exponent) = slope
    spectrum[1:] *= frequency ** (slope / (20.0 * np.log10(2.0)))
    noise = np.fft.irfft(spectrum, length)[:samples]
    return noise / _rms(noise)


def babble(samples: int, talkers: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Several people speaking at once, RMS 1: each voice is looped from a random offset.

    Args:
        samples: Length.
        talkers: Waveforms (any lengths) of clean speech; :data:`TALKERS` of them are mixed.
        rng: Source of randomness.
    """
    mixture = np.zeros(samples)
    for index in rng.choice(len(talkers), size=TALKERS, replace=len(talkers) < TALKERS):
        voice = talkers[index]
        start = rng.integers(len(voice))
        mixture += np.take(voice, np.arange(start, start + samples), mode="wrap") / _rms(voice)
    return mixture / _rms(mixture)


def degrade(speech: np.ndarray, talkers: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Set the level, add noise, and keep the peak below full scale.

    The noise is coloured noise (0 to -6 dB an octave) and babble in a random proportion; the SNR is
    uniform in 5..25 dB, where the signal's power is its mean over ``speech``.

    Args:
        speech: Clean waveform (samples,).
        talkers: Clean speech for the babble.
        rng: Source of randomness; the same state gives the same result.

    Returns:
        Waveform (samples,), int16.
    """
    share = rng.uniform()
    noise = np.sqrt(share) * coloured_noise(len(speech), rng.uniform(-6.0, 0.0), rng)
    noise += np.sqrt(1.0 - share) * babble(len(speech), talkers, rng)
    snr = rng.uniform(LOWEST_SNR_DB, HIGHEST_SNR_DB)
    signal = speech / _rms(speech)
    mixture = signal + noise * (10.0 ** (-snr / 20.0) / _rms(noise))
    mixture *= 10.0 ** (rng.uniform(*LEVEL_DB) / 20.0)
    mixture *= min(1.0, PEAK / np.abs(mixture).max())
    return np.round(mixture * 32767.0).astype(np.int16)


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) or 1.0
