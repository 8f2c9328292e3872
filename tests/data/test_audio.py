"""Audio: every kind of source, every kind of fault, resampling and 16-bit output."""

import io
import struct

import kaldiio
import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.data import audio

from .conftest import tone


def read(spec):
    with audio.open_recording(str(spec)) as recording:
        return recording.read(), recording.rate


def fault(spec, named=None):
    with pytest.raises(audio.AudioError) as error, audio.open_recording(str(spec)) as recording:
        audio.choose_channel(recording.read(), 0, str(spec))
    assert str(named or spec) in str(error.value)
    return error.value.kind


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.aiff"])
def test_formats(empty_dir, name):
    file = empty_dir.audio(name, tone(0.5, 16000), 16000)
    samples, rate = read(file)
    assert rate == 16000 and samples.shape == (8000, 1) and samples.dtype == np.float32
    assert np.corrcoef(samples[:, 0], tone(0.5, 16000))[0, 1] > 0.99


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
def test_part_of_a_file_is_the_part_of_its_samples(empty_dir, name):
    file = empty_dir.audio(name, np.random.default_rng(0).uniform(-0.3, 0.3, 16000), 16000)
    whole, _ = read(file)
    with audio.open_recording(str(file)) as recording:
        for start, stop in [(5000, 7000), (0, 10), (100, None), (0, None)]:
            np.testing.assert_array_equal(recording.read(start, stop), whole[start:stop])


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_subtypes(empty_dir, subtype):
    samples, _ = read(empty_dir.audio("a.wav", tone(), subtype=subtype))
    np.testing.assert_allclose(samples[:, 0], tone(), atol=0.02)


def test_16_bit_values_survive_unchanged(empty_dir):
    pcm = np.arange(-32768, 32768).astype(np.int16)
    samples, _ = read(empty_dir.audio("a.wav", pcm, 16000))
    np.testing.assert_array_equal(audio.to_pcm16(samples[:, 0]), pcm)
    for audio_format in ("wav", "flac"):
        content = audio.encode(samples[:, 0], 16000, audio_format)
        with soundfile.SoundFile(io.BytesIO(content)) as stream:
            assert (stream.subtype, stream.samplerate) == ("PCM_16", 16000)
            np.testing.assert_array_equal(stream.read(dtype="int16"), pcm)


def test_too_loud_is_clipped_not_wrapped():
    np.testing.assert_array_equal(
        audio.to_pcm16(np.array([2.0, 1.0, -1.0, -3.0], dtype=np.float32)),
        [32767, 32767, -32768, -32768],
    )


@pytest.mark.parametrize("stored_as", ["wav", "audio"])
def test_archive_offset(tmp_path, stored_as):
    path, scp = tmp_path / "x.ark", tmp_path / "x.scp"
    pcm = {f"u{i}": (1000 * tone(0.1 + 0.1 * i)).astype(np.int16) for i in range(3)}
    kwargs = (
        {}
        if stored_as == "wav"
        else {
            "write_function": "soundfile",
            "write_kwargs": {"format": "flac", "subtype": "PCM_16"},
        }
    )
    for key, samples in pcm.items():
        entry = {key: (8000, samples) if stored_as == "wav" else (samples, 8000)}
        with open(path, "ab") as stream:
            kaldiio.save_ark(stream, entry, scp=str(scp), append=True, **kwargs)
    specs = dict(line.split() for line in scp.read_text().splitlines())
    offset = int(audio.split_archive(specs["u2"])[1])
    assert offset > len(pcm["u0"])
    for key in pcm:
        samples, rate = read(specs[key])
        assert rate == 8000
        np.testing.assert_array_equal(audio.to_pcm16(samples[:, 0]), pcm[key])
    assert fault(f"{path}:{offset + 1}") == audio.UNREADABLE
    assert fault(f"{path}:99999999") == audio.UNREADABLE
    assert fault(f"{tmp_path}/no.ark:12", named=f"{tmp_path}/no.ark") == audio.MISSING


def test_pipe(empty_dir):
    file = empty_dir.audio("a.flac")
    np.testing.assert_array_equal(read(f"cat {file} |")[0], read(file)[0])
    assert fault("echo oops >&2; exit 3 |") == audio.PIPE_FAILED
    assert fault("true |") == audio.PIPE_FAILED
    assert fault("echo not audio |") == audio.UNREADABLE
    with pytest.raises(audio.AudioError, match=r"exit status 3\): oops"):
        read("echo oops >&2; exit 3 |")


def test_pipe_with_streamed_wav_header(empty_dir):
    content = bytearray(empty_dir.audio("a.wav").read_bytes())
    for placeholder in (0x7FFFFFFF, 0xFFFFFFFF):
        content[4:8] = struct.pack("<I", placeholder)
        content[40:44] = struct.pack("<I", placeholder - 36 * (placeholder < 0x80000000))
        streamed = empty_dir.path / "streamed.wav"
        streamed.write_bytes(content)
        for spec in (f"cat {streamed} |", streamed):
            assert len(read(spec)[0]) == 1600


def test_faults_of_files(empty_dir):
    path = empty_dir.path
    assert fault(path / "none.wav") == audio.MISSING
    (path / "empty.wav").touch()
    assert fault(path / "empty.wav") == audio.EMPTY_FILE
    (path / "text.wav").write_text("hello" * 100)
    assert fault(path / "text.wav") == audio.UNREADABLE
    assert fault(path) == audio.UNREADABLE
    assert fault(empty_dir.audio("zero.wav", np.zeros(0))) == audio.NO_SAMPLES
    for value in (np.nan, np.inf):
        samples = tone()
        samples[7] = value
        bad = empty_dir.audio("nan.wav", samples, subtype="FLOAT")
        assert fault(bad) == audio.NOT_FINITE
        with pytest.raises(audio.AudioError, match="first at sample 7"):
            audio.choose_channel(read(bad)[0], None, "nan.wav")


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_cut_off_file(empty_dir, name):
    content = empty_dir.audio(name, tone(1.0)).read_bytes()
    half = empty_dir.path / f"half-{name}"
    half.write_bytes(content[: len(content) // 2])
    assert fault(half) == audio.UNREADABLE


def test_damaged_flac(empty_dir):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    content = bytearray(empty_dir.audio("a.flac", noise).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    damaged = empty_dir.path / "damaged.flac"
    damaged.write_bytes(content)
    assert fault(damaged) == audio.UNREADABLE


def test_flac_without_length(empty_dir):
    content = bytearray(empty_dir.audio("a.flac").read_bytes())
    content[21] &= 0xF0  # 36 bits of STREAMINFO are the number of samples; 0 is "unknown"
    content[22:26] = bytes(4)
    streamed = empty_dir.path / "streamed.flac"
    streamed.write_bytes(content)
    assert fault(streamed) == audio.UNREADABLE


def test_channels():
    stereo = np.stack([tone(), -tone()], axis=1)
    with pytest.raises(audio.AudioError, match="x has 2 channels; choose one, e.g. --ref_channel"):
        audio.choose_channel(stereo, None, "x")
    with pytest.raises(audio.AudioError, match="--ref_channel is 2"):
        audio.choose_channel(stereo, 2, "x")
    np.testing.assert_array_equal(audio.choose_channel(stereo, 1, "x"), -tone())


def test_paths_lead_from_the_working_directory_then_from_the_data_directory(
    tmp_path, monkeypatch, data_dir
):
    monkeypatch.chdir(tmp_path)
    beside = str(data_dir.path / "audio/u0.wav")
    assert audio.resolve("audio/u0.wav", data_dir.path) == beside
    assert audio.resolve("audio/u0.wav:17", data_dir.path) == beside + ":17"
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio/u0.wav").touch()
    assert audio.resolve("audio/u0.wav", data_dir.path) == "audio/u0.wav"
    assert audio.resolve("audio/none.wav", data_dir.path) == "audio/none.wav"
    assert audio.resolve("cat audio/u1.wav |", data_dir.path) == "cat audio/u1.wav |"


@pytest.mark.parametrize("factor", ["0.9", "1.1"])
def test_change_speed_moves_the_frequency_and_the_length(factor):
    samples = tone(2.0, 16000, 1000).astype(np.float32)
    faster = audio.change_speed(samples, 16000, float(factor))
    assert abs(len(faster) - len(samples) / float(factor)) <= 1
    spectrum = np.abs(np.fft.rfft(faster * np.hanning(len(faster))))
    peak = spectrum.argmax() * 16000 / len(faster)
    assert abs(peak - 1000 * float(factor)) < 1
    # Against the definition y(t) = x(factor t); the filter has edges.
    expected = 0.5 * np.sin(2 * np.pi * 1000 * float(factor) * np.arange(len(faster)) / 16000)
    np.testing.assert_allclose(faster[500:-500], expected[500:-500], atol=2e-3)


def test_resample():
    samples = audio.resample(tone(1.0, 8000).astype(np.float32), 8000, 16000)
    np.testing.assert_allclose(samples[500:-500], tone(1.0, 16000)[500:-500], atol=2e-3)
    same = tone()
    assert audio.resample(same, 8000, 8000) is same


def test_perturbed_entries(empty_dir):
    file = empty_dir.audio("it's a file.wav", tone(0.5))
    expected = audio.change_speed(read(file)[0], 8000, 0.9)
    plain = audio.perturbed(str(file), "0.9")
    assert plain.endswith("|") and audio.source_file(plain) == str(file)
    np.testing.assert_array_equal(read(plain)[0], expected)
    piped = audio.perturbed(f'cat "{file}" |', "0.9")
    assert audio.source_file(piped) is None
    np.testing.assert_array_equal(read(piped)[0], expected)
    twice = read(audio.perturbed(plain, "1.1"))[0]
    np.testing.assert_array_equal(twice, audio.change_speed(expected, 8000, 1.1))
    missing = str(empty_dir.path / "none.wav")
    assert fault(audio.perturbed(missing, "0.9"), named=missing) == audio.MISSING


def test_segment_bounds(empty_dir):
    with audio.open_recording(str(empty_dir.audio("a.wav", tone(1.0)))) as recording:
        assert audio.segment_bounds(recording, 0.25, 0.5, "r") == (2000, 4000)
        assert audio.segment_bounds(recording, 0.25, -1, "r") == (2000, 8000)
        assert audio.segment_bounds(recording, 0.25, 1.5, "r") == (2000, 8000)  # Kaldi's tolerance
        for start, end in [(0.5, 1.6), (1.0, 1.2), (2, -1)]:
            with pytest.raises(audio.AudioError, match="of r, which lasts 1 s") as error:
                audio.segment_bounds(recording, start, end, "r")
            assert error.value.kind == audio.OUTSIDE
