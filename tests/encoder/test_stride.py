"""Milliseconds per frame, against what encoders really put out."""

import pytest
import torch
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.frontend.default import DefaultFrontend

from espnet_llm_plugin.encoder.adapters import build_adapter
from espnet_llm_plugin.encoder.adapters_postencoder import FrameStackingPostEncoder
from espnet_llm_plugin.encoder.emformer import EmformerEncoder
from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder
from espnet_llm_plugin.encoder.stride import encoder_frame_ms

TINY = dict(output_size=8, attention_heads=2, linear_units=8, num_blocks=1)
ENCODERS = {
    "conformer": ConformerEncoder,
    "e_branchformer": EBranchformerEncoder,
    "emformer": EmformerEncoder,
    "streaming_conformer": StreamingConformerEncoder,
}


def measured_ms(encoder, shift, postencoder=None):
    """From the growth of the output between 3 and 6 s, so that edges do not count."""
    lengths = torch.tensor([round(3000 / shift), round(6000 / shift)])
    encoder.eval()
    encoded, encoded_lengths = encoder(torch.randn(2, int(lengths[1]), 40), lengths)[:2]
    if postencoder is not None:
        _, encoded_lengths = postencoder(encoded, encoded_lengths)
    return 3000 / float(encoded_lengths[1] - encoded_lengths[0])


@pytest.mark.parametrize(
    "name, conf",
    [
        ("conformer", {}),
        *[("conformer", dict(input_layer=f"conv2d{n}")) for n in (1, 2, 6, 8)],
        ("conformer", dict(input_layer="linear")),
        *[("e_branchformer", dict(input_layer=f"conv1d{n}")) for n in (1, 2, 3)],
        ("streaming_conformer", dict(chunk_size=None)),
        ("streaming_conformer", dict(chunk_size=None, subsampling=8)),
        ("emformer", dict(subsampling=2)),
        ("emformer", {}),
    ],
)
@torch.no_grad()
def test_equals_what_the_encoder_does(name, conf):
    config = dict(encoder=name, encoder_conf=conf, frontend_conf=dict(hop_length=160, fs="16k"))
    encoder = ENCODERS[name](40, **TINY, **conf)
    assert encoder_frame_ms(config) == pytest.approx(measured_ms(encoder, 10), rel=0.05)
    config.update(postencoder="frame_stacking", postencoder_conf=dict(stack=3))
    post = FrameStackingPostEncoder(8, stack=3)
    assert encoder_frame_ms(config) == pytest.approx(measured_ms(encoder, 10, post), rel=0.05)


def test_frontend_defaults_are_espnets():
    frontend = DefaultFrontend()
    shift = 1000 * frontend.hop_length / frontend.logmel.mel_options["sr"]
    assert encoder_frame_ms(dict(encoder="conformer")) == 4 * shift


def test_other_rates_and_postencoders():
    config = dict(encoder="conformer", frontend_conf=dict(fs=8000, hop_length=80))
    assert encoder_frame_ms(config) == 40
    config.update(postencoder="frame_stacking", postencoder_conf={})
    assert encoder_frame_ms(config) == 80
    config.update(postencoder="length_adaptor", postencoder_conf=dict(length_adaptor_n_layers=2))
    assert encoder_frame_ms(config) == 160


@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(encoder="whisper"),
        dict(encoder="conformer", frontend="s3prl"),
        dict(encoder="conformer", input_size=80),
        dict(encoder="conformer", preencoder="sinc"),
        dict(encoder="conformer", postencoder="hugging_face_transformers"),
        dict(encoder="conformer", encoder_conf=dict(input_layer="conv2d9")),
    ],
)
def test_unknown_instead_of_wrong(config):
    assert encoder_frame_ms(config) is None


@pytest.mark.parametrize(
    "name, conf, text",
    [
        ("frame_stacking", dict(stack=6), "one embedding per 240 ms (6 encoder frames of 40 ms)"),
        (
            "ctc_compression",
            dict(threshold=0.8),
            "one embedding per run of encoder frames of 40 ms with one CTC label (probability "
            "from 0.8 on)",
        ),
        (
            "ctc_embedding",
            dict(stack=2),
            "one embedding per 80 ms (2 encoder frames of 40 ms), with the CTC's expected text "
            "embedding",
        ),
    ],
)
def test_description(name, conf, text):
    adapter = build_adapter(name, 4, 4, text_scale=1.0, **conf)
    assert adapter.describe(40.0) == text
    assert " ms" not in adapter.describe(None)
