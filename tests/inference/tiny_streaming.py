"""Tiny untrained models with streaming encoders."""

from pathlib import Path

import numpy as np

from tests.inference.tiny_asr import Files, make_asr

# Encoders, each with a seed of which no model is silent.
ENCODERS = {"emformer": 5, "streaming_conformer": 3}
MELS = 20

_FRONTEND = f"""
frontend_conf: {{n_fft: 512, win_length: 400, hop_length: 160, n_mels: {MELS}, fs: 16k}}
normalize: global_mvn
normalize_conf: {{stats_file: STATS}}
token_type: char
"""
_ENCODER = """
encoder: NAME
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 16, num_blocks: 2,
  chunk_size: 8, left_context: 16, right_context: 4, dropout_rate: 0.0}
"""


def make_streaming_asr(directory: Path, encoder: str, kind: str, more: str = "") -> Files:
    """A model of ``tiny_asr.KINDS`` with an encoder of ``ENCODERS``; ``more``: YAML."""
    stats = directory.parent / f"{directory.name}_stats.npz"
    stats.parent.mkdir(parents=True, exist_ok=True)
    np.savez(stats, count=9, sum=np.full(MELS, -56.5), sum_square=np.full(MELS, 375.0))
    conf = _FRONTEND.replace("STATS", str(stats)) + _ENCODER.replace("NAME", encoder) + more
    return make_asr(directory, kind, ENCODERS[encoder], conf)
