"""Adapters against slow references, one utterance and one frame at a time."""

import math

import pytest
import torch

from espnet_llm_plugin.encoder.adapters import ADAPTERS, build_adapter
from espnet_llm_plugin.encoder.adapters_layers import ExtraLayers
from espnet_llm_plugin.encoder.adapters_postencoder import FrameStackingPostEncoder
from espnet_llm_plugin.encoder.adapters_reduction import (
    mean_of_segments,
    stack_frames,
)
from espnet_llm_plugin.encoder.ctc_segments import ctc_segments
from espnet_llm_plugin.errors import UserError

ENCODER, HIDDEN, LABELS = 6, 8, 5
LENGTHS = (7, 3, 0, 1, 8)
SMALL = dict(attention_heads=2, linear_units=12, dropout_rate=0.0)

CONFIGURATIONS = [
    ("frame_stacking", {}),
    ("frame_stacking", dict(stack=3)),
    ("frame_stacking", dict(stack=12, projection="mlp", projection_units=5)),
    ("frame_stacking", dict(stack=2, match_text_scale=True)),
    ("frame_stacking", dict(stack=2, extra_layers=2, extra_layers_conf=SMALL)),
    (
        "frame_stacking",
        dict(stack=2, extra_layers=2, extra_layers_conf=dict(layer_type="transformer", **SMALL)),
    ),
    ("ctc_compression", dict(threshold=0.5)),
    ("ctc_compression", dict(threshold=0.0, projection="mlp", match_text_scale=True)),
    ("ctc_compression", dict(threshold=0.3, extra_layers=1, extra_layers_conf=SMALL)),
    ("ctc_embedding", {}),
    ("ctc_embedding", dict(stack=3, projection="linear", gate=0.7, blank_weight=0.5)),
]
ids = [f"{name}-{'-'.join(map(str, conf)) or 'default'}" for name, conf in CONFIGURATIONS]
every_adapter = pytest.mark.parametrize("name, conf", CONFIGURATIONS, ids=ids)


def make(name, conf, text_scale=0.2):
    return build_adapter(name, ENCODER, HIDDEN, text_scale=text_scale, **conf).double().eval()


def batch(lengths=LENGTHS, num_frames=10):
    """Encoder output, lengths, CTC with runs of labels, label embeddings; NaN as padding."""
    hs = torch.randn(len(lengths), num_frames, ENCODER, dtype=torch.double)
    logits = torch.randn(len(lengths), num_frames, LABELS, dtype=torch.double)
    label = torch.randint(0, 3, (len(lengths), num_frames)) // 2  # long runs
    logits.scatter_add_(2, label[..., None], torch.full_like(logits[..., :1], 2.5))
    log_probs = logits.log_softmax(-1)
    for b, length in enumerate(lengths):
        hs[b, length:] = math.nan
        log_probs[b, length:] = math.nan
    return hs, torch.tensor(lengths), log_probs, torch.randn(LABELS, HIDDEN, dtype=torch.double)


def slow_stack(frames, n):
    """Frames (T, E) of one utterance -> list of (n * E,)."""
    zero = torch.zeros(frames.size(1), dtype=frames.dtype)
    stacked = []
    for start in range(0, len(frames), n):
        group = [frames[t] if t < len(frames) else zero for t in range(start, start + n)]
        stacked.append(torch.cat(group))
    return stacked


def slow_compress(frames, log_probs, threshold):
    """arXiv 2603.15045: the merge mask frame by frame, then the mean of every segment."""
    segments = []
    for t in range(len(frames)):
        merge = False
        if t > 0:
            now, before = log_probs[t].argmax(), log_probs[t - 1].argmax()
            merge = (
                now == before
                and log_probs[t, now].exp() >= threshold
                and log_probs[t - 1, before].exp() >= threshold
            )
        if not merge:
            segments.append([])
        segments[-1].append(frames[t])
    return [torch.stack(segment).mean(0) for segment in segments]


def slow_expected_embedding(log_probs, labels, n, weight):
    """Expected embedding of every group of n frames of one utterance, label by label."""
    groups = []
    for start in range(0, len(log_probs), n):
        vector, mass = weight * labels[0], weight
        for row in log_probs[start : start + n]:
            for v in range(1, len(row)):
                vector = vector + row[v].exp() * labels[v]
                mass = mass + row[v].exp()
        groups.append(vector / mass)
    return groups


@torch.no_grad()
def slow_reference(adapter, hs, log_probs, labels):
    """One utterance without padding -> list of embeddings."""
    if adapter.extra_layers is not None:
        hs = adapter.extra_layers(hs[None], torch.tensor([len(hs)]))[0]
    if adapter.name == "ctc_compression":
        reduced = slow_compress(hs, log_probs, adapter.threshold)
    else:
        reduced = slow_stack(hs, adapter.stack)
    embeddings = []
    for frame in reduced:
        x = adapter.projection(frame)
        if adapter.scale is not None:
            rms = (x.square().mean() + 1e-6).sqrt()
            x = x / rms * adapter.scale.weight
        embeddings.append(x)
    if adapter.name == "ctc_embedding":
        expected = slow_expected_embedding(log_probs, labels, adapter.stack, adapter.blank_weight)
        embeddings = [e + adapter.gate * x for e, x in zip(expected, embeddings, strict=True)]
    return embeddings


@every_adapter
def test_equals_slow_reference_for_every_utterance_of_a_ragged_batch(name, conf):
    adapter = make(name, conf)
    hs, hlens, log_probs, labels = batch()
    embeddings, lengths = adapter(hs, hlens, log_probs, labels)
    assert embeddings.shape == (len(hs), int(lengths.max()), HIDDEN)
    for b, length in enumerate(LENGTHS):
        if length == 0:
            assert lengths[b] == 0
        else:
            expected = slow_reference(adapter, hs[b, :length], log_probs[b, :length], labels)
            assert lengths[b] == len(expected)
            torch.testing.assert_close(embeddings[b, : lengths[b]], torch.stack(expected))
        assert torch.equal(
            embeddings[b, lengths[b] :], torch.zeros_like(embeddings[b, lengths[b] :])
        )


@every_adapter
def test_ragged_batch_equals_each_alone(name, conf):
    adapter = make(name, conf)
    hs, hlens, log_probs, labels = batch()
    embeddings, lengths = adapter(hs, hlens, log_probs, labels)
    for b, length in enumerate(LENGTHS):
        alone, one = adapter(
            hs[b : b + 1, :length], hlens[b : b + 1], log_probs[b : b + 1, :length], labels
        )
        assert one[0] == lengths[b] == alone.size(1)
        torch.testing.assert_close(embeddings[b, : one[0]], alone[0])


@every_adapter
def test_gradient_reaches_every_parameter_and_the_frames_but_no_padding(name, conf):
    adapter = make(name, conf).train()
    hs, hlens, log_probs, labels = batch()
    hs.requires_grad_()
    log_probs.requires_grad_()
    labels.requires_grad_()
    embeddings, _ = adapter(hs, hlens, log_probs, labels)
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    for b, length in enumerate(LENGTHS):
        assert (hs.grad[b, :length].abs().sum(-1) > 0).all()
        assert (hs.grad[b, length:] == 0).all()
    expected = name == "ctc_embedding"
    assert (labels.grad is not None) == (log_probs.grad is not None) == expected
    if expected:
        assert (log_probs.grad[0, : LENGTHS[0]].abs().sum(-1) > 0).all()
        assert (log_probs.grad[1, LENGTHS[1] :] == 0).all()


@every_adapter
def test_gradcheck(name, conf):
    adapter = make(name, conf)
    hs, hlens, log_probs, labels = batch((4, 2), num_frames=4)
    hs = torch.nan_to_num(hs).requires_grad_()
    torch.autograd.gradcheck(lambda x: adapter(x, hlens, log_probs, labels)[0], hs)


@every_adapter
def test_no_frames_at_all(name, conf):
    adapter = make(name, conf)
    hs, hlens, log_probs, labels = batch((0, 0))
    for num_frames in (0, 4):
        embeddings, lengths = adapter(hs[:, :num_frames], hlens, log_probs[:, :num_frames], labels)
        assert embeddings.shape == (2, 0, HIDDEN)
        assert lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_half_precision(name):
    hs, hlens, log_probs, labels = (x.bfloat16() if x.is_floating_point() else x for x in batch())
    adapter = build_adapter(name, ENCODER, HIDDEN, text_scale=0.2).eval()
    expected, _ = adapter(hs.float(), hlens, log_probs.float(), labels.float())
    found, _ = adapter.bfloat16()(hs, hlens, log_probs, labels)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@every_adapter
def test_mixed_precision(name, conf):
    hs, hlens, log_probs, labels = (x.float() if x.is_floating_point() else x for x in batch())
    adapter = build_adapter(name, ENCODER, HIDDEN, text_scale=0.2, **conf)
    expected, _ = adapter.eval()(hs, hlens, log_probs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = adapter(hs, hlens, log_probs, labels)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@pytest.mark.parametrize("n", (1, 2, 3, 6, 12))
def test_strides_of_80_to_960_ms(n):
    frames, lengths = torch.randn(3, 25, 4), torch.tensor([25, 24, 1])
    stacked, positions = stack_frames(frames, lengths, n)
    assert positions.tolist() == [math.ceil(length / n) for length in lengths.tolist()]
    assert stacked.shape == (3, math.ceil(25 / n), 4 * n)


def test_compression_merges_sure_runs_of_labels_and_of_blank():
    #        blank blank   a     a    a (unsure)  a     b     b
    label = [0, 0, 1, 1, 1, 1, 2, 2]
    prob = [0.9, 0.95, 0.9, 0.9, 0.6, 0.9, 0.9, 0.9]
    probs = torch.tensor([[(1 - p) / 2] * 3 for p in prob])
    probs[torch.arange(8), label] = torch.tensor(prob)
    lengths = torch.tensor([8])
    segments, counts = ctc_segments(probs[None].log(), lengths, threshold=0.8)
    assert segments.tolist() == [[0, 0, 1, 1, 2, 3, 4, 4]]
    assert counts.tolist() == [5]
    means = mean_of_segments(torch.arange(8.0)[None, :, None], lengths, segments, counts)
    assert means.flatten().tolist() == [0.5, 2.5, 4.0, 5.0, 6.5]
    # the threshold 0 merges every run, 1 none of these
    every_run, _ = ctc_segments(probs[None].log(), lengths, threshold=0.0)
    assert every_run.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2]]
    assert ctc_segments(probs[None].log(), lengths, 1.0)[1].tolist() == [8]


def test_long_silence_is_averaged_exactly_in_half_precision():
    frames, lengths = torch.ones(1, 3000, 1, dtype=torch.bfloat16), torch.tensor([3000])
    segments = ctc_segments(torch.zeros(1, 3000, 1), lengths, 0.9)
    assert mean_of_segments(frames, lengths, *segments).tolist() == [[[1.0]]]


def test_matched_scale_is_that_of_the_text():
    hs, hlens, *_ = batch()
    plain = make("frame_stacking", dict(stack=2))
    matched = make("frame_stacking", dict(stack=2, match_text_scale=True), text_scale=0.037)

    def rms(adapter):
        embeddings, lengths = adapter(hs, hlens)
        return embeddings[0, : lengths[0]].square().mean().sqrt().item()

    assert rms(matched) == pytest.approx(0.037, rel=1e-3)
    assert rms(plain) > 0.1


def test_sure_ctc_gives_the_embedding_of_its_label_or_of_silence():
    adapter = make("ctc_embedding", dict(gate=0.0, blank_weight=1e-3))
    probs = torch.full((1, 3, LABELS), 1e-6, dtype=torch.double)
    probs[0, [0, 1, 2], [2, 0, 4]] = 1.0
    labels = torch.randn(LABELS, HIDDEN, dtype=torch.double)
    hs = torch.randn(1, 3, ENCODER, dtype=torch.double)
    embeddings, _ = adapter(hs, torch.tensor([3]), probs.log(), labels)
    torch.testing.assert_close(embeddings[0], labels[[2, 0, 4]], atol=0.02, rtol=0.0)


@pytest.mark.parametrize("layer_type", ("conformer", "transformer"))
def test_extra_layers_see_both_ways(layer_type):
    layers = ExtraLayers(ENCODER, 1, layer_type, 2, 12, 3, 0.0).double().eval()
    hs = torch.randn(1, 9, ENCODER, dtype=torch.double, requires_grad=True)
    layers(hs, torch.tensor([9]))[0, 4, 0].backward()
    assert (hs.grad[0].abs().sum(-1) > 0).all()


def test_conformer_layer_equals_espnets():
    """Same parameters, except that frames are normalised one by one instead of over the batch."""
    from espnet.nets.pytorch_backend.conformer.convolution import ConvolutionModule
    from espnet.nets.pytorch_backend.conformer.encoder_layer import EncoderLayer
    from espnet.nets.pytorch_backend.transformer.attention import RelPositionMultiHeadedAttention
    from espnet.nets.pytorch_backend.transformer.embedding import RelPositionalEncoding
    from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import (
        PositionwiseFeedForward,
    )

    size, kernel = 8, 5
    extra = ExtraLayers(size, 1, "conformer", 2, 12, kernel, 0.0).eval()
    ours = extra.layers[0]

    class FrameNorm(torch.nn.Module):
        def forward(self, x):
            return ours.conv_module.norm(x.transpose(1, 2)).transpose(1, 2)

    theirs = EncoderLayer(
        size,
        RelPositionMultiHeadedAttention(2, size, 0.0),
        PositionwiseFeedForward(size, 12, 0.0, torch.nn.SiLU()),
        PositionwiseFeedForward(size, 12, 0.0, torch.nn.SiLU()),
        ConvolutionModule(size, kernel, torch.nn.SiLU()),
        0.0,
    ).eval()
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if not key.startswith("conv_module.norm"):
            state[key] = value[..., None] if "pointwise" in key and value.dim() == 2 else value
    theirs.load_state_dict(state)
    theirs.conv_module.norm = FrameNorm()
    hs = torch.randn(1, 11, size)
    encoding = RelPositionalEncoding(size, 0.0).eval()
    _, positions = encoding(hs)
    (expected, _), _ = theirs((hs, positions), torch.ones(1, 1, 11, dtype=torch.bool))
    torch.testing.assert_close(extra(hs, torch.tensor([11])), extra.after_norm(expected))


def test_dropout_acts_in_training_only():
    hs, hlens, *_ = batch()
    for conf in (dict(dropout_rate=0.5), dict(dropout_rate=0.5, projection="mlp")):
        adapter = make("frame_stacking", conf)
        assert torch.equal(adapter(hs, hlens)[0], adapter(hs, hlens)[0])
        adapter.train()
        assert not torch.equal(adapter(hs, hlens)[0], adapter(hs, hlens)[0])


class TestPostEncoder:
    def test_is_the_adapter(self):
        post = FrameStackingPostEncoder(ENCODER, HIDDEN, stack=3).double()
        hs, hlens, *_ = batch()
        found, lengths = post(hs, hlens)
        assert post.output_size() == HIDDEN
        expected, expected_lengths = post.adapter(hs, hlens)
        assert torch.equal(found, expected) and torch.equal(lengths, expected_lengths)
        # what ESPnetASRModel.encode asserts
        assert found.size(1) <= lengths.max()

    def test_keeps_the_width_unless_told(self):
        assert FrameStackingPostEncoder(ENCODER).output_size() == ENCODER

    def test_refuses_unknown_options(self):
        with pytest.raises(UserError, match=r"postencoder_conf: unknown option 'stak'.*stack"):
            FrameStackingPostEncoder(ENCODER, stak=3)

    def test_in_espnets_model(self, tmp_path):
        """A CTC model with the post-encoder, built, trained for a step and decoded by ESPnet."""
        from espnet_llm_plugin import compat, registry

        registry.register(("encoder", "postencoder"))
        ASRTask = compat.import_quietly("espnet2.tasks.asr").ASRTask
        parser = ASRTask.get_parser()
        args = parser.parse_args(
            ["--output_dir", str(tmp_path), "--postencoder", "frame_stacking"]
            + ["--encoder", "streaming_conformer", "--input_size", "20"]
        )
        args.token_list = ["<blank>", "<unk>", "a", "b", "<sos/eos>"]
        args.frontend, args.normalize, args.specaug = None, None, None
        args.encoder_conf = dict(
            output_size=ENCODER, attention_heads=2, linear_units=8, num_blocks=1, chunk_size=None
        )
        args.postencoder_conf = dict(stack=2, output_size=HIDDEN)
        args.model_conf = dict(ctc_weight=1.0)
        model = ASRTask.build_model(args)
        assert model.ctc.ctc_lo.in_features == HIDDEN
        speech, lengths = torch.randn(2, 60, 20), torch.tensor([60, 33])
        text, text_lengths = torch.tensor([[2, 3], [3, -1]]), torch.tensor([2, 1])
        loss, _, _ = model(speech, lengths, text, text_lengths)
        loss.backward()
        assert model.postencoder.adapter.projection[1].weight.grad.abs().sum() > 0
        encoded, encoded_lengths = model.encode(speech, lengths)
        assert encoded_lengths.tolist() == [math.ceil(15 / 2), math.ceil(9 / 2)]
        assert encoded.shape == (2, 8, HIDDEN)


class TestErrors:
    @pytest.mark.parametrize(
        "name, conf, message",
        [
            ("frame_staking", {}, "unknown adapter 'frame_staking'.*frame_stacking"),
            ("frame_stacking", dict(stride=3), "unknown option 'stride'.*stack"),
            ("frame_stacking", dict(stack=0), "stack must be a whole number.*got 0"),
            ("frame_stacking", dict(stack=1.5), "stack must be a whole number.*got 1.5"),
            ("frame_stacking", dict(projection="conv"), "unknown projection 'conv'.*linear, mlp"),
            ("frame_stacking", dict(projection_units=5), "projection_units .5. is for .*mlp"),
            ("frame_stacking", dict(extra_layers=-1), "extra_layers must be 0 or more"),
            ("frame_stacking", dict(extra_layers_conf=SMALL), "extra_layers is 0"),
            (
                "frame_stacking",
                dict(extra_layers=1, extra_layers_conf=dict(heads=2)),
                "extra_layers_conf: unknown option 'heads'",
            ),
            (
                "frame_stacking",
                dict(extra_layers=1, extra_layers_conf=dict(attention_heads=4)),
                r"output size \(6\) must be a multiple of attention_heads \(4\)",
            ),
            (
                "frame_stacking",
                dict(extra_layers=1, extra_layers_conf=dict(SMALL, cnn_module_kernel=4)),
                "cnn_module_kernel must be odd, got 4",
            ),
            (
                "frame_stacking",
                dict(extra_layers=1, extra_layers_conf=dict(SMALL, layer_type="lstm")),
                "unknown layer_type 'lstm'",
            ),
            ("frame_stacking", dict(match_text_scale=True), "positive number, got None"),
            ("ctc_compression", dict(threshold=1.1), "threshold is a probability.*1.1"),
            ("ctc_embedding", {}, "positive number, got None"),
            ("ctc_embedding", dict(blank_weight=0.0), "blank_weight must be positive, got 0.0"),
        ],
    )
    def test_options(self, name, conf, message):
        with pytest.raises(UserError, match=message):
            build_adapter(name, ENCODER, HIDDEN, **conf)

    @pytest.mark.parametrize("name", ("ctc_compression", "ctc_embedding"))
    def test_missing_or_foreign_ctc(self, name):
        adapter = make(name, {})
        hs, hlens, log_probs, labels = batch()
        with pytest.raises(UserError, match="needs the encoder's CTC output.*ctc_weight"):
            adapter(hs, hlens)
        with pytest.raises(UserError, match="does not belong to encoder output"):
            adapter(hs, hlens, log_probs[:, ::2], labels)

    def test_labels_of_another_vocabulary(self):
        adapter = make("ctc_embedding", {})
        hs, hlens, log_probs, labels = batch()
        for wrong in (None, labels[:-1]):
            with pytest.raises(UserError, match=r"\(5, 8\), got .*the CTC must have the LLM's"):
                adapter(hs, hlens, log_probs, wrong)

    def test_lengths_beyond_the_frames(self):
        hs, hlens, *_ = batch()
        with pytest.raises(ValueError, match="lengths up to 11 of 10 frames"):
            make("frame_stacking", {})(hs, hlens + 3)
