"""espeak-ng's homophones, voices and errors; noise."""

import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest

from espnet_llm_plugin.data.synthetic import lexicon, noise
from espnet_llm_plugin.data.synthetic.speech import (
    ACCENTS,
    SAMPLE_RATE,
    VARIANTS,
    Speaker,
    Synthesizer,
    speakers,
)
from espnet_llm_plugin.errors import UserError

pytest.importorskip("espeakng_loader", reason="needs the extra 'demo'")


@pytest.fixture(scope="module")
def synthesizer():
    return Synthesizer()


@pytest.mark.parametrize("accent", ACCENTS)
def test_homophones_have_the_same_phonemes_in_the_sentence(synthesizer, accent):
    for carrier in ("then lona looked at the {}", "and they forgot their {} again"):
        for group in lexicon.HOMOPHONES:
            sounds = {synthesizer.phonemes(carrier.format(word), accent) for word in group}
            assert len(sounds) == 1, group


@pytest.mark.parametrize("accent", ACCENTS)
def test_names_and_towns_all_sound_different(synthesizer, accent):
    """Two names that sound alike could not be told apart by any context."""
    sounds = defaultdict(list)
    names = lexicon.FEMALE + lexicon.MALE + lexicon.RARE_FEMALE + lexicon.RARE_MALE
    for word in names + lexicon.TOWNS:
        sounds[synthesizer.phonemes(f"then {word} left", accent)].append(word)
    assert [same for same in sounds.values() if len(same) > 1] == []


def test_cues_all_sound_different(synthesizer):
    """A role, place or thing must not sound like any other word of the lists."""
    cues = {w for t in lexicon.TOPICS.values() for w in t.roles + t.places + t.things}
    ambiguous = {w for t in lexicon.TOPICS.values() for w in t.homophones}
    sounds = defaultdict(set)
    for word in cues | ambiguous:
        sounds[synthesizer.phonemes(f"then the {word} fell", "en-us")].add(word)
    assert [same for same in sounds.values() if len(same) > 1 and same & cues] == []


def test_speakers_of_the_sets_are_different_voices():
    voices = {split: speakers(split) for split in ("train", "dev", "test")}
    combinations = {k: {(s.accent, s.variant) for s in v} for k, v in voices.items()}
    assert not combinations["train"] & combinations["test"]
    assert not combinations["train"] & combinations["dev"]
    assert not combinations["dev"] & combinations["test"]
    assert {accent for accent, _ in combinations["train"]} == set(ACCENTS)
    assert {variant for _, variant in combinations["train"]} == set(VARIANTS)
    names = [speaker.name for split in voices.values() for speaker in split]
    assert len(set(names)) == len(names) >= 120


def test_speech_depends_on_the_voice_and_the_rate(synthesizer):
    voice = Speaker("en-us", "m1", 50, 50)
    slow = synthesizer.speak("lona forgot the flour", voice, 130)
    fast = synthesizer.speak("lona forgot the flour", voice, 200)
    high = synthesizer.speak("lona forgot the flour", voice._replace(pitch=80), 130)
    other = synthesizer.speak("lona forgot the flour", voice._replace(variant="f3"), 130)
    assert slow.dtype == np.float32 and 1.0 < len(slow) / SAMPLE_RATE < 3.0
    assert len(fast) < 0.85 * len(slow)
    for wave in (high, other):
        size = min(len(wave), len(slow))
        assert np.abs(wave[:size] - slow[:size]).max() > 0.05


def test_unknown_voices_are_refused(synthesizer):
    with pytest.raises(UserError, match="no voice variant 'm99'.*m1"):
        synthesizer.set_voice("en-us", "m99")
    with pytest.raises(UserError, match="no voice 'xx-nowhere'"):
        synthesizer.set_voice("xx-nowhere")


def test_a_missing_package_is_one_helpful_line(tmp_path):
    (tmp_path / "espeakng_loader.py").write_text("raise ImportError('not here')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from espnet_llm_plugin.errors import run_cli\n"
        "from espnet_llm_plugin.bin.make_synthetic_corpus import main\n"
        f"run_cli(lambda cmd: main(['--size', 'tiny', '--output_dir', {str(tmp_path / 'd')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install espeakng-loader" in done.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("slope", [0.0, -3.0, -6.0])
def test_coloured_noise_has_the_slope_and_level(slope):
    wave = noise.coloured_noise(1 << 17, slope, np.random.default_rng(1))
    assert len(wave) == 1 << 17
    assert np.sqrt(np.mean(wave**2)) == pytest.approx(1.0)
    power = np.abs(np.fft.rfft(wave)) ** 2
    octaves = [10 * np.log10(power[1 << i : 2 << i].mean()) for i in range(8, 16)]
    assert np.diff(octaves).mean() == pytest.approx(slope, abs=0.3)


def test_babble_is_a_mixture_of_the_talkers():
    rng = np.random.default_rng(0)
    tones = [np.sin(2 * np.pi * f * np.arange(16000) / 16000) for f in (200, 300, 500, 700)]
    wave = noise.babble(48000, tones, rng)
    assert np.sqrt(np.mean(wave**2)) == pytest.approx(1.0)
    spectrum = np.abs(np.fft.rfft(wave)) / len(wave)
    assert all(spectrum[3 * f] > 0.2 for f in (200, 300, 500, 700))


def test_degrade_mixes_at_the_drawn_ratio_without_clipping():
    talkers = [np.random.default_rng(i).standard_normal(20000) for i in range(5)]
    speech = np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000).astype(np.float32)
    ratios = []
    for seed in range(40):
        wave = noise.degrade(speech, talkers, np.random.default_rng(seed))
        again = noise.degrade(speech, talkers, np.random.default_rng(seed))
        assert wave.dtype == np.int16 and len(wave) == 32000
        assert np.array_equal(wave, again)
        spectrum = np.abs(np.fft.rfft(wave.astype(float))) ** 2
        tone = spectrum[1998:2003].sum()
        ratios.append(10 * np.log10(tone / (spectrum.sum() - tone)))
    assert 4.5 < min(ratios) < 9 and 21 < max(ratios) < 25.5
    # a click as loud as it can be: scaled down, not clipped
    click = np.zeros(16000, dtype=np.float32)
    click[8000] = 1.0
    wave = noise.degrade(click, talkers, np.random.default_rng(0))
    assert np.abs(wave).max() == pytest.approx(noise.PEAK * 32767, abs=2)
