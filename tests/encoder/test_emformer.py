"""Emformer: the streaming contract, and torchaudio's implementation as the reference."""

import pytest
import torch
from torchaudio.models import Emformer

from espnet_llm_plugin.encoder.emformer import EmformerEncoder
from tests.contracts.streaming_contract import (
    FEATURES,
    StreamingContract,
    frames,
    stream,
)

FLOAT32_SOFTMAX = dict(rtol=1e-5, atol=1e-6)  # which torchaudio computes whatever the type


def make(**options):
    defaults = dict(output_size=16, attention_heads=2, linear_units=24, num_blocks=2)
    return EmformerEncoder(FEATURES, **{**defaults, "dropout_rate": 0.0, **options})


class TestStreaming(StreamingContract):
    def make(self, **options):
        return make(**options)


@pytest.fixture
def pair():
    """Ours and torchaudio's with the same parameters; 4 frames + 1 of right context, left 8."""
    ours = make(chunk_size=16, right_context=4, left_context=32, activation_type="relu")
    torch.nn.init.normal_(ours.emformer.emformer_layers[0].attention.out_proj.bias)
    reference = Emformer(
        16, 2, 24, 2, segment_length=4, left_context_length=8, right_context_length=1
    )
    reference.load_state_dict(ours.emformer.state_dict(), strict=True)
    return ours.double().eval(), reference.double().eval()


def test_equals_torchaudio_on_whole_utterances(pair):
    ours, reference = pair
    x, lengths = frames(4 * 25, 4 * 25, seed=1)
    expected, _ = reference(ours.reduction(x), torch.tensor([24, 24]))
    # torchaudio returns no frames for the last right context
    actual, _, _ = ours(x, lengths)
    torch.testing.assert_close(actual[:, :24], expected, **FLOAT32_SOFTMAX)


def test_equals_torchaudio_on_streams(pair):
    ours, reference = pair
    x, _ = frames(4 * 25, 4 * 25, seed=2)
    reduced, states, expected = ours.reduction(x), None, []
    for start in range(0, 24, 4):
        chunk = reduced[:, start : start + 5]
        output, _, states = reference.infer(chunk, torch.tensor([5, 5]), states)
        expected.append(output)
    actual, _ = stream(ours, x, [100])
    torch.testing.assert_close(actual[:, :24], torch.cat(expected, 1), **FLOAT32_SOFTMAX)


def test_paper_scale_is_the_default_and_is_that_of_torchaudio():
    from torchaudio.models import emformer_rnnt_base

    with torch.device("meta"):
        ours, theirs = EmformerEncoder(80), emformer_rnnt_base(4097).transcriber
    assert ours.chunk_size == 16 and ours.right_context == 4 and ours.output_size() == 512
    assert {k: v.shape for k, v in ours.emformer.state_dict().items()} == {
        k: v.shape for k, v in theirs.transformer.state_dict().items()
    }
    assert ours.reduction.linear.weight.shape == theirs.input_linear.weight.shape


def test_initialisation_by_depth_as_in_torchaudio():
    encoder = make(num_blocks=9, output_size=64)
    layers = encoder.emformer.emformer_layers
    first, last = (layers[i].attention.emb_to_query.weight.std().item() for i in (0, 8))
    assert last / first == pytest.approx(1 / 3, rel=0.1)
