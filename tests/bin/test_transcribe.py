"""Live transcription: recordings, pipes, the microphone; what a terminal and a pipe get."""

import io
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.bin import transcribe
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference import live, sources
from espnet_llm_plugin.inference.live import LiveDisplay, last_columns
from espnet_llm_plugin.inference.loading import load_asr
from espnet_llm_plugin.inference.recognizer import Recognizer
from espnet_llm_plugin.inference.streaming import Partial
from tests.inference.tiny_asr import RATE, make_audio
from tests.inference.tiny_streaming import make_streaming_asr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    make_audio(directory, {"speech": 1.5})
    return make_streaming_asr(directory / "asr", "emformer", "transducer"), directory / "speech.wav"


@pytest.fixture
def expected(files):
    """What the same recogniser makes of the whole recording."""
    model, wav = files
    samples, _ = soundfile.read(wav, dtype="float32")
    return Recognizer(load_asr(model.config, model.model), beam_size=4)(samples)[0].text


def check_lines(output, expected):
    """Partial results, each continuing the stable part before it, and the final one."""
    *partials, final = output.splitlines()
    assert len(partials) > 3
    stable = ""
    for line in partials:
        kind, found, _ = line.split("\t")
        assert kind.startswith("partial ") and found.startswith(stable)
        stable = found
    head, text = final.split("\t")
    assert head.startswith("final 0.00-1.5") and text == expected and expected.startswith(stable)


NO_ENDPOINT = ["--endpoint", "false"]


def test_recording_into_a_pipe(files, expected, capsys):
    model, wav = files
    transcribe.main([*model.asr_options(), "--wav", str(wav), *NO_ENDPOINT])
    check_lines(capsys.readouterr().out, expected)


def test_raw_samples_from_a_pipe(files, expected):
    """As a process, whose standard input and output are pipes."""
    model, wav = files
    samples, _ = soundfile.read(wav, dtype="int16")
    command = [sys.executable, "-m", "espnet_llm_plugin.bin.transcribe", *model.asr_options()]
    result = subprocess.run(
        [*command, "--stdin", *NO_ENDPOINT],
        input=samples.astype("<i2").tobytes() + b"\x00",  # half a sample too many
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr.decode()
    check_lines(result.stdout.decode(), expected)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_recording_on_a_terminal(files, expected, monkeypatch):
    model, wav = files
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    transcribe.main([*model.asr_options(), "--wav", str(wav), *NO_ENDPOINT])
    first, *updates, last = terminal.getvalue().split(live.CLEAR_LINE)
    assert first == "" and last == f"{expected}\n" and len(updates) > 3
    for update in updates:
        stable, _, rest = update.partition(live.DIM)
        assert rest.endswith(live.PLAIN) and expected.startswith(stable) and "\n" not in update


def test_endpoints_end_lines(files, capsys):
    model, wav = files
    options = ["--wav", str(wav), "--rule3_min_utterance_length", "0.5"]
    transcribe.main([*model.asr_options(), *options])
    finals = [line for line in capsys.readouterr().out.splitlines() if line.startswith("final")]
    assert len(finals) >= 3
    assert [line.split("\t")[0] for line in finals[:2]] == ["final 0.00-0.56", "final 0.56-1.12"]


class TestDisplay:
    def test_only_changes_are_written(self):
        output = io.StringIO()
        display = LiveDisplay(output)
        for seconds, (stable, tail) in enumerate([("", ""), ("a", "b"), ("a", "b"), ("ab", "")]):
            display.partial(Partial([], 0, stable, tail), seconds)
        assert output.getvalue() == "partial 1.00\ta\tb\npartial 3.00\tab\t\n"

    @pytest.mark.parametrize(
        "columns, shown",
        [
            (9, ("abcd", "efgh")),
            (8, ("abcd", "efgh")),
            (7, ("…cd", "efgh")),
            (5, ("…", "efgh")),
            (3, ("…", "gh")),
            (0, ("…", "")),
        ],
    )
    def test_the_end_of_long_lines_is_shown(self, columns, shown):
        assert last_columns("abcd", "efgh", columns) == shown

    def test_wide_characters(self):
        assert last_columns("日本", "語", 6) == ("日本", "語")
        assert last_columns("日本", "語", 5) == ("…本", "語")


class TestSources:
    def test_recording_is_resampled_and_cut(self, tmp_path):
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
        soundfile.write(tmp_path / "x.flac", tone, 8000)
        pieces = list(sources.wav_file(tmp_path / "x.flac", RATE, 3000))
        assert [len(piece) for piece in pieces] == [3000] * 5 + [1000]
        samples = np.concatenate(pieces)
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / RATE)
        assert samples.dtype == np.float32
        assert np.abs(samples - expected)[500:-500].max() < 1e-3

    def test_real_time(self, tmp_path, monkeypatch):
        soundfile.write(tmp_path / "x.wav", np.zeros(4000), RATE)
        now, slept = [10.0], []

        def sleep(seconds):
            slept.append(seconds)
            now[0] += seconds

        monkeypatch.setattr(sources.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(sources.time, "sleep", sleep)
        source = sources.wav_file(tmp_path / "x.wav", RATE, 1600, real_time=True)
        next(source)
        now[0] += 0.04  # recognition takes some of the time
        next(source)
        now[0] += 1.0  # or more than there is
        next(source)
        assert slept == pytest.approx([0.1, 0.06, 0.0])

    @pytest.mark.parametrize("sizes", [[6], [1, 1, 1, 1, 1, 1], [3, 3], [5, 1]])
    def test_raw_samples(self, sizes):
        data = np.array([-32768, 16384, 1], dtype="<i2").tobytes()

        class Pipe:
            def __init__(self):
                self.position, self.left = 0, list(sizes)

            def read1(self, most):
                size = min(self.left.pop(0), most) if self.left else 0
                self.position += size
                return data[self.position - size : self.position]

        found = np.concatenate(list(sources.raw_pcm(Pipe(), 100)))
        assert found.tolist() == [-1.0, 0.5, 1 / 32768] and found.dtype == np.float32

    def test_bad_recordings(self, tmp_path):
        soundfile.write(tmp_path / "two.wav", np.zeros((100, 2)), RATE)
        (tmp_path / "text.wav").write_text("no audio")
        for name, message in (
            ("two", "2 channels, expected one"),
            ("text", "cannot read"),
            ("missing", "cannot read"),
        ):
            with pytest.raises(UserError, match=message):
                list(sources.wav_file(tmp_path / f"{name}.wav", RATE, 100))

    def test_microphone_without_sounddevice(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sounddevice", None)
        with pytest.raises(UserError, match=r"pip install 'espnet_llm_plugin\[microphone\]'"):
            next(sources.microphone(RATE, 100))

    def test_microphone(self, monkeypatch):
        """sounddevice's callback interface, with a device that says three blocks."""

        class InputStream:
            def __init__(self, samplerate, blocksize, channels, dtype, callback):
                assert (samplerate, blocksize, channels, dtype) == (RATE, 4, 1, "float32")
                self.callback = callback

            def __enter__(self):
                buffer = np.zeros((4, 1), dtype=np.float32)
                for value in (1, 2, 3):
                    buffer[:] = value  # sounddevice uses one buffer again and again
                    self.callback(buffer, 4, None, None)

            def __exit__(self, *_):
                closed.append(True)

        closed = []
        module = types.SimpleNamespace(InputStream=InputStream, PortAudioError=OSError)
        monkeypatch.setitem(sys.modules, "sounddevice", module)
        source = sources.microphone(RATE, 4)
        assert [next(source).tolist() for _ in range(3)] == [[n] * 4 for n in (1.0, 2.0, 3.0)]
        source.close()
        assert closed == [True]

        def refuse(**_):
            raise OSError("no device")

        module.InputStream = refuse
        with pytest.raises(UserError, match="does not give 16000 samples a second: no device"):
            next(sources.microphone(RATE, 4))


def test_interrupt_shows_what_there_is(files, monkeypatch):
    model, wav = files
    samples, _ = soundfile.read(wav, dtype="float32")

    def interrupted():
        yield samples[:16000]
        raise KeyboardInterrupt

    recognizer = Recognizer(load_asr(model.config, model.model), beam_size=4)
    output = io.StringIO()
    (segment,) = live.transcribe(
        live.StreamingRecognizer(recognizer), interrupted(), LiveDisplay(output)
    )
    assert segment.nbest[0].text == recognizer(samples[:16000])[0].text
    assert output.getvalue().splitlines()[-1].startswith("final 0.00-1.00\t")


def test_one_source_is_needed(files, capsys):
    model, wav = files
    for options in ([], ["--stdin", "--wav", str(wav)]):
        with pytest.raises(SystemExit):
            transcribe.main([*model.asr_options(), *options])
    assert "--microphone" in capsys.readouterr().err
