"""Tables of data directories: every kind of fault is found and named."""

import pytest

from espnet_llm_plugin.data import kaldi
from espnet_llm_plugin.data.problems import Problems, listing
from espnet_llm_plugin.errors import UserError


def read(builder, **kwargs):
    problems = Problems(str(builder.path))
    data = kaldi.read_data_dir(builder.path, problems, **kwargs)
    kaldi.check_consistency(data, problems)
    return data, problems


def kinds(problems):
    return {(problem.kind, problem.key) for problem in problems.found}


def test_sound_directory(data_dir):
    data, problems = read(data_dir)
    assert problems.found == []
    assert data.utterances == ["u0", "u1", "u2", "u3", "u4"]
    assert data.text["u1"] == "word1 and more"
    assert kaldi.speaker_to_utterances(data.utt2spk) == {"s0": "u0 u2 u4", "s1": "u1 u3"}


def test_byte_order_mark_and_windows_line_ends_are_accepted(data_dir):
    text = (data_dir.path / "text").read_bytes()
    data_dir.table("text", b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    data, problems = read(data_dir)
    assert problems.found == []
    assert data.text["u0"] == "word0 and more"


@pytest.mark.parametrize(
    "break_it, kind, key, detail",
    [
        (
            lambda d: d.table("text", b"u0 fine\nu1 caf\xe9 \nu2 a\nu3 a\nu4 a\n"),
            kaldi.BAD_UTF8,
            "u1",
            "text:2, byte 7",
        ),
        (lambda d: d.append("text", ""), kaldi.BAD_COLUMNS, "", "text:6 has 0"),
        (lambda d: d.replace("wav.scp", " audio/u2.wav", ""), kaldi.BAD_COLUMNS, "u2", "wav.scp:3"),
        (lambda d: d.replace("utt2spk", "u2 s0", "u2 s0 x"), kaldi.BAD_COLUMNS, "u2", "has 3"),
        (lambda d: d.append("text", "u1 other"), kaldi.DUPLICATE, "u1", "text:2 and 6"),
        (lambda d: d.append("wav.scp", "u1 audio/u0.wav"), kaldi.DUPLICATE, "u1", "wav.scp:2 and"),
        (lambda d: d.append("text", "u7 hello"), kaldi.NO_AUDIO, "u7", ""),
        (lambda d: d.replace("text", "u3 word3 and more\n", ""), kaldi.NO_TEXT, "u3", ""),
        (lambda d: d.replace("text", "u3 word3 and more", "u3 "), kaldi.EMPTY_TEXT, "u3", ""),
        (lambda d: d.replace("utt2spk", "u4 s0\n", ""), kaldi.NO_SPEAKER, "u4", ""),
        (lambda d: d.append("utt2spk", "u9 s0"), kaldi.SPEAKER_ONLY, "u9", ""),
    ],
)
def test_faults_of_tables(data_dir, break_it, kind, key, detail):
    break_it(data_dir)
    data, problems = read(data_dir)
    assert kinds(problems) == {(kind, key)}  # once, and not once more as a consequence
    assert detail in problems.found[0].detail
    with pytest.raises(UserError, match=str(data_dir.path)) as error:
        problems.check("advice")
    assert kind in str(error.value) and key in str(error.value)
    rest = kaldi.without_problems(data, problems)
    assert set(rest.utterances) == {"u0", "u1", "u2", "u3", "u4"} - {key}
    assert set(rest.text) == set(rest.utt2spk) == set(rest.utterances)


def test_repeated_line_is_reported_and_one_copy_read(data_dir):
    data_dir.append("text", "u1 word1 and more")
    data, problems = read(data_dir)
    assert kinds(problems) == {(kaldi.DUPLICATE, "u1")}
    assert data.text["u1"] == "word1 and more"


@pytest.mark.parametrize(
    "line, kind, keys",
    [
        ("a r9 0 1", kaldi.UNKNOWN_RECORDING, {"a"}),
        ("a r0 1 0.5", kaldi.BAD_TIMES, {"a"}),
        ("a r0 -1 0.5", kaldi.BAD_TIMES, {"a"}),
        ("a r0 0 inf", kaldi.BAD_TIMES, {"a"}),
        ("a r0 x 0.5", kaldi.BAD_TIMES, {"a"}),
        ("a r0 0.1", kaldi.BAD_COLUMNS, {"a"}),
    ],
)
def test_faults_of_segments(empty_dir, line, kind, keys):
    empty_dir.table("wav.scp", "r0 r0.wav\n")
    empty_dir.table("segments", line + "\nb r0 0 -1\n")
    empty_dir.table("text", "a x\nb y\n")
    empty_dir.table("utt2spk", "a s\nb s\n")
    data, problems = read(empty_dir)
    assert kinds(problems) == {(kind, key) for key in keys}
    assert kaldi.without_problems(data, problems).utterances == ["b"]


@pytest.mark.parametrize("name", ["wav.scp", "text", "utt2spk"])
def test_missing_file_is_named(data_dir, name):
    (data_dir.path / name).unlink()
    with pytest.raises(UserError, match=name):
        read(data_dir)


def test_missing_directory_and_empty_wav_scp(data_dir, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        kaldi.read_data_dir(tmp_path / "none", Problems(""))
    data_dir.table("wav.scp", "")
    with pytest.raises(UserError, match="is empty"):
        read(data_dir)


def test_what_may_be_missing(data_dir):
    (data_dir.path / "text").unlink()
    (data_dir.path / "utt2spk").unlink()
    data, problems = read(data_dir, require_text=False, utterance_is_speaker=True)
    assert problems.found == []
    assert data.text is None
    assert data.utt2spk == {f"u{i}": f"u{i}" for i in range(5)}


def test_message_counts_all_and_names_ten(data_dir):
    data_dir.table("text", "")
    for i in range(25):
        data_dir.append("text", f"x{i:02d} word")
    _, problems = read(data_dir)
    message = problems.message()
    assert f"{kaldi.NO_AUDIO} (25): x00, x01" in message
    assert "x09, ... and 15 more" in message and "x10" not in message
    assert f"{kaldi.NO_TEXT} (5)" in message
    assert len(listing(problems.found).splitlines()) == 30


def test_nothing_left(data_dir):
    data_dir.table("text", "".join(f"u{i}\n" for i in range(5)))
    data, problems = read(data_dir)
    with pytest.raises(UserError, match="Nothing would be left"):
        kaldi.without_problems(data, problems)


def test_restrict_and_write(empty_dir, tmp_path):
    empty_dir.table("wav.scp", "r1 a b.wav\nr0 cat x |\n")
    empty_dir.table("segments", "a r0 0 1.25\nb r1 0.1 -1\nc r1 1 1.0625001\n")
    empty_dir.table("text", "a x  y\nb \u00e9\nc z\n")
    empty_dir.table("utt2spk", "a s1\nb s2\nc s2\n")
    empty_dir.table("utt2lang", "a en\nb de\nc en\n")
    empty_dir.table("spk2gender", "s1 f\ns2 m\n")
    data, problems = read(empty_dir)
    assert problems.found == []
    target = tmp_path / "out"
    kaldi.write_data_dir(data, target)
    again = kaldi.read_data_dir(target, problems)
    assert (again.wav, again.text, again.extra) == (data.wav, data.text, data.extra)
    assert (target / "segments").read_text() == "a r0 0 1.25\nb r1 0.1 -1\nc r1 1 1.0625\n"

    kaldi.write_data_dir(data.restrict({"b", "c"}), target)
    assert (target / "wav.scp").read_text() == "r1 a b.wav\n"
    assert (target / "spk2utt").read_text() == "s2 b c\n"
    assert (target / "utt2lang").read_text() == "b de\nc en\n"
    assert (target / "spk2gender").read_text() == "s2 m\n"
    assert (target / "text").read_text() == "b \u00e9\nc z\n"
