"""Filtering by length and text: ESPnet's comparison, counts, a list of what went."""

import numpy as np
import pytest

from espnet_llm_plugin.data.filter import filter_data_dir
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.errors import UserError

from .conftest import table


@pytest.fixture
def formatted(data_dir, tmp_path):
    """Utterances of 800, 801, 4000, 7999, 8000 samples; u2 without text."""
    for i, count in enumerate((800, 801, 4000, 7999, 8000)):
        data_dir.audio(f"u{i}.wav", np.zeros(count))
    data_dir.replace("text", "u2 word2 and more", "u2")
    format_data_dir(data_dir.path, tmp_path / "org")
    return tmp_path / "org"


def espnet_keeps(source, fs, shortest, longest):
    """asr.sh stage 4: ``$2 > int(min * fs) && $2 < int(max * fs)``, and text with words."""
    text = table(source / "text")
    return {
        key
        for key, count in table(source / "utt2num_samples").items()
        if int(shortest * fs) < int(count) < int(longest * fs) and text[key]
    }


def test_filter(formatted, tmp_path):
    target = tmp_path / "out"
    counts = filter_data_dir(formatted, target, fs=8000, min_duration=0.1, max_duration=1.0)
    assert (counts.kept, counts.too_short, counts.too_long, counts.empty) == (2, 1, 1, 1)
    assert espnet_keeps(formatted, 8000, 0.1, 1.0) == {"u1", "u3"}
    for name in ("wav.scp", "text", "utt2spk", "utt2num_samples"):
        assert set(table(target / name)) == {"u1", "u3"}
        assert table(target / name).items() <= table(formatted / name).items()
    assert (target / "spk2utt").read_text() == "s1 u1 u3\n"
    assert (target / "feats_type").read_text() == "raw\n"
    assert (target / "removed_utts").read_text() == (
        "u0 too short: 0.100 s\nu2 empty transcript\nu4 too long: 1.000 s\n"
    )


def test_filter_again_with_other_limits(formatted, tmp_path):
    target = tmp_path / "out"
    filter_data_dir(formatted, target, fs=8000, min_duration=0.1, max_duration=1.0)
    filter_data_dir(formatted, target, fs=8000, min_duration=0, max_duration=2)
    assert set(table(target / "wav.scp")) == {"u0", "u1", "u3", "u4"}


def test_nothing_left(formatted, tmp_path):
    with pytest.raises(UserError, match="nothing would be left.*5 utterance.* of 30 s or less"):
        filter_data_dir(formatted, tmp_path / "out", fs=8000, min_duration=30, max_duration=40)
    assert not (tmp_path / "out").exists()


def test_wrong_input(formatted, tmp_path):
    with pytest.raises(UserError, match="0 <= min < max"):
        filter_data_dir(formatted, tmp_path / "out", fs=8000, min_duration=3, max_duration=2)
    with pytest.raises(UserError, match="same directory"):
        filter_data_dir(formatted, formatted, fs=8000)
    (formatted / "utt2num_samples").write_text("u0 800\n")
    with pytest.raises(UserError, match=r"no entry in utt2num_samples \(4\): u1"):
        filter_data_dir(formatted, tmp_path / "out", fs=8000)
