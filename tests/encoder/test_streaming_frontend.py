"""The streaming frontend gives ESPnet's frames, as soon as their windows are filled."""

import numpy as np
import pytest
import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.asr.frontend.windowing import SlidingWindow
from espnet2.layers.global_mvn import GlobalMVN
from espnet2.layers.utterance_mvn import UtteranceMVN

from espnet_llm_plugin.encoder.streaming_frontend import StreamingFrontend, frame_geometry
from espnet_llm_plugin.errors import UserError
from tests.contracts.streaming_contract import random_split

CONFIGURATIONS = [
    dict(n_fft=512, win_length=400, hop_length=160),
    dict(n_fft=512, hop_length=128),
    dict(n_fft=256, win_length=201, hop_length=100, window="hamming", n_mels=23),
    dict(n_fft=256, win_length=129, hop_length=200, normalized=True),
    dict(n_fft=128, win_length=64, hop_length=300, fmin=100, fmax=7000, htk=True),
    dict(n_fft=256, win_length=200, hop_length=80, center=False),
    dict(n_fft=256, win_length=256, hop_length=80, window=None),
    dict(n_fft=255, hop_length=64, frontend_conf=None),
]
every_configuration = pytest.mark.parametrize("conf", CONFIGURATIONS, ids=str)


def noise(num_samples):
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def whole(frontend, samples, normalize=None):
    feats, lengths = frontend(samples[None], torch.tensor([len(samples)]))
    if normalize is not None:
        feats, lengths = normalize(feats, lengths)
    assert lengths.item() == feats.size(1)
    return feats[0]


def stream(streaming, samples, pieces):
    state, frames = streaming.initial_state(), []
    for piece in samples.split(pieces):
        new, state = streaming.infer(piece, state)
        frames.append(new)
    return torch.cat([*frames, streaming.finish(state)])


@every_configuration
def test_any_split_gives_espnets_frames(conf):
    frontend = DefaultFrontend(**conf).eval()
    streaming = StreamingFrontend(frontend)
    generator = torch.Generator().manual_seed(0)
    half, hop = conf["n_fft"] // 2, conf["hop_length"]
    # the shortest that ESPnet can process, around one hop, whole multiples of the hop and others
    shortest = half + 1 if conf.get("center", True) else conf["n_fft"]
    for num_samples in (shortest, shortest + 1, shortest + hop, 10 * hop, 10 * hop + 7, 6000):
        samples = noise(num_samples)
        expected = whole(frontend, samples)
        for longest in (2, hop, 1000):
            pieces = random_split(num_samples, generator, longest)
            actual = stream(streaming, samples, pieces)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_configuration
def test_frames_come_when_their_window_is_filled_and_not_before(conf):
    frontend = DefaultFrontend(**conf).eval()
    streaming = StreamingFrontend(frontend)
    hop, look_ahead = conf["hop_length"], streaming.geometry.look_ahead
    state, given = streaming.initial_state(), 0
    for received in range(1, 1500):
        frames, state = streaming.infer(torch.ones(1), state)
        given += len(frames)
        assert given == max(0, (received - look_ahead) // hop + 1)


@every_configuration
def test_no_frame_depends_on_samples_after_the_look_ahead(conf):
    frontend = DefaultFrontend(**conf).eval()
    geometry = frame_geometry(frontend)
    samples = noise(4000).requires_grad_()
    feats = whole(frontend, samples)
    for f in range(0, 12):
        grad = torch.autograd.grad(feats[f].sum(), samples, retain_graph=True)[0]
        last = grad.nonzero().max().item()
        assert last < f * geometry.hop_length + geometry.look_ahead
        # the ends of a Hann window are zero, or nearly so
        if conf.get("center", True):
            assert last >= f * geometry.hop_length + geometry.look_ahead - 4


def test_geometry_of_the_usual_configuration():
    geometry = frame_geometry(DefaultFrontend(**CONFIGURATIONS[0]))
    assert (geometry.sample_rate, geometry.look_ahead, geometry.centre) == (16000, 201, 0)
    assert geometry.reach == 121  # 7.6 ms


def test_global_mvn_and_a_state_that_stays_valid(tmp_path):
    frontend = DefaultFrontend(**CONFIGURATIONS[0]).eval()
    np.savez(tmp_path / "s.npz", count=4, sum=np.full(80, -12.0), sum_square=np.full(80, 50.0))
    normalize = GlobalMVN(tmp_path / "s.npz")
    streaming = StreamingFrontend(frontend, normalize)
    samples = noise(5000)
    expected = whole(frontend, samples, normalize)
    torch.testing.assert_close(
        stream(streaming, samples, [777] * 6 + [338]), expected, rtol=1e-4, atol=1e-4
    )
    first, state = streaming.infer(samples[:2000], streaming.initial_state())
    copy = state.samples.clone()
    for _ in range(2):
        second, later = streaming.infer(samples[2000:], state)
        actual = torch.cat([first, second, streaming.finish(later)])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        streaming.finish(state)
        assert torch.equal(state.samples, copy)


def test_what_is_kept_does_not_grow():
    streaming = StreamingFrontend(DefaultFrontend(**CONFIGURATIONS[0]).eval())
    state = streaming.initial_state()
    for _ in range(100):
        _, state = streaming.infer(noise(1000), state)
        assert state.samples.numel() < 1000 + 512


@pytest.mark.parametrize("num_samples", [0, 1, 256])
def test_streams_too_short_for_espnet_have_no_frames(num_samples):
    frontend = DefaultFrontend(**CONFIGURATIONS[0]).eval()
    if num_samples:
        with pytest.raises(RuntimeError):
            whole(frontend, noise(num_samples))
    streaming = StreamingFrontend(frontend)
    _, state = streaming.infer(noise(num_samples), streaming.initial_state())
    assert streaming.finish(state).shape == (0, 80)


def test_what_needs_the_whole_utterance_is_refused():
    default = DefaultFrontend(**CONFIGURATIONS[0])
    with pytest.raises(UserError, match="utterance_mvn.*Train with `normalize: global_mvn`"):
        StreamingFrontend(default, UtteranceMVN())
    with pytest.raises(UserError, match="cannot stream with the normalisation Identity"):
        StreamingFrontend(default, torch.nn.Identity())
    with pytest.raises(UserError, match="cannot stream with the frontend SlidingWindow"):
        StreamingFrontend(SlidingWindow())
    with pytest.raises(UserError, match="cannot stream with the frontend NoneType"):
        StreamingFrontend(None)
    with pytest.raises(UserError, match="dereverberation or beamforming"):
        StreamingFrontend(DefaultFrontend(n_fft=64, frontend_conf=dict(use_wpe=True, wlayers=1)))
    streaming = StreamingFrontend(default)
    with pytest.raises(UserError, match=r"got shape \(100, 2\); choose a channel"):
        streaming.infer(torch.zeros(100, 2), streaming.initial_state())
