"""What every streaming encoder must show: a stream gives what the whole utterance gives.

B utterances or streams, T input frames, F features, D output width.
"""

import math

import numpy as np
import pytest
import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.layers.global_mvn import GlobalMVN
from torch import Tensor

from espnet_llm_plugin.encoder.latency import algorithmic_latency
from espnet_llm_plugin.encoder.streaming import AbsStreamingEncoder
from espnet_llm_plugin.encoder.streaming_frontend import StreamingFrontend
from espnet_llm_plugin.errors import UserError

FEATURES = 20
RATE, HOP = 8000, 80
CHUNKS = (8, 16, 32, 64)


def frames(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, T, F) with NaN as padding, and the lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), FEATURES, generator=generator, dtype=torch.double)
    for row, length in zip(x, lengths):
        row[length:] = math.nan
    return x, torch.tensor(lengths)


def random_split(total: int, generator: torch.Generator, longest: int) -> list[int]:
    """Lengths of pieces, among them 0, 1 and ``longest``, that add up to ``total``."""
    pieces, rest = [0, 1], total - 1
    while rest > 0:
        draw = int(torch.randint(4, (), generator=generator))
        size = (1, 3, longest, int(torch.randint(longest, (), generator=generator)))[draw]
        pieces.append(min(size, rest))
        rest -= pieces[-1]
    return pieces


def stream(encoder: AbsStreamingEncoder, x: Tensor, pieces: list[int], lengths=None):
    """Feed pieces (B, piece, F); return the output (B, T', D) and lengths (B,)."""
    state = encoder.initial_state(len(x))
    outputs, totals, begin = [], 0, 0
    for size in pieces:
        piece = x[:, begin : begin + size]
        valid = None if lengths is None else (lengths - begin).clamp(0, size)
        encoded, state = encoder.infer(piece, state, valid)
        outputs.append(encoded.frames)
        totals = totals + encoded.lengths
        begin += size
    assert begin == x.size(1)
    encoded = encoder.finish(state)
    return torch.cat([*outputs, encoded.frames], 1), totals + encoded.lengths


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class StreamingContract:
    """Mixin; a subclass gives :meth:`make` and the configurations it is to be tried in."""

    def make(self, **options) -> AbsStreamingEncoder:
        """An encoder of F features with a time reduction of 4; dropout 0 unless in options."""
        raise NotImplementedError

    #: options of :meth:`make`; subclasses may add to them
    configurations = (
        dict(right_context=0, left_context=32),
        dict(right_context=8, left_context=32),
        dict(right_context=4, left_context=12),
        dict(right_context=8, left_context=0),
        dict(right_context=4, left_context=400),
    )

    @pytest.fixture(params=range(5), ids=lambda i: f"configuration{i}")
    def encoder(self, request):
        torch.manual_seed(3)
        return self.make(**self.configurations[request.param]).double().eval()

    @pytest.fixture
    def default(self):
        torch.manual_seed(3)
        return self.make(right_context=4, left_context=32).double().eval()

    # a stream is the whole utterance

    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_stream_equals_whole_for_every_chunk_size(self, encoder, chunk):
        encoder.set_chunk_size(chunk)
        for length in (1, 3, 4, 16, 23, 24, 25, 73):
            x, lengths = frames(length)
            expected, expected_lengths, _ = encoder(x, lengths)
            assert expected_lengths.tolist() == [math.ceil(length / 4)] == [expected.size(1)]
            actual, actual_lengths = stream(encoder, x, [length])
            assert_same(actual, expected)
            assert actual_lengths.equal(expected_lengths)

    def test_any_split_of_the_input(self, encoder):
        generator = torch.Generator().manual_seed(0)
        x, lengths = frames(75)
        for chunk in CHUNKS:
            encoder.set_chunk_size(chunk)
            expected, _, _ = encoder(x, lengths)
            assert_same(stream(encoder, x, [1] * 75)[0], expected)
            for _ in range(4):
                pieces = random_split(75, generator, longest=2 * chunk + 1)
                assert_same(stream(encoder, x, pieces)[0], expected)

    def test_frames_come_as_soon_as_the_latency_allows(self, encoder):
        x, _ = frames(100)
        for chunk in CHUNKS[:3]:
            encoder.set_chunk_size(chunk)
            state, given = encoder.initial_state(1), 0
            for i in range(100):
                encoded, state = encoder.infer(x[:, i : i + 1], state)
                given += encoded.frames.size(1)
                waiting = i + 1 - 4 * given  # input frames without output
                assert waiting < encoder.algorithmic_latency_ms(1) == chunk + encoder.right_context
                assert given % (chunk // 4) == 0

    def test_chunk_sizes_differ(self, default):
        x, lengths = frames(64)
        outputs = []
        for chunk in (*CHUNKS, None):
            default.set_chunk_size(chunk)
            outputs.append(default(x, lengths)[0])
        # the last chunk holds the utterance, and so is the whole
        assert_same(outputs[-1], outputs[-2])
        for one, other in zip(outputs[:3], outputs[1:]):
            assert (one - other).abs().max() > 1e-3

    # batches

    def test_ragged_batch_equals_each_alone(self, encoder):
        x, lengths = frames(41, 7, 60, 1, 32)
        for chunk in (*CHUNKS, None):
            encoder.set_chunk_size(chunk)
            for training in (False, True):
                encoder.train(training)
                together, olens, _ = encoder(x, lengths)
                assert olens.tolist() == [11, 2, 15, 1, 8]
                for row, one, length, olen in zip(together, x, lengths, olens):
                    alone, _, _ = encoder(one[None, :length], length[None])
                    assert_same(row[:olen], alone[0])
                    assert not row[olen:].any()

    def test_padding_beyond_the_longest_utterance_is_cut(self, default):
        x, lengths = frames(30, 22)
        longer = torch.cat([x, x], 1)
        assert_same(default(longer, lengths)[0], default(x, lengths)[0])

    def test_batch_of_streams_that_end_at_different_times(self, encoder):
        generator = torch.Generator().manual_seed(1)
        x, lengths = frames(41, 7, 60, 1, 32, 0)
        for chunk in CHUNKS[:3]:
            encoder.set_chunk_size(chunk)
            pieces = random_split(60, generator, longest=chunk + 1)
            together, olens = stream(encoder, x, pieces, lengths)
            assert olens.tolist() == [11, 2, 15, 1, 8, 0]
            for row, one, length, olen in zip(together, x, lengths, olens):
                if length:
                    alone, _, _ = encoder(one[None, :length], length[None])
                    assert_same(row[:olen], alone[0])
                assert not row[olen:].any()

    # states

    def test_states_stay_valid(self, default):
        x, _ = frames(60)
        _, state = default.infer(x[:, :37], default.initial_state(1))
        copies = [t.clone() for t in _tensors(state)]
        first, later = default.infer(x[:, 37:], state)
        default.infer(torch.randn_like(x), state)
        again, _ = default.infer(x[:, 37:], state)
        assert first.frames.size(1) and torch.equal(first.frames, again.frames)
        default.finish(later)
        assert all(torch.equal(a, b) for a, b in zip(_tensors(state), copies))

    def test_state_does_not_grow_with_the_stream(self, encoder):
        x, _ = frames(encoder.chunk_size)
        state, sizes = encoder.initial_state(1), []
        for _ in range(40):
            _, state = encoder.infer(x, state)
            sizes.append(sum(t.numel() for t in _tensors(state)))
        assert len(set(sizes[-20:])) == 1

    def test_chunk_size_of_a_running_stream_does_not_change(self, default):
        x, lengths = frames(60)
        expected, _, _ = default(x, lengths)
        first, state = default.infer(x[:, :30], default.initial_state(1))
        default.set_chunk_size(64)
        second, state = default.infer(x[:, 30:], state)
        last = default.finish(state)
        assert_same(torch.cat([first.frames, second.frames, last.frames], 1), expected)

    # what an output depends on

    @pytest.mark.parametrize("chunk", CHUNKS[:3])
    def test_outputs_depend_on_nothing_beyond_the_stated_look_ahead(self, encoder, chunk):
        encoder.set_chunk_size(chunk)
        x, lengths = frames(75)
        x.requires_grad_()
        output, _, _ = encoder(x, lengths)
        for j in range(output.size(1)):
            weights = torch.linspace(-1, 1, output.size(2), dtype=output.dtype)
            grad = torch.autograd.grad(output[0, j] @ weights, x, retain_graph=True)[0]
            seen = grad[0].abs().amax(1)
            end = (4 * j // chunk + 1) * chunk + encoder.right_context
            assert not seen[end:].any()
            assert seen[:end][-1] > 0  # the latency is not overstated

    def test_left_context_is_limited(self, default):
        layers, chunk = len(default.layers), default.chunk_size
        x, lengths = frames(300)
        other = x.clone()
        # convolutions and time reductions reach back a little, too
        far = 299 - chunk - layers * (default.left_context + chunk + 4 * 16) - 8
        assert far > 0
        other[:, :far] = 0
        before, after = default(x, lengths)[0], default(other, lengths)[0]
        assert_same(before[:, -1], after[:, -1])
        assert (before[:, far // 4] - after[:, far // 4]).abs().max() > 1e-6

    def test_samples_after_the_latency_change_nothing(self, encoder, tmp_path):
        """Perturb the waveform: the printed latency is the truth, frontend included."""
        pipeline = Pipeline(encoder, tmp_path)
        latency = algorithmic_latency(pipeline.frontend, encoder)
        samples = _noise(6000)
        clean = pipeline.stream(samples, [1000] * 6)
        frame = encoder.chunk_size * HOP  # samples of a chunk
        for n in range(4):
            end = n * frame - HOP // 2 + round(latency.longest * RATE / 1000)
            changed = samples.clone()
            changed[end:] = -samples[end:].flip(0)
            noisy = pipeline.stream(changed, [1000] * 6)
            done = (n + 1) * encoder.chunk_size // 4
            assert torch.equal(noisy[:done], clean[:done])
            assert not torch.equal(noisy[done:], clean[done:])
            # and not overstated: the end of the last window still counts
            changed[end - HOP : end] = -samples[end - HOP : end]
            noisy = pipeline.stream(changed, [1000] * 6)
            assert not torch.equal(noisy[:done], clean[:done])

    # samples

    def test_any_split_of_the_samples(self, encoder, tmp_path):
        pipeline = Pipeline(encoder, tmp_path)
        generator = torch.Generator().manual_seed(2)
        for num_samples in (129, 500, 640, 5555):
            samples = _noise(num_samples)
            expected = pipeline.whole(samples)
            for longest in (7 if num_samples < 1000 else 400, 3 * encoder.chunk_size * HOP):
                pieces = random_split(num_samples, generator, longest)
                actual = pipeline.stream(samples, pieces)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    def test_silence(self, default, tmp_path):
        pipeline = Pipeline(default, tmp_path)
        silence = torch.zeros(4000)
        whole = pipeline.whole(silence)
        assert torch.isfinite(whole).all()
        torch.testing.assert_close(pipeline.stream(silence, [80] * 50), whole)

    def test_stream_without_a_frame(self, default, tmp_path):
        assert stream(default, frames(1)[0][:, :0], [0])[0].shape == (1, 0, default.output_size())
        assert Pipeline(default, tmp_path).stream(_noise(60), [10] * 6).shape[0] == 0

    # training

    def test_dynamic_chunks_are_drawn_in_training_only(self):
        encoder = self.make(
            right_context=4,
            left_context=16,
            dynamic_chunk_sizes=[8, 32],
            full_context_probability=0.4,
        ).double()
        x, lengths = frames(90, 50)
        expected = {}
        encoder.eval()
        for chunk in (8, 32, None, 16):
            encoder.set_chunk_size(chunk)
            expected[chunk] = encoder(x, lengths)[0]
        encoder.train()
        drawn = dict.fromkeys(expected, 0)
        for _ in range(60):
            output = encoder(x, lengths)[0]
            (chunk,) = (c for c, e in expected.items() if torch.allclose(output, e, atol=1e-9))
            drawn[chunk] += 1
        assert drawn[16] == 0 and min(drawn[c] for c in (8, 32, None)) >= 8
        encoder.eval()
        assert_same(encoder(x, lengths)[0], expected[16])

    def test_checkpointing_changes_no_gradient_and_none_is_missing(self):
        x, lengths = frames(50, 33)
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(5)
            encoder = self.make(
                right_context=4,
                left_context=16,
                gradient_checkpointing=checkpointing,
                dropout_rate=0.2,
            ).double()
            torch.manual_seed(6)
            encoder(x, lengths)[0].square().sum().backward()
            assert all(p.grad is not None for p in encoder.parameters())
            assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
            gradients.append([p.grad for p in encoder.parameters()])
        for one, other in zip(*gradients):
            assert_same(one, other)

    def test_mixed_precision(self, default):
        """As ESPnet trains with ``use_amp: true``; ended utterances leave fully masked blocks."""
        x, lengths = frames(90, 9)
        x, encoder = x.nan_to_num().float(), default.float()
        expected = encoder(x, lengths)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = encoder(x, lengths)[0]
            streamed, _ = stream(encoder, x, [50, 40], lengths)
        torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)
        torch.testing.assert_close(streamed.float(), expected, rtol=0.1, atol=0.1)
        actual.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())

    # errors

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(chunk_size=18), r"chunk_size \(18 input frames\) must be a multiple of subsamp"),
            (dict(chunk_size=0), "chunk_size must be a number of input frames, at least 1; got 0"),
            (dict(chunk_size=1.5), "chunk_size must be a number of input frames"),
            (dict(right_context=20), r"right_context \(20\) is longer than the chunk \(chunk_size"),
            (dict(right_context=6), r"right_context \(6 input frames\) must be a multiple"),
            (dict(left_context=-4), "left_context must be a number of input frames, at least 0"),
            (dict(left_context=30), r"left_context \(30 input frames\) must be a multiple"),
            (dict(dynamic_chunk_sizes=[8, 10]), r"dynamic_chunk_sizes \(10 input frames\) must be"),
            (
                dict(right_context=12, dynamic_chunk_sizes=[16, 8]),
                r"longer than the chunk \(dynamic_chunk_sizes: 8",
            ),
            (dict(full_context_probability=1.5), "must lie between 0 and 1, got 1.5"),
            (dict(chunksize=16), "unknown option 'chunksize'; valid options: output_size, "),
            (dict(attention_heads=5), "must be a multiple of attention_heads"),
            (dict(activation_type="sine"), "unknown activation_type 'sine'; choose one of: "),
            (dict(subsampling=0), "subsampling must be at least 1, got 0"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(UserError, match=message):
            self.make(**options)

    def test_bad_calls(self, default):
        x, _ = frames(8, 8)
        state = default.initial_state(2)
        with pytest.raises(UserError, match=r"shape \(2 streams, frames, 20 features\)"):
            default.infer(x[:1], state)
        with pytest.raises(UserError, match=r"got \(2, 8, 19\)"):
            default.infer(x[..., 1:], state)
        _, state = default.infer(x, state, torch.tensor([8, 5]))
        with pytest.raises(UserError, match="stream 1 has ended"):
            default.infer(x, state)
        with pytest.raises(UserError, match=r"chunk_size \(10 input frames\) must be a multiple"):
            default.set_chunk_size(10)
        default.set_chunk_size(None)
        assert default.algorithmic_latency_ms(10) == math.inf
        assert "not streaming" in repr(default)
        with pytest.raises(UserError, match="cannot stream; set a chunk size"):
            default.initial_state()

    def test_streaming_in_training_mode_is_refused(self, default):
        with pytest.raises(UserError, match=r"call eval\(\)"):
            default.train().initial_state()

    def test_geometry_is_printed(self, default):
        assert (
            "subsampling=4, chunk_size=16, left_context=32, right_context=4, algorithmic latency=20"
            in repr(default)
        )


class Pipeline:
    """Samples to encoder output, offline by ESPnet's modules and as a stream."""

    def __init__(self, encoder: AbsStreamingEncoder, tmp_path):
        stats = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0)).double()
        np.savez(
            tmp_path / "stats.npz",
            count=10,
            sum=10 * stats[0].numpy(),
            sum_square=10 * (stats[0] ** 2 + stats[1].exp()).numpy(),
        )
        self.frontend = DefaultFrontend(
            fs=RATE, n_fft=256, win_length=200, hop_length=HOP, n_mels=FEATURES
        ).eval()
        self.normalize = GlobalMVN(tmp_path / "stats.npz")
        self.encoder = encoder

    def whole(self, samples: Tensor) -> Tensor:
        """(samples,) -> (T', D)."""
        feats, lengths = self.frontend(samples[None], torch.tensor([len(samples)]))
        feats, lengths = self.normalize(feats, lengths)
        return self.encoder(feats.double(), lengths)[0][0].detach()

    def stream(self, samples: Tensor, pieces: list[int]) -> Tensor:
        """(samples,) -> (T', D)."""
        frontend = StreamingFrontend(self.frontend, self.normalize)
        feature_state, state = frontend.initial_state(), self.encoder.initial_state(1)
        outputs = []
        for piece in samples.split(pieces):
            feats, feature_state = frontend.infer(piece, feature_state)
            encoded, state = self.encoder.infer(feats[None].double(), state)
            outputs.append(encoded.frames)
        feats = frontend.finish(feature_state)
        encoded, state = self.encoder.infer(feats[None].double(), state)
        return torch.cat([*outputs, encoded.frames, self.encoder.finish(state).frames], 1)[0]


def _noise(num_samples: int) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def _tensors(state) -> list[Tensor]:
    layers = [t for layer in state.layers for t in layer]
    return [state.lengths, state.pending, *state.subsampling, *layers]
