"""Speed perturbation: Kaldi's names, right sounds, both doors give the same samples."""

import io
import os
import sys
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.data import audio
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.perturb import perturb_speed
from espnet_llm_plugin.errors import UserError

from .conftest import table, tone
from .test_format import content, sounds


def test_tables(data_dir, tmp_path):
    data_dir.table("utt2dur", "".join(f"u{i} {0.2 + 0.1 * i:.3f}\n" for i in range(5)))
    data_dir.table("spk2gender", "s0 f\ns1 m\n")
    target = tmp_path / "sp"
    assert perturb_speed(data_dir.path, target, ["0.9", "1.0", "1.1"]) == 15
    text = table(target / "text")
    assert text["sp0.9-u3"] == text["u3"] == text["sp1.1-u3"] == "word3 and more"
    assert table(target / "utt2spk")["sp0.9-u3"] == "sp0.9-s1"
    assert table(target / "spk2utt")["sp1.1-s1"] == "sp1.1-u1 sp1.1-u3"
    assert table(target / "utt2uniq")["sp0.9-u3"] == table(target / "utt2uniq")["u3"] == "u3"
    assert table(target / "utt2dur")["sp0.9-u3"] == f"{0.5 / 0.9:.3f}"
    assert table(target / "spk2gender")["sp0.9-s1"] == "m"
    assert set(table(target / "wav.scp")) == set(text) == set(table(target / "utt2spk"))
    keys = [line.split()[0] for line in (target / "wav.scp").read_text().splitlines()]
    assert keys == sorted(keys)


def test_only_the_factors_asked_for(data_dir, tmp_path):
    perturb_speed(data_dir.path, tmp_path / "sp", ["0.95"])
    assert set(table(tmp_path / "sp/text")) == {f"sp0.95-u{i}" for i in range(5)}


def test_sounds(data_dir, tmp_path):
    perturb_speed(data_dir.path, tmp_path / "sp", ["0.9", "1.0", "1.1"])
    format_data_dir(tmp_path / "sp", tmp_path / "out", nj=2)
    result = sounds(tmp_path / "out")
    assert len(result) == 15
    for i in range(5):
        original, _ = soundfile.read(data_dir.path / f"audio/u{i}.wav", dtype="float32")
        np.testing.assert_array_equal(result[f"u{i}"], audio.to_pcm16(original))
        for factor in (0.9, 1.1):
            faster = audio.change_speed(original, 8000, factor)
            np.testing.assert_array_equal(result[f"sp{factor}-u{i}"], audio.to_pcm16(faster))
            assert abs(len(faster) - len(original) / factor) <= 1


def test_formatting_is_repeatable_and_restartable(data_dir, tmp_path, monkeypatch):
    perturb_speed(data_dir.path, tmp_path / "sp", ["0.9", "1.1"])
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        format_data_dir(tmp_path / "sp", "out", fs=16000)
        results.append(content(tmp_path / name / "out"))
    assert results[0] == results[1]
    assert format_data_dir(tmp_path / "sp", "out", fs=16000).reused == 10
    data_dir.audio("u0.wav", tone(0.4))  # the sound behind two pipes
    assert format_data_dir(tmp_path / "sp", "out", fs=16000).reused == 8


def test_entries_work_as_pipes_for_espnet(data_dir, tmp_path, monkeypatch, root):
    """ESPnet's own stage 3 opens pipes with kaldiio and decodes their output with soundfile."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=os.pathsep)
    perturb_speed(data_dir.path, tmp_path / "sp", ["0.9"])
    format_data_dir(tmp_path / "sp", tmp_path / "out")
    entry = table(tmp_path / "sp/wav.scp")["sp0.9-u2"]
    with kaldiio.open_like_kaldi(entry, "rb") as stream:
        piped, rate = soundfile.read(io.BytesIO(stream.read()), dtype="int16")
    assert rate == 8000
    np.testing.assert_array_equal(piped, sounds(tmp_path / "out")["sp0.9-u2"])


def test_segments(empty_dir, tmp_path):
    noise = np.random.default_rng(0).integers(-9999, 9999, 16000).astype(np.int16)
    empty_dir.audio("r.wav", noise)
    empty_dir.table("wav.scp", "r audio/r.wav\n")
    empty_dir.table("segments", "a r 0 0.5\nb r 1 -1\nc r 0.5 2\nd r 1 1.005\n")
    empty_dir.table("text", "a x\nb y\nc z\nd t\n")
    empty_dir.table("utt2spk", "a s\nb s\nc s\nd s\n")
    # d becomes too short to be a segment
    assert perturb_speed(empty_dir.path, tmp_path / "sp", ["1.0", "1.25"]) == 7
    segments = table(tmp_path / "sp/segments")
    assert segments["sp1.25-a"] == "sp1.25-r 0 0.4" and segments["sp1.25-b"] == "sp1.25-r 0.8 -1"
    format_data_dir(tmp_path / "sp", tmp_path / "out")
    result = sounds(tmp_path / "out")
    whole = audio.to_pcm16(audio.change_speed(noise / np.float32(32768), 8000, 1.25))
    np.testing.assert_array_equal(result["sp1.25-a"], whole[:3200])
    np.testing.assert_array_equal(result["sp1.25-b"], whole[6400:])
    np.testing.assert_array_equal(result["sp1.25-c"], whole[3200:])
    np.testing.assert_array_equal(result["a"], noise[:4000])


@pytest.mark.parametrize("factors", [["x"], ["0"], ["-1"], ["0.9", "0.90"], [], ["nan"]])
def test_wrong_factors(data_dir, tmp_path, factors):
    with pytest.raises(UserError, match="speed factor"):
        perturb_speed(data_dir.path, tmp_path / "sp", factors)
    assert not (tmp_path / "sp").exists()


def test_faulty_source(data_dir, tmp_path):
    data_dir.append("text", "u7 hello")
    with pytest.raises(UserError, match="text without audio"):
        perturb_speed(data_dir.path, tmp_path / "sp", ["0.9"])
    with pytest.raises(UserError, match="same directory"):
        perturb_speed(data_dir.path, data_dir.path, ["0.9"])
