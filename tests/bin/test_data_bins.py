"""Command lines for data: stages 2 to 5 one after the other, messages and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from espnet_llm_plugin.bin import (
    filter_data_dir,
    format_wav_scp,
    make_token_list,
    merge_data,
    perturb_audio,
    perturb_speed,
    prepare_lm_text,
    split_data,
    subset_data_dir,
    validate_data_dir,
)
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import Builder, table, tone

BINS = [
    filter_data_dir,
    format_wav_scp,
    make_token_list,
    merge_data,
    perturb_audio,
    perturb_speed,
    prepare_lm_text,
    split_data,
    subset_data_dir,
    validate_data_dir,
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Twelve utterances, u10 and u11 of the set dev; the working directory is a recipe's."""
    monkeypatch.chdir(tmp_path)
    builder = Builder(tmp_path / "corpus")
    for i in range(12):
        builder.audio(f"u{i:02d}.wav", tone(0.2 + 0.05 * i))
        builder.append("wav.scp", f"u{i:02d} audio/u{i:02d}.wav")
        builder.append("text", f"u{i:02d} WORD {'ABCDEFGHIJKL'[i]}")
        builder.append("utt2spk", f"u{i:02d} s{i % 3}")
        builder.append("utt2set", f"u{i:02d} {'train' if i < 10 else 'dev'}")
    return builder


def test_stages_1_to_5(source, capsys, root):
    from espnet2.fileio.sound_scp import SoundScpReader

    validate_data_dir.main(["corpus", "--output_dir", "data/all", "--check_audio", "full"])
    assert "corpus: 12 utterances, 3 speakers\n" in capsys.readouterr().out
    subset_data_dir.main(["data/all", "data/train", "--where", "utt2set=train"])
    (source.path / "list").write_text("u10\nu11 ignored\n")
    subset_data_dir.main(["data/all", "data/dev", "--utt_list", "corpus/list"])
    assert "data/dev: 2 utterances" in capsys.readouterr().out

    perturb_speed.main(["data/train", "data/train_sp", "--factors", "0.9", "1.0", "1.1"])
    assert "data/train_sp: 30 utterances at speeds 0.9 1.0 1.1" in capsys.readouterr().out
    for name in ("train_sp", "dev"):
        format_wav_scp.main([f"data/{name}", f"dump/raw/org/{name}", "--fs", "16k", "--nj", "2"])
    printed = capsys.readouterr().out
    assert "dump/raw/org/dev: 2 utterances, 0.00 hours (0 finished before)\n" in printed
    format_wav_scp.main(["data/dev", "dump/raw/org/dev", "--fs", "16k", "--nj", "1"])
    assert "(2 finished before)" in capsys.readouterr().out
    filter_data_dir.main(
        ["dump/raw/org/train_sp", "dump/raw/train_sp", "--fs", "16k"]
        + ["--min_wav_duration", "0.24", "--max_wav_duration", "0.7"]
    )
    removed = len(Path("dump/raw/train_sp/removed_utts").read_text().splitlines())
    assert removed > 1
    assert f"{30 - removed} utterances kept; removed: " in capsys.readouterr().out

    # What stages 10 to 12 read, read as ESPnet reads it, from the recipe's directory.
    reader = SoundScpReader("dump/raw/train_sp/wav.scp")
    lengths = table(source.path.parent / "dump/raw/train_sp/utt2num_samples")
    for key in reader:
        rate, samples = reader[key]
        assert rate == 16000 and samples.ndim == 1 and len(samples) == int(lengths[key])

    text = "dump/raw/train_sp/text"
    for options, directory in (
        (["--token_type", "char"], "char"),
        (["--token_type", "bpe", "--nbpe", "16"], "bpe_unigram16"),
        (["--token_type", "bpe", "--nbpe", "17", "--bpemode", "bpe"], "bpe_bpe17"),
        (["--token_type", "bpe", "--nbpe", "17", "--bpe_nlsyms", "<x>"], "bpe_x"),
    ):
        target = f"data/token_list/{directory}"
        make_token_list.main(["--text", text, "--output_dir", target, *options])
        tokens = Path(target, "tokens.txt").read_text().splitlines()
        assert tokens[:2] + tokens[-1:] == ["<blank>", "<unk>", "<sos/eos>"]
        assert f"{target}/tokens.txt: {len(tokens)} tokens" in capsys.readouterr().out
        assert ("<x>" in tokens) == ("<x>" in options)

    prepare_lm_text.main(
        ["--text", text, "--output", "dump/raw/lm_train.txt", "--eval_text", "data/dev/text"]
    )
    assert "0 equal to a sentence of the evaluation sets kept" in capsys.readouterr().out

    split_data.main(["dump/raw/org/dev/wav.scp", "--nj", "8", "--output_dir", "log"])
    assert capsys.readouterr().out == "2\n"
    for job in (1, 2):
        source_keys = table(source.path.parent / f"log/keys.{job}.scp")
        builder = source.path.parent / f"log/output.{job}/1best_recog"
        builder.mkdir(parents=True)
        (builder / "text").write_text("".join(f"{key} hello\n" for key in source_keys))
    merge_data.main(
        ["log/output.1", "log/output.2", "--output_dir", "decode"]
        + ["--key_file", "dump/raw/org/dev/wav.scp"]
    )
    assert capsys.readouterr().out == "decode/1best_recog/text: 2 lines\n"


def test_drop_bad(source, capsys):
    (source.path / "audio/u03.wav").unlink()
    with pytest.raises(UserError, match=r"audio file not found \(1\): u03"):
        validate_data_dir.main(["corpus", "--output_dir", "data/all"])
    validate_data_dir.main(["corpus", "--output_dir", "data/all", "--drop_bad", "true"])
    captured = capsys.readouterr()
    assert "11 utterances, 3 speakers; 1 ids with problems dropped" in captured.out
    assert "audio file not found (1): u03" in captured.err
    format_wav_scp.main(["corpus", "dump/all", "--drop_bad", "true", "--nj", "1"])
    assert "1 ids dropped, see dropped_utts" in capsys.readouterr().out


def test_options_for_sparse_directories(source, capsys):
    (source.path / "text").unlink()
    (source.path / "utt2spk").unlink()
    for main in (validate_data_dir.main, lambda a: format_wav_scp.main([*a, "dump/all"])):
        with pytest.raises(UserError, match="no file 'text'"):
            main(["corpus"])
        with pytest.raises(UserError, match="--utt_as_spk true"):
            main(["corpus", "--require_text", "false"])
        main(["corpus", "--require_text", "false", "--utt_as_spk", "true"])
    assert "12 utterances, 12 speakers" in capsys.readouterr().out


def test_audio_options(source):
    format_wav_scp.main(
        ["corpus", "dump/all", "--ref_channel", "0", "--fs", "none", "--audio_format", "wav"]
    )
    assert all(
        path.endswith(".wav") for path in table(source.path.parent / "dump/all/wav.scp").values()
    )
    with pytest.raises(UserError, match="--ref_channel is 1"):
        format_wav_scp.main(["corpus", "dump/all", "--ref_channel", "1"])


@pytest.mark.parametrize("nj", ["0", "-1", "x"])
def test_number_of_jobs(source, nj):
    with pytest.raises(SystemExit) as done:
        format_wav_scp.main(["corpus", "dump/all", "--nj", nj])
    assert done.value.code == 2


def test_perturb_audio_between_pipes(source, root):
    command = [sys.executable, "-m", "espnet_llm_plugin.bin.perturb_audio", "1.25"]
    file = source.path / "audio/u04.wav"
    by_name = subprocess.run([*command, str(file)], capture_output=True, check=True, cwd=root)
    with file.open("rb") as stream:
        by_pipe = subprocess.run([*command, "-"], stdin=stream, capture_output=True, cwd=root)
    assert by_name.stdout == by_pipe.stdout
    (source.path / "out.wav").write_bytes(by_name.stdout)
    assert soundfile.info(source.path / "out.wav").frames == 3200 / 1.25


def test_message_and_exit_code(source, root):
    (source.path / "audio/u03.wav").write_bytes(b"")
    command = [sys.executable, "-m", "espnet_llm_plugin.bin.format_wav_scp"]
    target = source.path.parent / "out"
    done = subprocess.run(
        [*command, str(source.path), str(target), "--nj", "2"],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {source.path}: 1 problem(s)\n")
    assert "empty audio file (1): u03" in done.stderr and "Traceback" not in done.stderr
    assert not (target / "wav.scp").exists()


@pytest.mark.parametrize("module", BINS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_help_and_unknown_options(module, capsys):
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0
    first_words = module.__doc__.split("\n")[0].split()[:4]
    assert " ".join(first_words) in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as done:
        module.main(["--no_such_option", "1"])
    assert done.value.code == 2
