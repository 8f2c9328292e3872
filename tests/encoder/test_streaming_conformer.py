"""Streaming Conformer: the streaming contract, and a slow implementation frame by frame."""

import math

import pytest
import torch
from espnet.nets.pytorch_backend.transformer.attention import RelPositionMultiHeadedAttention
from espnet.nets.pytorch_backend.transformer.embedding import RelPositionalEncoding
from torch.nn.functional import glu

from espnet_llm_plugin.encoder.blocks import Layout
from espnet_llm_plugin.encoder.relative_attention import BlockRelPositionAttention, embed_distances
from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder
from espnet_llm_plugin.errors import UserError
from tests.contracts.streaming_contract import FEATURES, StreamingContract, assert_same, frames


def make(**options):
    defaults = dict(
        output_size=12,
        attention_heads=2,
        linear_units=16,
        num_blocks=2,
        cnn_module_kernel=5,
        positional_dropout_rate=0.0,
        dropout_rate=0.0,
    )
    return StreamingConformerEncoder(FEATURES, **{**defaults, **options})


class TestStreaming(StreamingContract):
    def make(self, **options):
        return make(**options)


class TestStackingWithLongAndShortKernels(StreamingContract):
    configurations = (
        dict(input_layer="stacking", cnn_module_kernel=1, right_context=8, left_context=16),
        dict(input_layer="stacking", cnn_module_kernel=16, right_context=0, left_context=16),
        dict(input_layer="conv2d", cnn_module_kernel=16, right_context=8, left_context=0),
        dict(cnn_module_kernel=9, num_blocks=3, right_context=8, left_context=8),
        dict(activation_type="relu", cnn_module_kernel=4, right_context=4, left_context=64),
        dict(subsampling_channels=3, right_context=8, left_context=8),
    )

    def make(self, **options):
        return make(**options)


def slow_reference(encoder, x):
    """One utterance (T, F) -> (T', D): every frame of every chunk by itself.

    A token is (position, chunk, whether it belongs to the chunk's right context).
    """
    chunk, right, left = (
        n // 4 for n in (encoder.chunk_size, encoder.right_context, encoder.left_context)
    )
    x = encoder.embed(encoder.reduction(x[None]))[0]
    length, width = x.shape
    tokens = []
    for n in range(math.ceil(length / chunk)):
        last = min((n + 1) * chunk + right, length)
        tokens += [(p, n, p >= (n + 1) * chunk) for p in range(n * chunk, last)]
    value = {token: x[token[0]] for token in tokens}
    for layer in encoder.layers:
        value = {
            t: v + 0.5 * layer.feed_forward_macaron(layer.norm_ff_macaron(v))
            for t, v in value.items()
        }
        normed = {t: layer.norm_mha(v) for t, v in value.items()}
        attended = {}
        for position, n, is_right in tokens:
            keys = [
                t
                for t in tokens
                if (not t[2] and n * chunk - left <= t[0] < (n + 1) * chunk) or (t[1] == n and t[2])
            ]
            token = (position, n, is_right)
            attended[token] = one_query(layer.self_attn, normed, token, keys, width)
        value = {t: v + attended[t] for t, v in value.items()}
        module = layer.conv_module
        gated = {t: glu(module.pointwise_conv1(layer.norm_conv(v))) for t, v in value.items()}
        for position, n, is_right in tokens:
            weight = module.depthwise_conv.weight[:, 0]  # (D, K)
            total = module.depthwise_conv.bias
            for back in range(weight.size(1)):
                p = position - back
                if p < 0:
                    continue
                in_right = p >= (n + 1) * chunk
                source = (p, n if in_right else p // chunk, in_right)
                total = total + weight[:, -1 - back] * gated[source]
            local = module.pointwise_conv2(module.activation(module.norm(total)))
            value[position, n, is_right] = value[position, n, is_right] + local
        value = {
            t: layer.norm_final(v + 0.5 * layer.feed_forward(layer.norm_ff(v)))
            for t, v in value.items()
        }
    return torch.stack([encoder.after_norm(value[p, p // chunk, False]) for p in range(length)])


def one_query(attention, normed, token, keys, width):
    """Transformer-XL attention, section 3.3, of one query, with a loop over its keys."""
    query = attention.linear_q(normed[token]).view(attention.h, attention.d_k)
    scores, values = [], []
    for key in keys:
        distance = torch.arange(0, width, 2).float()
        angle = (token[0] - key[0]) * torch.exp(distance * -math.log(10000.0) / width)
        sinusoid = torch.stack([angle.sin(), angle.cos()], 1).flatten().double()
        r = attention.linear_pos(sinusoid).view_as(query)
        k = attention.linear_k(normed[key]).view_as(query)
        score = ((query + attention.pos_bias_u) * k + (query + attention.pos_bias_v) * r).sum(1)
        scores.append(score / math.sqrt(attention.d_k))
        values.append(attention.linear_v(normed[key]).view_as(query))
    weights = torch.stack(scores).softmax(0)
    return attention.linear_out((weights[..., None] * torch.stack(values)).sum(0).flatten())


@pytest.mark.parametrize("right, left, chunk", [(0, 16, 8), (8, 16, 16), (4, 0, 8), (8, 400, 16)])
def test_equals_the_slow_reference(right, left, chunk):
    encoder = make(right_context=right, left_context=left, chunk_size=chunk).double().eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, lengths = frames(51)
    with torch.no_grad():
        actual, _, _ = encoder(x, lengths)
        expected = slow_reference(encoder, x[0])
    torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-6)


def test_one_block_equals_espnets_attention():
    torch.manual_seed(0)
    reference = RelPositionMultiHeadedAttention(2, 12, 0.0)
    ours = BlockRelPositionAttention(2, 12, 0.0)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(3, 9, 12)
    lengths = torch.tensor([9, 4, 7])
    _, positions = RelPositionalEncoding(12, 0.0)(x)
    mask = torch.arange(9) < lengths[:, None]
    expected = reference(x, x, x, positions, mask[:, None])
    distances = embed_distances(9, 9, like=x)
    torch.testing.assert_close(distances, positions[0])
    layout = Layout.make(1, 9, 0, 0, 0, lengths)
    actual, _ = ours(x[:, None], layout, x.new_zeros(3, 0, 24), distances)
    for b in range(3):
        torch.testing.assert_close(actual[b, 0, : lengths[b]], expected[b, : lengths[b]])


@pytest.mark.parametrize("factor", [2, 8])
def test_other_time_reductions(factor):
    encoder = make(subsampling=factor, chunk_size=16, right_context=8, left_context=16)
    encoder.double().eval()
    x, lengths = frames(61, 30)
    expected, olens, _ = encoder(x, lengths)
    assert olens.tolist() == [-(-61 // factor), -(-30 // factor)]
    state = encoder.initial_state(2)
    first, state = encoder.infer(x[:, :29], state)
    second, state = encoder.infer(x[:, 29:], state, torch.tensor([32, 1]))
    last = encoder.finish(state)
    assert_same(torch.cat([first.frames, second.frames, last.frames], 1), expected)


def test_channels_of_the_convolutions():
    convs = make(subsampling_channels=3).reduction.convs
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(1, 3), (3, 3)]
    assert [conv.out_channels for conv in make().reduction.convs] == [12, 12]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(input_layer="linear"), "unknown input_layer 'linear'; choose one of: conv2d, stack"),
        (dict(subsampling=3, chunk_size=12, left_context=12), "must be 2, 4 or 8, got 3"),
        (dict(subsampling_channels=0), "subsampling_channels must be positive, got 0"),
        (
            dict(input_layer="stacking", subsampling_channels=4),
            "subsampling_channels are those of input_layer conv2d, got input_layer 'stacking'",
        ),
        (dict(cnn_module_kernel=0), "cnn_module_kernel must be at least 1"),
        (
            dict(input_layer="stacking", output_size=10, attention_heads=2),
            r"output_size \(10\) must be a multiple of subsampling \(4\)",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_too_few_features():
    with pytest.raises(UserError, match="5 features are too few"):
        StreamingConformerEncoder(5)
