"""Validation: errors by default, a clean copy on request, the source never changed."""

import numpy as np
import pytest

from espnet_llm_plugin.data import audio, validate
from espnet_llm_plugin.data.validate import validate_data_dir
from espnet_llm_plugin.errors import UserError

from .conftest import table, tone
from .test_format import AUDIO_FAULTS, content, spoil_audio

NEEDS_DECODING = {audio.NOT_FINITE, audio.PIPE_FAILED}


def test_copy_of_a_sound_directory(data_dir, tmp_path):
    before = content(data_dir.path)
    data, problems = validate_data_dir(data_dir.path, output_dir=tmp_path / "out")
    assert problems.found == [] and len(data.utterances) == 5
    copy = tmp_path / "out"
    assert table(copy / "text") == table(data_dir.path / "text")
    assert table(copy / "wav.scp")["u0"] == str(data_dir.path / "audio/u0.wav")  # resolved
    assert table(copy / "spk2utt") == {"s0": "u0 u2 u4", "s1": "u1 u3"}  # derived
    assert content(data_dir.path) == before
    # The copy is a data directory from wherever it is looked at.
    assert validate_data_dir(copy, check_audio="full")[1].found == []


@pytest.mark.parametrize("kind", [k for k in AUDIO_FAULTS if k != audio.CHANNELS])
def test_bad_audio(data_dir, tmp_path, kind):
    spoil_audio(kind)(data_dir)
    before = content(data_dir.path)
    with pytest.raises(UserError, match="--drop_bad true and --output_dir") as error:
        validate_data_dir(data_dir.path, check_audio="full")
    assert f"{kind} (1): u2 (" in str(error.value)
    if kind in NEEDS_DECODING:
        assert validate_data_dir(data_dir.path, check_audio="header")[1].found == []
    else:
        with pytest.raises(UserError):
            validate_data_dir(data_dir.path, check_audio="header")
    assert validate_data_dir(data_dir.path, check_audio="none")[1].found == []

    copy = tmp_path / "out"
    data, problems = validate_data_dir(
        data_dir.path, output_dir=copy, drop_bad=True, check_audio="full", nj=2
    )
    assert data.utterances == ["u0", "u1", "u3", "u4"] == sorted(table(copy / "wav.scp"))
    assert problems.keys == {"u2"}
    assert (copy / "dropped_utts").read_text().startswith(f"u2 {kind}")
    assert content(data_dir.path) == before


def test_several_channels_are_for_the_next_stage_to_choose_from(data_dir):
    data_dir.audio("u2.wav", np.zeros((800, 2)))
    assert validate_data_dir(data_dir.path, check_audio="full")[1].found == []


def test_all_faults_in_one_message(data_dir, tmp_path):
    data_dir.append("text", "u7 hello")
    data_dir.append("text", "u1 again")
    data_dir.replace("text", "u3 word3 and more", "u3")
    data_dir.replace("utt2spk", "u4 s0\n", "")
    (data_dir.path / "audio/u0.wav").unlink()
    with pytest.raises(UserError) as error:
        validate_data_dir(data_dir.path)
    for part in ("5 problem(s)", "u7", "u1 (", "empty transcript (1): u3", "u4", "u0 ("):
        assert part in str(error.value)
    data, problems = validate_data_dir(data_dir.path, output_dir=tmp_path / "out", drop_bad=True)
    assert data.utterances == ["u2"]
    assert len((tmp_path / "out/dropped_utts").read_text().splitlines()) == 5


def test_faults_are_counted_for_segments(empty_dir, tmp_path):
    empty_dir.audio("r.wav", tone(1.0))
    empty_dir.table("wav.scp", "r audio/r.wav\nm audio/none.wav\n")
    empty_dir.table("segments", "a r 0 0.5\nb r 0.8 1.6\nc m 0 1\nd m 1 2\ne x 0 1\n")
    empty_dir.table("text", "".join(f"{k} x\n" for k in "abcde"))
    empty_dir.table("utt2spk", "".join(f"{k} s\n" for k in "abcde"))
    data, problems = validate_data_dir(empty_dir.path, output_dir=tmp_path / "out", drop_bad=True)
    assert data.utterances == ["a"]
    assert {(p.kind, p.key) for p in problems.found} == {
        (audio.OUTSIDE, "b"),
        (audio.MISSING, "c"),
        (audio.MISSING, "d"),
        ("segment of a recording that is not in wav.scp", "e"),
    }
    assert (tmp_path / "out/segments").read_text() == "a r 0 0.5\n"


def test_wrong_arguments(data_dir):
    with pytest.raises(UserError, match="needs --output_dir"):
        validate_data_dir(data_dir.path, drop_bad=True)
    with pytest.raises(UserError, match="itself"):
        validate_data_dir(data_dir.path, output_dir=data_dir.path)
    with pytest.raises(UserError, match="not one of none, header, full"):
        validate_data_dir(data_dir.path, check_audio="some")


def test_interrupted_copy_has_no_wav_scp(data_dir, tmp_path, monkeypatch):
    copy = tmp_path / "out"
    validate_data_dir(data_dir.path, output_dir=copy)

    with monkeypatch.context() as patch:
        patch.setattr(validate, "write_data_dir", lambda d, p: _write_until("text", d, p))
        with pytest.raises(KeyboardInterrupt):
            validate_data_dir(data_dir.path, output_dir=copy)
    assert not (copy / "wav.scp").exists()
    validate_data_dir(data_dir.path, output_dir=copy)
    assert len(table(copy / "wav.scp")) == 5


def _write_until(name, data, path):
    """``write_data_dir``, killed when it is about to write the table ``name``."""
    from espnet_llm_plugin.data import kaldi

    def write_table(file, content, original=kaldi.write_table):
        if file.name == name:
            raise KeyboardInterrupt
        original(file, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kaldi, "write_table", write_table)
        kaldi.write_data_dir(data, path)


@pytest.mark.parametrize("name", ["fsdd", "librispeech", "speechocean762"])
def test_real_directories(shared_data, name):
    source = shared_data / "speech" / name
    data, problems = validate_data_dir(source, nj=2)
    assert problems.found == []
    assert len(data.utterances) == len(table(source / "utt2dur"))
