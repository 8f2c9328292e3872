"""Loquacious: layout, letters, what is left out, faults; the synthetic corpus in its layout."""

import pytest

from espnet_llm_plugin.bin import make_mini_corpus
from espnet_llm_plugin.bin import prepare_loquacious as command
from espnet_llm_plugin.data.corpora.loquacious import prepare_loquacious, sets_of
from espnet_llm_plugin.data.format import format_data_dir
from espnet_llm_plugin.data.validate import validate_data_dir
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table

pytest.importorskip("pyarrow", reason="pyarrow (extra `recipes`) is not installed")
from tests.data.parquet_sets import cell, encoded, write_parquet


def row(key, text, audio=None, speaker="12", sex="female"):
    wav = cell(encoded(0.2) if audio is None else audio)
    head = {"ID": key, "duration": 0.2, "wav": wav}
    return {**head, "spk_id": speaker, "sex": sex, "text": text}


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "LoquaciousSet"
    train = [row("t1", "IT'S ÆSOP"), row("t2", "TWO", speaker=None, sex=None), row("t3", "")]
    write_parquet(root / "small/train-00000-of-00002.parquet", train, "wav")
    more = [
        row("t4", "FOUR", b"xx"),
        row("t1", "TWICE"),
        row("t5", "FIVE", speaker="7", sex="male"),
    ]
    write_parquet(root / "small/train-00001-of-00002.parquet", more, "wav")
    for split in ("dev", "test"):
        rows = [row(f"{split}1", f"A {split.upper()}")]
        write_parquet(root / f"small/{split}-00000-of-00001.parquet", rows, "wav")
    return root


def test_tables(corpus, tmp_path):
    written = prepare_loquacious(corpus, tmp_path / "data", "small", nj=2)
    assert list(written) == ["train_small", "dev", "test"]
    train = tmp_path / "data/train_small"
    assert table(train / "text") == {"t1": "it's æsop", "t2": "two", "t5": "five"}
    assert table(train / "utt2spk") == {"t1": "12", "t2": "t2", "t5": "7"}
    assert table(train / "spk2gender") == {"12": "f", "7": "m"}
    assert table(tmp_path / "data/dev/text") == {"dev1": "a dev"}
    skipped = {"empty transcript": ["t3"], "unreadable audio": ["t4"], "duplicate id": ["t1"]}
    assert written["train_small"][1] == skipped and not written["dev"][1]
    listed = (train / "skipped_utts").read_text().splitlines()
    assert sorted(listed) == ["t1 duplicate id", "t3 empty transcript", "t4 unreadable audio"]
    for name in written:
        _, problems = validate_data_dir(tmp_path / "data" / name, check_audio="full")
        assert not problems.found
    summary = format_data_dir(train, tmp_path / "dump", fs=16000)
    assert (summary.utterances, round(summary.seconds, 3)) == (3, 0.6)


def test_capitals_are_kept_on_request(corpus, tmp_path):
    prepare_loquacious(corpus, tmp_path / "data", "small", lower_case=False)
    assert table(tmp_path / "data/test/text") == {"test1": "A TEST"}


def test_command_line(corpus, tmp_path, capsys):
    (tmp_path / "lm.txt").write_text("ONE\n\nTWO\n")
    options = ["--loquacious", str(corpus), "--output_dir", str(tmp_path / "data"), "--nj", "1"]
    command.main([*options, "--lm_text", str(tmp_path / "lm.txt")])
    out = capsys.readouterr().out
    assert "train_small: 3 utterances, 0.00 hours; 3 skipped: 1 " in out
    assert "dev: 1 utterances, 0.00 hours; none skipped" in out
    assert sorted(table(tmp_path / "data/lm_train/text").values()) == ["one", "two"]


def test_without_a_copy_it_is_downloaded(corpus, tmp_path, monkeypatch):
    def download(target, config):
        assert (target, config) == (tmp_path / "down/LoquaciousSet", "small")
        return corpus

    monkeypatch.setattr(command, "download_loquacious", download)
    command.main(["--output_dir", str(tmp_path / "data"), "--download_dir", str(tmp_path / "down")])
    assert table(tmp_path / "data/dev/text")


def test_mistakes(corpus, tmp_path):
    def fails(message, root=corpus, config="small"):
        with pytest.raises(UserError, match=message):
            prepare_loquacious(root, tmp_path / "data", config)

    fails("nowhere is not a directory; expected a copy of speechbrain", tmp_path / "nowhere")
    fails("has no configuration 'tiny'; expected one of small, medium, large, clean", config="tiny")
    fails("no Parquet files of configuration 'large', split train, dev, test", config="large")
    (corpus / "small/dev-00000-of-00001.parquet").unlink()
    fails("configuration 'small', split dev; expected .*small/dev-00000-of-00001.parquet")
    rows = [{"id": "x", "wav": cell(encoded()), "text": "A"}]
    write_parquet(corpus / "small/dev-00000-of-00001.parquet", rows, "wav")
    fails("has no column ID, spk_id, sex; it has id, wav, text")
    write_parquet(corpus / "small/dev-00000-of-00001.parquet", [row("x", "")], "wav")
    fails("not one utterance of dev can be used: .*empty transcript")
    assert list(sets_of("clean")) == ["train_clean", "dev", "test"]


# ---- the synthetic corpus -----------------------------------------------------------------------


def test_synthetic_corpus_is_prepared_as_the_true_one(tmp_path, capsys):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra `demo`)")
    root = tmp_path / "mini"
    sizes = ["--train", "9", "--dev", "2", "--test", "3", "--lm", "12", "--nj", "2"]
    make_mini_corpus.main(["loquacious", str(root), *sizes])
    assert sorted(path.name for path in root.iterdir()) == [
        *("README.md", "lm-text.txt.gz", "small", "synthetic.json")
    ]
    written = prepare_loquacious(root, tmp_path / "data", "small")
    assert {name: len(data.wav) for name, (data, _) in written.items()} == {
        "train_small": 9,
        "dev": 2,
        "test": 3,
    }
    assert not any(skipped for _, skipped in written.values())
    train = written["train_small"][0]
    nameless = [key for key, speaker in train.utt2spk.items() if key == speaker]
    assert nameless == ["mini_train_00006"] and len(train.extra["spk2gender"]) == 8
    assert all(text == text.lower() for text in train.text.values())
    make_mini_corpus.main(["loquacious", str(root), *sizes])
    assert "already complete" in capsys.readouterr().out
