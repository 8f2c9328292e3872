"""Formatting: right samples from every source, restartable, complete or absent."""

import builtins
import errno
import os
import signal
import subprocess
import sys
import time

import kaldiio
import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.data import atomic, audio, format
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.journal import Job
from espnet_llm_plugin.data.kaldi import Segment
from espnet_llm_plugin.errors import UserError

from .conftest import table, tone


def sounds(target, rate=8000):
    """Utterance -> int16 samples, checked against utt2num_samples."""
    lengths = table(target / "utt2num_samples")
    result = {}
    for key, path in table(target / "wav.scp").items():
        with soundfile.SoundFile(path) as stream:
            assert (stream.samplerate, stream.subtype, stream.channels) == (rate, "PCM_16", 1)
            result[key] = stream.read(dtype="int16")
        assert len(result[key]) == int(lengths[key])
    assert set(lengths) == set(result)
    return result


def content(directory):
    """All files below a directory, but for the lock and the journal's order of writing."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in (".lock", "journal")
    }


@pytest.fixture
def mixed(empty_dir, tmp_path, monkeypatch):
    """One utterance of every kind of source, all the same sound; the working directory is tmp."""
    monkeypatch.chdir(tmp_path)
    samples = (1000 * tone(0.5, 16000)).astype(np.int16)
    wav = empty_dir.audio("a.wav", samples, 16000)
    flac = empty_dir.audio("b.flac", samples, 16000)
    (tmp_path / "here.wav").write_bytes(wav.read_bytes())
    with open(empty_dir.path / "c.ark", "wb") as stream:
        kaldiio.save_ark(stream, {"c": (16000, samples)}, scp=str(tmp_path / "c.scp"))
    offset = (tmp_path / "c.scp").read_text().rstrip().rpartition(":")[2]
    entries = {
        "absolute": str(wav),
        "archive": f"c.ark:{offset}",
        "beside": "audio/a.wav",
        "flac": "audio/b.flac",
        "here": "here.wav",
        "pipe": f"cat {flac} |",
    }
    empty_dir.table("wav.scp", "".join(f"{k} {v}\n" for k, v in entries.items()))
    empty_dir.table("text", "".join(f"{k} some words\n" for k in entries))
    empty_dir.table("utt2spk", "".join(f"{k} s\n" for k in entries))
    return empty_dir, samples, entries


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
@pytest.mark.parametrize("fs", [None, 16000, 8000])
def test_every_source(mixed, tmp_path, audio_format, fs):
    source, samples, entries = mixed
    target = tmp_path / "out"
    summary = format_data_dir(source.path, target, fs=fs, audio_format=audio_format)
    assert summary.utterances == len(entries) and summary.seconds == pytest.approx(6 * 0.5)
    expected = samples
    if fs == 8000:
        expected = audio.to_pcm16(audio.resample(samples / np.float32(32768), 16000, 8000))
    result = sounds(target, fs or 16000)
    assert set(result) == set(entries)
    for key in entries:
        np.testing.assert_array_equal(result[key], expected)
    scp = table(target / "wav.scp")
    assert all(path.endswith(f".{audio_format}") for path in scp.values())
    # What was as wanted is used in place, as ESPnet does; all else is below the target.
    in_place = {key for key, path in scp.items() if not path.startswith(str(target))}
    if fs == 8000:
        assert in_place == set()
    else:
        assert in_place == ({"flac"} if audio_format == "flac" else {"absolute", "beside", "here"})
    assert (target / "feats_type").read_text() == "raw\n"
    assert table(target / "text") == table(source.path / "text")
    assert table(target / "spk2utt") == {"s": " ".join(sorted(entries))}
    assert (target / "dropped_utts").read_text() == ""


def test_segments(empty_dir, tmp_path):
    noise = np.random.default_rng(0).integers(-9999, 9999, 16000).astype(np.int16)
    empty_dir.audio("r.wav", noise)
    pipe = empty_dir.audio("p.wav", noise[::-1])
    empty_dir.table("wav.scp", f"r audio/r.wav\np cat {pipe} |\nunused audio/none.wav\n")
    empty_dir.table("segments", "a r 0 0.5\nb r 0.25 1.5\nc p 1 -1\nd r 1.9 2.4\ne p 0.0 0.125\n")
    empty_dir.table("text", "".join(f"{k} x\n" for k in "abcde"))
    empty_dir.table("utt2spk", "".join(f"{k} s\n" for k in "abcde"))
    format_data_dir(empty_dir.path, tmp_path / "out")
    result = sounds(tmp_path / "out")
    np.testing.assert_array_equal(result["a"], noise[:4000])
    np.testing.assert_array_equal(result["b"], noise[2000:12000])
    np.testing.assert_array_equal(result["c"], noise[::-1][8000:])
    np.testing.assert_array_equal(result["d"], noise[15200:])
    np.testing.assert_array_equal(result["e"], noise[::-1][:1000])
    assert not (tmp_path / "out" / "segments").exists()


def test_lhotse_reads_the_same_segments(empty_dir, tmp_path):
    """An independent reader of Kaldi directories finds the same samples before and after."""
    lhotse = pytest.importorskip("lhotse")
    noise = np.random.default_rng(0).integers(-9999, 9999, 16000).astype(np.int16)
    file = empty_dir.audio("r.wav", noise)
    empty_dir.table("wav.scp", f"r {file}\n")
    empty_dir.table("segments", "a r 0 0.5\nb r 0.25 1.5\n")
    empty_dir.table("text", "a x\nb y\n")
    empty_dir.table("utt2spk", "a s\nb s\n")
    format_data_dir(empty_dir.path, tmp_path / "out")
    result = sounds(tmp_path / "out")
    for path in (empty_dir.path, tmp_path / "out"):
        recordings, supervisions, _ = lhotse.kaldi.load_kaldi_data_dir(path, sampling_rate=8000)
        cuts = lhotse.CutSet.from_manifests(recordings, supervisions)
        cuts = cuts.trim_to_supervisions(keep_overlapping=False)
        found = {cut.supervisions[0].id: cut.load_audio()[0] for cut in cuts}
        assert set(found) == {"a", "b"}
        for key, samples in found.items():
            np.testing.assert_array_equal(audio.to_pcm16(samples), result[key])


def test_batches_hold_every_utterance_once(tmp_path):
    segment = Segment("r", 0, 1)
    jobs = [
        Job("long.wav", tuple((f"a{i}", segment) for i in range(100))),
        Job("cat long.wav |", tuple((f"b{i}", segment) for i in range(100))),
        *(Job(f"{i}.flac", ((f"c{i}", None),)) for i in range(100)),
    ]
    for nj in (1, 4, 100):
        batches = list(format._batches(jobs, nj))
        utterances = [key for batch in batches for job in batch for key, _ in job.parts]
        assert utterances == [key for job in jobs for key, _ in job.parts]  # also the order
        size = max(1, 300 // (8 * nj))
        for batch in batches:
            if any(job.spec == "cat long.wav |" for job in batch):
                assert sum(len(j.parts) for j in batch if j.spec.startswith("cat")) == 100
            else:
                assert sum(len(job.parts) for job in batch) <= size
    assert list(format._batches([], 2)) == []


def test_segments_of_one_file_in_several_processes(empty_dir, tmp_path):
    noise = np.random.default_rng(0).integers(-9999, 9999, 80000).astype(np.int16)
    empty_dir.audio("r.wav", noise)
    empty_dir.table("wav.scp", "r audio/r.wav\n")
    ids = [f"u{i:02d}" for i in range(40)]
    empty_dir.table(
        "segments", "".join(f"{k} r {i / 4} {i / 4 + 0.25}\n" for i, k in enumerate(ids))
    )
    empty_dir.table("text", "".join(f"{k} x\n" for k in ids))
    empty_dir.table("utt2spk", "".join(f"{k} s\n" for k in ids))
    format_data_dir(empty_dir.path, tmp_path / "out", nj=2)
    result = sounds(tmp_path / "out")
    for i, key in enumerate(ids):
        np.testing.assert_array_equal(result[key], noise[i * 2000 : (i + 1) * 2000])


def test_channel(empty_dir, tmp_path):
    empty_dir.audio("a.flac", np.stack([tone(), 0.5 * tone()], axis=1))
    empty_dir.table("wav.scp", "a audio/a.flac\n")
    empty_dir.table("text", "a x\n")
    empty_dir.table("utt2spk", "a s\n")
    with pytest.raises(UserError, match="2 channels; choose one, e.g. --ref_channel 0"):
        format_data_dir(empty_dir.path, tmp_path / "out")
    assert not (tmp_path / "out" / "wav.scp").exists()
    peaks = []
    for channel in (0, 1):
        format_data_dir(empty_dir.path, tmp_path / "out", ref_channel=channel)
        peaks.append(np.abs(sounds(tmp_path / "out")["a"]).max())
    assert peaks[1] == pytest.approx(peaks[0] / 2, rel=0.01)


def test_several_rates_need_fs(data_dir, tmp_path):
    data_dir.audio("u3.wav", rate=16000)
    with pytest.raises(UserError, match=r"8000 Hz \(u4\), 16000 Hz \(u3\). Choose one with --fs"):
        format_data_dir(data_dir.path, tmp_path / "out")
    assert not (tmp_path / "out" / "wav.scp").exists()
    format_data_dir(data_dir.path, tmp_path / "out", fs=8000)
    assert len(sounds(tmp_path / "out")) == 5


def test_result_does_not_depend_on_the_number_of_processes(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(5, 40):
        data_dir.append("wav.scp", f"u{i} audio/u{i % 5}.wav")
        data_dir.append("text", f"u{i} x")
        data_dir.append("utt2spk", f"u{i} s")
    results = []
    for nj in (1, 2, 3):
        (tmp_path / f"nj{nj}").mkdir()
        monkeypatch.chdir(tmp_path / f"nj{nj}")
        format_data_dir(data_dir.path, "out", fs=16000, nj=nj)
        results.append(content(tmp_path / f"nj{nj}/out"))
    assert len(results[0]) > 40
    assert results[0] == results[1] == results[2]


def test_odd_utterance_ids(empty_dir, tmp_path):
    ids = ["a/b", "a%2Fb", "..", "\u00fc", "a:b", "-rf", "a|"]
    empty_dir.audio("a.wav")
    empty_dir.table("wav.scp", "".join(f"{i} audio/a.wav\n" for i in ids))
    empty_dir.table("text", "".join(f"{i} x\n" for i in ids))
    empty_dir.table("utt2spk", "".join(f"{i} s\n" for i in ids))
    format_data_dir(empty_dir.path, tmp_path / "out")
    assert set(sounds(tmp_path / "out")) == set(ids)
    assert len(set(table(tmp_path / "out/wav.scp").values())) == len(ids)
    written = list((tmp_path / "out/data").glob("format.*/*.flac"))
    assert len(written) == len(ids)


# -- reruns ------------------------------------------------------------------------------------


def written(target):
    return {file.stem: file.stat().st_mtime_ns for file in target.glob("data/format.*/*.flac")}


def test_rerun_does_nothing_again(data_dir, tmp_path):
    target = tmp_path / "out"
    format_data_dir(data_dir.path, target)
    before, times = content(target), written(target)
    assert len(times) == 5
    assert format_data_dir(data_dir.path, target, nj=2).reused == 5
    assert content(target) == before and written(target) == times


@pytest.mark.parametrize("what", ["source", "entry", "output", "cut output", "journal"])
def test_rerun_redoes_what_changed(data_dir, tmp_path, what):
    target = tmp_path / "out"
    format_data_dir(data_dir.path, target)
    times = written(target)
    output = next(target.glob("data/format.*/u2.flac"))
    expected = sounds(target)["u2"]
    if what == "source":
        data_dir.audio("u2.wav", tone(0.35))
        expected = soundfile.read(data_dir.path / "audio/u2.wav", dtype="int16")[0]
    elif what == "entry":
        data_dir.replace("wav.scp", "u2 audio/u2.wav", "u2 audio/u1.wav")
        expected = sounds(target)["u1"]
    elif what == "output":
        output.unlink()
    elif what == "cut output":  # as a power cut may leave it
        output.write_bytes(output.read_bytes()[:100])
    else:  # the process died while it wrote the journal's last line
        journal = target / "data/journal"
        lines = journal.read_text().splitlines()
        last = next(line for line in lines if line.startswith("u2\t"))
        lines.remove(last)
        journal.write_text("\n".join([*lines, last[:9]]))
    assert format_data_dir(data_dir.path, target).reused == 4
    assert {key for key, t in written(target).items() if times[key] != t} == {"u2"}
    np.testing.assert_array_equal(sounds(target)["u2"], expected)
    assert format_data_dir(data_dir.path, target).reused == 5  # the journal is whole again


def test_other_settings_redo_all(data_dir, tmp_path):
    target = tmp_path / "out"
    format_data_dir(data_dir.path, target)
    assert format_data_dir(data_dir.path, target, fs=16000).reused == 0
    assert len(sounds(target, 16000)) == 5


def test_changed_segment_is_redone(data_dir, tmp_path):
    data_dir.table("segments", "u0 u0 0 0.1\nu1 u1 0 0.1\n")
    data_dir.table("text", "u0 x\nu1 x\n")
    data_dir.table("utt2spk", "u0 x\nu1 x\n")
    format_data_dir(data_dir.path, tmp_path / "out")
    data_dir.replace("segments", "u0 u0 0 0.1", "u0 u0 0 0.15")
    assert format_data_dir(data_dir.path, tmp_path / "out").reused == 1
    assert len(sounds(tmp_path / "out")["u0"]) == 1200


class FullDisk:
    """``open`` for writing that has room for some files only."""

    def __init__(self, files: int):
        self.files = files

    def __call__(self, path, mode="r", *args, **kwargs):
        self.files -= "w" in mode
        return Broken(path) if self.files < 0 else builtins.open(path, mode, *args, **kwargs)


class Broken:
    """Half of the data is written, then the disk is full."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, data):
        with builtins.open(self.path, "wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk(data_dir, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(format, "open", FullDisk(3), raising=False)
        with pytest.raises(UserError, match="the disk is full.*run the same command again"):
            format_data_dir(data_dir.path, target)
    assert not (target / "wav.scp").exists()
    files = list(target.glob("data/format.*/*"))
    assert len(files) == 3
    for file in files:
        soundfile.read(file)  # whole
    assert format_data_dir(data_dir.path, target).reused == 3
    format_data_dir(data_dir.path, tmp_path / "other")
    assert {k: v.tolist() for k, v in sounds(target).items()} == {
        k: v.tolist() for k, v in sounds(tmp_path / "other").items()
    }


def test_disk_full_while_tables_are_written(data_dir, tmp_path, monkeypatch):
    target = tmp_path / "out"

    def no_room(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", no_room)
        with pytest.raises(UserError, match=f"cannot write {target}: the disk is full"):
            format_data_dir(data_dir.path, target)
    assert not (target / "wav.scp").exists()
    assert [f for f in target.iterdir() if f.is_file()] == []
    assert format_data_dir(data_dir.path, target).reused == 5


def test_no_permission(data_dir, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(UserError, match=f"cannot write {blocker}/out"):
        format_data_dir(data_dir.path, blocker / "out")


def slow_dir(builder, count):
    for i in range(count):
        file = builder.audio(f"u{i}.wav", tone(0.2 + 0.01 * i))
        builder.append("wav.scp", f"u{i:02d} sleep 0.02; cat {file} |")
        builder.append("text", f"u{i:02d} x")
        builder.append("utt2spk", f"u{i:02d} s")


def children(pid):
    return [
        int(child)
        for task in os.listdir(f"/proc/{pid}/task")
        for child in open(f"/proc/{pid}/task/{task}/children").read().split()
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_kill_in_the_middle_and_rerun(empty_dir, tmp_path, root):
    slow_dir(empty_dir, 60)
    target = tmp_path / "out"
    command = [sys.executable, "-m", "espnet_llm_plugin.bin.format_wav_scp"]
    command += [str(empty_dir.path), str(target), "--nj", "2"]
    process = subprocess.Popen(command, cwd=root)
    journal = target / "data/journal"
    deadline = time.time() + 60
    while not (journal.exists() and len(journal.read_text().splitlines()) >= 6):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (target / "wav.scp").exists()
    while any(os.path.exists(f"/proc/{pid}") and state(pid) != "Z" for pid in workers):
        assert time.time() < deadline, "workers outlive the process that started them"
        time.sleep(0.01)
    for file in target.glob("data/format.*/*.flac"):
        soundfile.read(file)
    leftover = target / "data/format.00/u.flac.123.tmp"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")

    summary = format_data_dir(empty_dir.path, target)
    assert summary.utterances == 60 and 6 <= summary.reused < 60
    assert not list(target.glob("data/format.*/*.tmp"))
    for i, samples in enumerate(sounds(target).values()):
        expected, _ = soundfile.read(empty_dir.path / f"audio/u{i}.wav", dtype="int16")
        np.testing.assert_array_equal(samples, expected)


def state(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_dead_worker(empty_dir, tmp_path):
    slow_dir(empty_dir, 20)
    empty_dir.replace("wav.scp", "u15 ", "u15 kill -9 $PPID; ")
    with pytest.raises(UserError, match="a worker process died.*run the same command again"):
        format_data_dir(empty_dir.path, tmp_path / "out", nj=2)
    empty_dir.replace("wav.scp", "kill -9 $PPID; ", "")
    assert format_data_dir(empty_dir.path, tmp_path / "out").utterances == 20


def test_one_run_at_a_time(data_dir, tmp_path):
    target = tmp_path / "out"
    with (
        format._alone_in(target / "data"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        format_data_dir(data_dir.path, target)
    format_data_dir(data_dir.path, target)


# -- bad input ---------------------------------------------------------------------------------


def spoil_audio(kind):
    def spoil(builder):
        file = builder.path / "audio/u2.wav"
        if kind == audio.MISSING:
            file.unlink()
        elif kind == audio.EMPTY_FILE:
            file.write_bytes(b"")
        elif kind == audio.UNREADABLE:
            file.write_bytes(b"RIFF, but not really" * 9)
        elif kind == audio.NO_SAMPLES:
            builder.audio("u2.wav", np.zeros(0))
        elif kind == audio.NOT_FINITE:
            builder.audio("u2.wav", np.full(800, np.nan), subtype="FLOAT")
        elif kind == audio.CHANNELS:
            builder.audio("u2.wav", np.zeros((800, 2)))
        elif kind == audio.PIPE_FAILED:
            builder.replace("wav.scp", "u2 audio/u2.wav", "u2 false |")

    return spoil


AUDIO_FAULTS = [
    audio.MISSING,
    audio.EMPTY_FILE,
    audio.UNREADABLE,
    audio.NO_SAMPLES,
    audio.NOT_FINITE,
    audio.CHANNELS,
    audio.PIPE_FAILED,
]


@pytest.mark.parametrize("kind", AUDIO_FAULTS)
def test_bad_audio(data_dir, tmp_path, kind):
    target = tmp_path / "out"
    format_data_dir(data_dir.path, target)
    spoil_audio(kind)(data_dir)
    with pytest.raises(UserError) as error:
        format_data_dir(data_dir.path, target)
    message = str(error.value)
    assert f"{kind} (1): u2 (" in message and str(data_dir.path) in message
    assert "--drop_bad true" in message
    assert not (target / "wav.scp").exists()  # the old result is not taken for the new one

    summary = format_data_dir(data_dir.path, target, drop_bad=True)
    assert (summary.utterances, summary.dropped) == (4, 1)
    rest = {"u0", "u1", "u3", "u4"}
    assert set(sounds(target)) == set(table(target / "text")) == rest
    assert set(table(target / "utt2spk")) == rest
    assert (target / "dropped_utts").read_text().startswith(f"u2 {kind}: ")


def test_text_without_audio_and_the_reverse(data_dir, tmp_path):
    data_dir.append("text", "u7 hello")
    data_dir.replace("text", "u3 word3 and more\n", "")
    with pytest.raises(UserError) as error:
        format_data_dir(data_dir.path, tmp_path / "out")
    assert "text without audio (1): u7" in str(error.value)
    assert "audio without text (1): u3" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert format_data_dir(data_dir.path, tmp_path / "out", drop_bad=True).utterances == 4


def test_segment_outside_drops_only_that_segment(empty_dir, tmp_path):
    empty_dir.audio("r.wav", tone(1.0))
    empty_dir.table("wav.scp", "r audio/r.wav\n")
    empty_dir.table("segments", "a r 0 0.5\nb r 0.8 1.6\nc r 0.5 1\n")
    empty_dir.table("text", "a x\nb x\nc x\n")
    empty_dir.table("utt2spk", "a s\nb s\nc s\n")
    with pytest.raises(UserError, match=r"segment outside its recording \(1\): b \(0.8 to 1.6 s"):
        format_data_dir(empty_dir.path, tmp_path / "out")
    format_data_dir(empty_dir.path, tmp_path / "out", drop_bad=True)
    assert set(sounds(tmp_path / "out")) == {"a", "c"}


def test_empty_transcripts_are_left_to_the_filter(data_dir, tmp_path):
    data_dir.replace("text", "u3 word3 and more", "u3")
    assert format_data_dir(data_dir.path, tmp_path / "out").utterances == 5


def test_wrong_arguments(data_dir, tmp_path):
    with pytest.raises(UserError, match="same directory"):
        format_data_dir(data_dir.path, data_dir.path)
    with pytest.raises(UserError, match="'mp3' is not one of flac, wav"):
        format_data_dir(data_dir.path, tmp_path / "out", audio_format="mp3")


def test_importing_the_package_does_not_import_torch(root):
    code = """if True:
        import sys
        from espnet_llm_plugin.data import filter, format, lm_text, perturb, split, tokens, validate
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_real_recordings(shared_data, tmp_path):
    source = shared_data / "speech/librispeech"
    durations = table(source / "utt2dur")
    summary = format_data_dir(source, tmp_path / "out", fs=16000, nj=2)
    assert summary.utterances == len(durations)
    for key, count in table(tmp_path / "out/utt2num_samples").items():
        assert int(count) / 16000 == pytest.approx(float(durations[key]), abs=1e-3)
