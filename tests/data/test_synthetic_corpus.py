"""Making the corpus: the same bytes for any number of processes, complete or continued."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import soundfile

from espnet_llm_plugin.bin.make_synthetic_corpus import main
from espnet_llm_plugin.data.synthetic import corpus, jobs
from espnet_llm_plugin.data.synthetic.corpus import Sizes, make_corpus
from espnet_llm_plugin.errors import UserError

pytest.importorskip("espeakng_loader", reason="needs the extra 'demo'")

SIZES = Sizes(train=60, dev=5, test=6, lm=50)


def hashes(directory: Path) -> dict:
    """Contents of all files by path; paths inside the tables are made relative."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes().replace(str(directory).encode(), b"DIR")
            found[str(path.relative_to(directory))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus") / "data"
    report, fresh = make_corpus(directory, SIZES, seed=0, nj=1)
    assert fresh
    return directory, report, hashes(directory)


def test_same_bytes_with_two_processes_other_bytes_with_another_seed(made, tmp_path):
    _, _, expected = made
    make_corpus(tmp_path / "two", SIZES, seed=0, nj=2)
    assert hashes(tmp_path / "two") == expected
    make_corpus(tmp_path / "other", Sizes(3, 2, 2, 5), seed=1, nj=1)
    assert not set(hashes(tmp_path / "other").values()) & set(expected.values())


def test_data_directories(made):
    directory, report, _ = made
    seconds = 0.0
    for split, count in (("train", 60), ("dev", 5), ("test", 6)):
        tables = {
            name: dict(
                line.split(maxsplit=1)
                for line in (directory / split / name).read_text().splitlines()
            )
            for name in ("wav.scp", "text", "utt2spk", "spk2utt")
        }
        assert len(tables["wav.scp"]) == count
        assert list(tables["wav.scp"]) == list(tables["text"]) == list(tables["utt2spk"])
        assert list(tables["text"]) == sorted(tables["text"])
        assert list(tables["utt2spk"].values()) == sorted(tables["utt2spk"].values())
        assert {
            utterance: speaker
            for speaker, utterances in tables["spk2utt"].items()
            for utterance in utterances.split()
        } == tables["utt2spk"]
        for utterance, speaker in tables["utt2spk"].items():
            assert utterance.startswith(speaker)
        for utterance, path in tables["wav.scp"].items():
            wave, rate = soundfile.read(path, dtype="int16")
            assert rate == 16000 and wave.ndim == 1
            assert 300 < abs(wave).max() <= 0.951 * 32767
            speed = len(tables["text"][utterance].split()) / (len(wave) / rate)
            assert 1.8 < speed < 5.5
            seconds += len(wave) / rate
    lines = (directory / "lm_train.txt").read_text().splitlines()
    assert len(lines) == 50 and all(re.fullmatch(r"[a-z' ]+", line) for line in lines)
    with_ids = (directory / "lm_train" / "text").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in with_ids] == lines
    assert len({line.split()[0] for line in with_ids}) == 50
    hours = sum(report["sets"][split]["hours"] for split in ("train", "dev", "test"))
    assert hours == pytest.approx(seconds / 3600)


def test_speakers_are_disjoint(made):
    directory, _, _ = made
    names = [
        {line.split()[0] for line in (directory / split / "spk2utt").read_text().splitlines()}
        for split in ("train", "dev", "test")
    ]
    assert len(set.union(*names)) == sum(len(n) for n in names)


def test_a_complete_corpus_is_not_made_again(made, monkeypatch):
    directory, report, expected = made
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    monkeypatch.setattr(corpus, "in_fresh_processes", None)  # would fail if it were called
    again, fresh = make_corpus(directory, SIZES, seed=0, nj=1)
    assert not fresh and again == report
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()} == before


def test_an_interrupted_run_continues(made, monkeypatch, tmp_path):
    _, _, expected = made
    directory = tmp_path / "data"
    calls = []

    def killed_after_two(function, batches, nj, preload):
        for number, result in enumerate(
            jobs.in_fresh_processes(function, batches, nj, preload), start=1
        ):
            calls.append(function.__name__)
            if function is corpus._speak_batch and number == 2:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(corpus, "in_fresh_processes", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(directory, SIZES, seed=0, nj=1)
    assert not (directory / "train").exists()
    done = {p: p.stat().st_mtime_ns for p in directory.rglob("*.wav")}
    assert done
    monkeypatch.setattr(corpus, "in_fresh_processes", jobs.in_fresh_processes)
    make_corpus(directory, SIZES, seed=0, nj=1)
    assert hashes(directory) == expected
    assert {p: p.stat().st_mtime_ns for p in done} == done  # finished batches were kept


def test_a_lost_file_is_made_again(made, tmp_path):
    _, _, expected = made
    directory = tmp_path / "data"
    make_corpus(directory, SIZES, seed=0, nj=2)
    next(iter((directory / "synthetic").rglob("*dev*.wav"))).unlink()
    _, fresh = make_corpus(directory, SIZES, seed=0, nj=1)
    assert fresh and hashes(directory) == expected


def test_another_size_replaces_the_corpus(tmp_path):
    small = Sizes(3, 2, 2, 5)
    make_corpus(tmp_path, small, seed=0)
    (tmp_path / "synthetic" / "mine").mkdir()
    make_corpus(tmp_path, Sizes(4, 2, 2, 5), seed=0)
    assert len((tmp_path / "train" / "text").read_text().splitlines()) == 4
    assert len(list((tmp_path / "synthetic").rglob("*.wav"))) == 8
    assert json.loads((tmp_path / "synthetic" / "corpus.json").read_text())["sizes"]["train"] == 4
    assert (tmp_path / "synthetic" / "mine").is_dir()  # not ours: left alone


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="nj must be at least 1"):
        make_corpus(tmp_path, SIZES, nj=0)
    with pytest.raises(UserError, match="'dev' must have at least 1"):
        Sizes(1, 0, 1, 1)
    with pytest.raises(UserError, match="must not be negative"):
        make_corpus(tmp_path, SIZES, seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_write_error_is_one_helpful_line_and_a_second_run_continues(made, monkeypatch, tmp_path):
    _, _, expected = made
    directory = tmp_path / "data"

    def broken_at_the_second_batch(function, batches, nj, preload):
        if function is corpus._speak_batch:
            batches = [*batches[:1], (batches[1][0], Path("/dev/full/batch"), batches[1][2])]
        return jobs.in_fresh_processes(function, batches, nj, preload)

    monkeypatch.setattr(corpus, "in_fresh_processes", broken_at_the_second_batch)
    with pytest.raises(UserError, match="cannot write /dev/full.* run the same command again"):
        make_corpus(directory, SIZES, seed=0, nj=1)
    assert not (directory / "train").exists()
    monkeypatch.undo()
    make_corpus(directory, SIZES, seed=0, nj=1)
    assert hashes(directory) == expected


def test_a_failed_batch_leaves_nothing(made, tmp_path):
    directory, report, _ = made
    voices = directory / "synthetic" / report["key"] / "babble.npz"
    sentence = corpus.make_texts(SIZES, 0)["dev"][:1]
    (utterance,) = corpus.plan_utterances(sentence, "dev", 0)
    nowhere = utterance._replace(speaker=utterance.speaker._replace(variant="m99"))
    call = ([utterance, nowhere], tmp_path / "dev" / "000", voices)
    with pytest.raises(UserError, match="m99"):
        list(jobs.in_fresh_processes(corpus._speak_batch, [call], 1, corpus.__name__))
    assert list((tmp_path / "dev").iterdir()) == []


def test_what_a_killed_run_left_is_removed(made, tmp_path):
    _, _, expected = made
    directory = tmp_path / "data"
    report = make_corpus(directory, SIZES, seed=0, nj=2)[0]
    (directory / "synthetic" / "corpus.json").unlink()
    half = directory / "synthetic" / report["key"] / "dev" / ".part.x"
    half.mkdir()
    (half / "a.wav").write_bytes(b"half")
    make_corpus(directory, SIZES, seed=0, nj=1)
    assert hashes(directory) == expected


def test_command_line(made, capsys):
    directory, _, _ = made
    options = "--num_train 60 --num_dev 5 --num_test 6 --num_lm 50 --seed 0 --nj 1"
    main(["--output_dir", str(directory), "--size", "tiny", *options.split()])
    printed = capsys.readouterr().out
    assert "already complete" in printed
    assert re.search(r"^train +60 ", printed, re.MULTILINE)


@pytest.fixture
def written(tmp_path):
    """Sentences of somebody else, more than are asked for."""
    for split in ("train", "dev", "test", "lm"):
        (tmp_path / "text" / split).mkdir(parents=True)
        words = ["red", "green", "blue", "black", "white"]
        lines = [f"{split}_{n} the {split} has a {word} ball\n" for n, word in enumerate(words)]
        (tmp_path / "text" / split / "text").write_text("".join(lines))
    return tmp_path / "text"


def test_given_sentences_are_spoken(written, tmp_path, capsys):
    options = "--num_train 4 --num_dev 2 --num_test 3 --num_lm 5 --seed 0 --nj 1"
    main(["--output_dir", str(tmp_path / "data"), "--text", str(written), *options.split()])
    spoken = {}
    for split, count in (("train", 4), ("dev", 2), ("test", 3), ("lm_train", 5)):
        lines = (tmp_path / "data" / split / "text").read_text().splitlines()
        spoken[split] = sorted(line.split(maxsplit=1)[1] for line in lines)
        assert len(lines) == count
    assert spoken["dev"] == ["the dev has a green ball", "the dev has a red ball"]
    assert len(list((tmp_path / "data").rglob("*.wav"))) == 9
    assert re.search(r"^test .* -$", capsys.readouterr().out, re.MULTILINE)  # no grammar's entropy
    # fewer of train, the same speech in test
    fewer = ["--num_train", "1", "--output_dir", str(tmp_path / "fewer"), "--text", str(written)]
    main([*options.split(), *fewer])
    for wav in (tmp_path / "data" / "synthetic").rglob("test/*/*.wav"):
        (same,) = (tmp_path / "fewer").rglob(wav.name)
        assert soundfile.info(same).frames == soundfile.info(wav).frames


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "dev/text has 1 sentences; 2 are asked for"),
        ("dev_9 Dr. Who\n", "dev_9 has characters other than a-z.*'Dr. Who'"),
    ],
)
def test_sentences_that_cannot_be_spoken(written, tmp_path, line, message):
    (written / "dev" / "text").write_text(f"dev_0 a ball\n{line}")
    with pytest.raises(UserError, match=message):
        make_corpus(tmp_path / "data", Sizes(4, 2, 3, 5), text_dir=written)
    assert not (tmp_path / "data").exists()


def test_processes_are_fresh_and_errors_arrive():
    pids = list(jobs.in_fresh_processes(os.getpid, [()] * 4, 2, "os"))
    assert len(set(pids)) == 4 and os.getpid() not in pids
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all"):
        list(jobs.in_fresh_processes(os.listdir, [("/nowhere/at/all",)], 1, "os"))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(jobs.in_fresh_processes(divmod, [(1, 0)], 1, "os"))
    with pytest.raises(RuntimeError, match="exit code 7"):
        list(jobs.in_fresh_processes(os._exit, [(7,)], 1, "os"))
