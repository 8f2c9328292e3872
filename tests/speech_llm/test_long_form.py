"""Long audio in segments."""

import itertools

import numpy as np
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.hypothesis import LabelHypothesis
from espnet_llm_plugin.speech_llm.long_form import (
    LongForm,
    blank_cut,
    joined,
    quietest,
    stitch,
)

RATE, HOP = 1000, 40


class Encoder:
    """Frames that know which samples they are of; counts its work."""

    def __init__(self):
        self.samples, self.longest = 0, 0

    def __call__(self, samples: np.ndarray) -> torch.Tensor:
        self.samples += len(samples)
        self.longest = max(self.longest, len(samples))
        frames = samples[HOP // 2 :: HOP]
        return torch.from_numpy(frames.copy())[:, None]


def ctc(encoder_out: torch.Tensor) -> torch.Tensor:
    """Blank where a frame's sample is 0."""
    is_blank = encoder_out[:, 0] == 0
    blank = torch.where(is_blank, 0.9, 0.1)
    return torch.stack([blank, 1 - blank], dim=1).log()


def speech(seconds: float, gaps=(), seed=0) -> np.ndarray:
    """Noise with silence of 0.4 s around each of ``gaps`` (seconds)."""
    samples = np.random.default_rng(seed).normal(size=int(seconds * RATE))
    for gap in gaps:
        samples[int((gap - 0.2) * RATE) : int((gap + 0.2) * RATE)] = 0.0
    return samples


@pytest.mark.parametrize("method", ["silence", "ctc"])
def test_cuts_are_in_the_gaps(method):
    gaps = [7.0, 15.5, 23.0]
    long_form = LongForm(method, max_seconds=10.0, overlap=1.0)
    segments = list(long_form.segments(speech(29.0, gaps), RATE, Encoder(), ctc))
    ends = list(itertools.accumulate(segment.seconds for segment in segments))
    assert ends == pytest.approx([*gaps, 29.0], abs=0.2)


@pytest.mark.parametrize("method", ["silence", "ctc"])
@pytest.mark.parametrize("seconds", [10.2, 14.9, 37.0])
@pytest.mark.parametrize("gaps", [(), (6.0, 8.0, 13.0)])
def test_no_frame_is_lost_or_doubled(method, seconds, gaps):
    samples = speech(seconds, gaps)
    long_form = LongForm(method, max_seconds=10.0, overlap=1.0)
    segments = list(long_form.segments(samples, RATE, Encoder(), ctc))
    assert sum(segment.seconds for segment in segments) == pytest.approx(seconds)
    assert all(2.0 <= segment.seconds <= 10.0 for segment in segments)
    expected = samples[HOP // 2 :: HOP]
    # at a cut a frame may begin up to one frame earlier or later than in one piece
    assert sum(len(segment.encoder_out) for segment in segments) == pytest.approx(
        len(expected), abs=len(segments)
    )
    for segment in segments:
        assert len(segment.encoder_out) == pytest.approx(segment.seconds * RATE / HOP, abs=1.5)


@pytest.mark.parametrize("method", ["silence", "ctc"])
def test_work_grows_linearly(method):
    long_form = LongForm(method, max_seconds=10.0, overlap=1.0)
    for seconds in (100.0, 400.0):
        encoder = Encoder()
        list(long_form.segments(speech(seconds, seed=1), RATE, encoder, ctc))
        # segments of at least half the longest length, each with the overlap
        assert encoder.samples <= 2.5 * seconds * RATE
        assert encoder.longest <= 12.0 * RATE


@pytest.mark.parametrize("method", ["off", "silence", "ctc"])
def test_short_audio_is_left_whole(method):
    samples = speech(9.9)
    (segment,) = LongForm(method, max_seconds=10.0).segments(samples, RATE, Encoder(), ctc)
    assert torch.equal(segment.encoder_out, Encoder()(samples))
    (segment,) = LongForm("off", max_seconds=5.0, overlap=0.0).segments(samples, RATE, Encoder())
    assert segment.seconds == pytest.approx(9.9)


def test_quietest_place():
    samples = np.ones(4000)
    samples[1500:1900] = 0.1
    samples[2500:3500] = 0.01
    assert 1650 <= quietest(samples, RATE, 1000, 2300) <= 1750
    assert 2650 <= quietest(samples, RATE, 1000, 3000) <= 3000


def test_cut_in_the_longest_run_of_blanks():
    def posteriors(best):
        return torch.eye(3)[best].add(0.1).log()

    assert blank_cut(posteriors([1, 0, 0, 1, 0, 0, 0, 0, 2, 0])) == 6
    assert blank_cut(posteriors([0, 0, 0, 1, 2, 1])) == 1
    without = torch.tensor([[0.1, 0.9], [0.4, 0.6], [0.2, 0.8]]).log()
    assert blank_cut(without) == 1


def test_stitched_lists_are_the_best_combinations():
    generator = np.random.default_rng(0)
    lists = [
        [
            LabelHypothesis((i, j), total, total, {"decoder": total}, 0.5, ended=j > 0)
            for j, total in enumerate(sorted(generator.normal(size=3), reverse=True))
        ]
        for i in range(4)
    ]
    found = [joined(hyps) for hyps in stitch(lists, 5)]
    totals = sorted((sum(h.total for h in c) for c in itertools.product(*lists)), reverse=True)
    assert [hyp.total for hyp in found] == pytest.approx(totals[:5])
    best = found[0]
    assert best.tokens == (0, 0, 1, 0, 2, 0, 3, 0)
    assert best.scores["decoder"] == pytest.approx(best.total)
    assert best.bonus == 2.0
    assert not best.ended


def test_bad_options():
    for options in (
        dict(method="words"),
        dict(max_seconds=0.0),
        dict(max_seconds=2.0, overlap=1.5),
        dict(overlap=-1.0),
    ):
        with pytest.raises(UserError):
            LongForm(**options)
