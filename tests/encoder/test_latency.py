"""The algorithmic latency, as computed from a configuration and as printed."""

import logging

import pytest
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from espnet2.asr.frontend.default import DefaultFrontend

from espnet_llm_plugin.encoder.latency import algorithmic_latency, log_latency
from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder
from tests.encoder.test_emformer import make

FRONTEND = dict(fs="16k", n_fft=512, win_length=400, hop_length=160)


def test_paper_configuration(caplog):
    frontend = DefaultFrontend(**FRONTEND)
    encoder = make(chunk_size=16, right_context=4)
    assert encoder.algorithmic_latency_ms(10.0) == 200.0
    latency = algorithmic_latency(frontend, encoder)
    assert (latency.chunk, latency.right_context, latency.window) == (160, 40, 7.5625)
    assert latency.longest == 207.5625 and latency.mean == 127.5625
    with caplog.at_level(logging.INFO):
        log_latency(frontend, encoder)
    assert caplog.messages == [
        "streaming encoder: algorithmic latency 207.56 ms (chunk 160 + right context 40 + analysis "
        "window 7.5625), mean over a chunk 127.56 ms"
    ]


@pytest.mark.parametrize("chunk, expected", [(8, 87.5625), (32, 327.5625), (64, 647.5625)])
def test_follows_the_chunk_size_set_for_decoding(chunk, expected):
    encoder = StreamingConformerEncoder(20, output_size=8, attention_heads=2, num_blocks=1)
    encoder.set_chunk_size(chunk)
    assert algorithmic_latency(DefaultFrontend(**FRONTEND), encoder).longest == expected


def test_nothing_where_nothing_streams(caplog):
    frontend, encoder = DefaultFrontend(**FRONTEND), make()
    offline = TransformerEncoder(80, output_size=8, attention_heads=2, num_blocks=1)
    assert algorithmic_latency(frontend, offline) is None
    assert algorithmic_latency(None, encoder) is None
    encoder.set_chunk_size(None)
    assert algorithmic_latency(frontend, encoder) is None
    with caplog.at_level(logging.INFO):
        log_latency(frontend, encoder)
    assert not caplog.messages
