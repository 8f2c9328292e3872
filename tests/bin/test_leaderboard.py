"""The leaderboard's command line on generated data in the layouts of its test sets."""

import json
import re
import shutil

import pytest

from espnet_llm_plugin.bin import leaderboard, score
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference import decode as decode_module
from espnet_llm_plugin.scoring.leaderboard import SPLITS
from tests.data.conftest import table
from tests.inference.tiny_asr import make_asr, make_audio

for package in ("pyarrow", "kaldialign", "whisper_normalizer"):
    pytest.importorskip(package, reason=f"{package} (extra `leaderboard`) is not installed")
from tests.data.parquet_sets import cell, encoded, write_parquet  # noqa: E402

PRESENT = ["ami", "earnings22", "librispeech_clean", "librispeech_other", "tedlium", "voxpopuli"]


def parquet_rows(texts, seconds=0.5, rate=16000, column="text"):
    return [
        {
            "audio": cell(encoded(seconds, rate), f"{key}.wav"),
            "dataset": "x",
            column: text,
            "id": key,
            "audio_length_s": seconds,
        }
        for key, text in texts
    ]


@pytest.fixture(scope="module")
def test_sets(tmp_path_factory):
    """Six of the eight sets: five as on the Hub, one as a Kaldi directory."""
    root = tmp_path_factory.mktemp("esb")
    first = [("ami 1", "a b"), ("ami2", "<unk>"), ("ami2", "The Colour c"), ("ami4", "")]
    write_parquet(root / "ami/test-00000-of-00002.parquet", parquet_rows(first))
    write_parquet(root / "ami/test-00001-of-00002.parquet", parquet_rows([("ami2", "d")]))
    ignored = [("e1", "ignore time segment in scoring"), ("e2", "twenty pounds")]
    # another rate, and another name of the transcript
    rows = parquet_rows(ignored, 0.5, 8000, "sentence")
    write_parquet(root / "earnings22/test-00000-of-00001.parquet", rows)
    for split in ("clean", "other"):
        rows = parquet_rows([(f"{split}-{n}", "a b c d") for n in range(2)])
        write_parquet(root / f"librispeech/test.{split}-00000-of-00001.parquet", rows)
    write_parquet(root / "data/tedlium/test/0000.parquet", parquet_rows([("t", "A, b.")]))
    scp = make_audio(root / "voxpopuli", {"v2": 0.6, "v1": 0.5, "v3": 0.7})
    if scp != root / "voxpopuli/wav.scp":
        shutil.move(scp, root / "voxpopuli/wav.scp")
    (root / "voxpopuli/text").write_text("v1 a b\nv2\nv3 c\n")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {kind: make_asr(directory / kind, kind) for kind in ("ctc", "attention")}


@pytest.fixture
def run(test_sets, tmp_path):
    def call(*options, sets=True):
        where = ["--test_sets", str(test_sets)] if sets else []
        leaderboard.main([*where, "--output_dir", str(tmp_path / "out"), *map(str, options)])
        return json.loads((tmp_path / "out/leaderboard.json").read_text())

    return call


def write_hypotheses(directory, name, texts, rtf=None):
    (directory / name).mkdir(parents=True)
    (directory / name / "text").write_text("".join(f"{k} {v}\n" for k, v in texts.items()))
    if rtf:
        (directory / name / "logdir/output.1").mkdir(parents=True)
        names = ("audio_seconds", "encoder_seconds", "search_seconds")
        path = directory / name / "logdir/output.1/rtf.json"
        path.write_text(json.dumps(dict(zip(names, rtf))))


def test_existing_hypotheses(run, tmp_path, test_sets, capsys):
    hyp = tmp_path / "hyp"
    ami = {"ami_1": "A b!", "ami2-2": "the color c", "ami2-3": "x"}
    write_hypotheses(hyp, "ami", ami, (2.0, 0.1, 0.3))
    write_hypotheses(hyp, "earnings22", {"e2": "£20"})
    write_hypotheses(hyp, "librispeech_clean", {"clean-0": "a b c", "clean-1": "a b c d"})
    board = run("--hyp_dir", hyp)
    sets = board["sets"]
    assert list(sets) == ["ami", "earnings22", "librispeech_clean"]
    # of five utterances `<unk>` and the empty one are not scored; one of six words is wrong
    assert (sets["ami"]["utterances"], sets["ami"]["dropped"], sets["ami"]["words"]) == (3, 2, 6)
    assert (sets["ami"]["wer"], sets["ami"]["rtfx"]) == (16.67, pytest.approx(5.0))
    assert (sets["earnings22"]["wer"], sets["earnings22"]["dropped"]) == (0.0, 1)
    assert (sets["librispeech_clean"]["deletions"], sets["librispeech_clean"]["wer"]) == (1, 12.5)
    assert board["average_of_8_splits"]["wer"] == pytest.approx((16.67 + 0 + 12.5) / 3)
    # not on this disk, or without hypotheses
    assert board["skipped"] == [name for name in SPLITS if name not in sets]
    assert "mean of 3 of 8 splits" in capsys.readouterr().out
    assert (tmp_path / "out/leaderboard.png").is_file()
    assert not (tmp_path / "out/ami/data").exists()  # audio is not needed
    # as bin.score with the same normaliser
    ref = "".join(f"{k} {v}\n" for k, v in (("clean-0", "a b c d"), ("clean-1", "a b c d")))
    (tmp_path / "ref").write_text(ref)
    files = ["--ref", tmp_path / "ref", "--hyp", hyp / "librispeech_clean/text"]
    options = ["--output_dir", tmp_path / "scored", "--normalizer", "leaderboard"]
    score.main([str(option) for option in files + options])
    scored = json.loads((tmp_path / "scored/scores.json").read_text())
    assert scored["wer"]["rate"] == sets["librispeech_clean"]["wer"]


def test_directories_by_name(run, tmp_path, test_sets):
    write_hypotheses(tmp_path / "hyp", "my_test", {"v1": "a b", "v3": "d"})
    shutil.copytree(test_sets / "voxpopuli", tmp_path / "my_test")
    given = f"voxpopuli={tmp_path / 'my_test'}"
    board = run("--set", given, "--sets", "voxpopuli", "--hyp_dir", tmp_path / "hyp", sets=False)
    assert board["sets"]["voxpopuli"]["wer"] == 33.33 and board["skipped"] == []
    board = run("--set", given, "--hyp_dir", tmp_path / "hyp", "--normalizer", "none", sets=False)
    assert len(board["skipped"]) == 7 and board["normalizer"] == "none"


def test_decoding(run, tmp_path, models, monkeypatch):
    loaded = []
    build = decode_module.build_recognizer

    def counted(args):
        loaded.append(args)
        return build(args)

    monkeypatch.setattr(decode_module, "build_recognizer", counted)
    options = [*models["ctc"].asr_options(), "--beam_size", "2", "--num_workers", "0"]
    board = run(*options)
    assert list(board["sets"]) == PRESENT and board["skipped"] == ["gigaspeech", "spgispeech"]
    assert len(loaded) == 1  # the model, for all sets
    for name, result in board["sets"].items():
        assert result["missing"] == 0 and result["rtfx"] > 0, name
        text = tmp_path / "out" / name / "decode/1best_recog/text"
        assert len(text.read_text().splitlines()) == result["utterances"]
    # what is not scored is not decoded; 8 kHz became 16 kHz
    earnings = tmp_path / "out/earnings22/data"
    assert table(earnings / "utt2num_samples") == {"e2": "8000"}
    assert table(earnings / "text") == {"e2": "twenty pounds"}
    assert sorted(table(tmp_path / "out/ami/data/wav.scp")) == ["ami2-2", "ami2-3", "ami_1"]
    assert sorted(table(tmp_path / "out/voxpopuli/data/wav.scp")) == ["v1", "v3"]
    # a second run has nothing to do, one with another option has
    assert run(*options) == board and len(loaded) == 1
    other = run(*options, "--normalizer", "whisper_english")  # the same hypotheses
    assert len(loaded) == 1 and other["sets"]["ami"]["rtfx"] == board["sets"]["ami"]["rtfx"]
    again = run(*options, "--beam_size", "1", "--sets", "tedlium", "ami")
    assert list(again["sets"]) == ["ami", "tedlium"] and len(loaded) == 2


def test_an_interrupted_run_continues(run, models, monkeypatch, tmp_path):
    decoded = []
    decode = decode_module.decode

    def killed(args, recognizer):
        decoded.append(args.output_dir)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return decode(args, recognizer)

    monkeypatch.setattr(decode_module, "decode", killed)
    options = [*models["ctc"].asr_options(), "--beam_size", "1", "--num_workers", "0"]
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    board = run(*options)
    assert list(board["sets"]) == PRESENT
    assert len(decoded) == 2 + 1 + 4  # the two finished sets are not decoded again


def test_espnets_own_search(run, models, tmp_path):
    """A CTC + attention model: unmodified ESPnet decodes it."""
    options = [
        "--search",
        "espnet",
        "--beam_size",
        "1",
        "--ctc_weight",
        "0.3",
        "--maxlenratio",
        "-2",
    ]
    board = run(*models["attention"].asr_options(), *options, "--sets", "tedlium")
    result = board["sets"]["tedlium"]
    assert result["missing"] == 0 and result["rtfx"] > 0
    assert (tmp_path / "out/tedlium/decode/1best_recog/text").is_file()


def test_mistakes(run, test_sets, tmp_path, models):
    def fails(message, *options, **kwargs):
        with pytest.raises(UserError, match=message):
            run(*options, **kwargs)

    hyp = tmp_path / "hyp"
    hyp.mkdir()
    fails("give a model by --asr_train_config and --asr_model_file, or --hyp_dir")
    fails("has hypotheses of no test set; expected .*hyp/ami/text", "--hyp_dir", hyp)
    fails("--hyp_dir decodes nothing: --beam_size has no", "--hyp_dir", hyp, "--beam_size", "2")
    fails("nowhere is not a directory", "--hyp_dir", tmp_path / "nowhere")
    fails("there is no test set 'wsj'; expected some of ami, ", "--sets", "wsj")
    fails("--set ami: expected NAME=DIR", "--set", "ami")
    fails("hyp is no test set: expected a Kaldi", "--set", f"ami={hyp}", "--hyp_dir", hyp)
    fails("is not a directory", "--test_sets", tmp_path / "x", "--hyp_dir", hyp, sets=False)
    fails(
        "not one of the test sets gigaspeech, spgispeech is in .*: expected a copy of hf-audio",
        *("--sets", "spgispeech", "gigaspeech", "--hyp_dir", hyp),
    )
    fails("--key_file: what is decoded is said by", "--key_file", "x")
    fails("no such file", *["--asr_train_config", "x", "--asr_model_file", "y"])
    write_hypotheses(hyp, "ami", {"other": "a"})
    fails(r"of other utterances \(other\) than the references \(ami_1", "--hyp_dir", hyp)


def test_a_damaged_copy_is_refused(tmp_path, models):
    rows = parquet_rows([("a", "one"), ("b", "two")])
    rows[1]["audio"] = cell(b"not audio")
    write_parquet(tmp_path / "ami/test-0.parquet", rows)
    options = ["--test_sets", tmp_path, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=r"(?s)unreadable audio \(1\): b.*damaged: fetch it again"):
        leaderboard.main([str(o) for o in [*options, *models["ctc"].asr_options()]])
    write_parquet(tmp_path / "ami/test-0.parquet", [{"audio": cell(b"x"), "words": "a"}])
    with pytest.raises(UserError, match="has the columns audio, words; expected audio, id and one"):
        leaderboard.main([str(o) for o in [*options, *models["ctc"].asr_options()]])


def test_the_page_names_options_that_exist(root):
    from espnet_llm_plugin.bin import asr_inference

    named = set(re.findall(r"--[a-z][a-z_-]+", (root / "docs/leaderboard.md").read_text()))
    parsers = (leaderboard.get_parser(), asr_inference.get_parser(), score.get_parser())
    known = {option for parser in parsers for option in parser._option_string_actions}
    own = set(leaderboard.get_parser()._option_string_actions)
    assert named - {"--repo-type", "--local-dir"} <= known  # those of `hf download`
    assert {
        "--test_sets",
        "--set",
        "--hyp_dir",
        "--normalizer",
        "--leaderboard_repo",
    } <= named & own
