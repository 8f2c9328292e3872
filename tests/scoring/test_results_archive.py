"""An experiment that goes on elsewhere has the table of one that was never moved."""

import io
import json
import tarfile

import pytest

from espnet_llm_plugin.bin.results_archive import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.language_id import score_language_id
from espnet_llm_plugin.scoring.results import load_results
from espnet_llm_plugin.scoring.results_archive import collect, restore
from espnet_llm_plugin.scoring.results_page import results_markdown, summarize
from tests.scoring.test_results import score_set

CONFIG = """
baseline: weak
seeds: [1, 2]
unfinished: true
systems:
  - name: weak
    test: exp/s{seed}/weak/test
    scales: exp/s{seed}/scales.json
    rtf: exp/s{seed}/output.*/rtf.json
    time: ["exp/s{seed}/time.json", exp/lm/time.json]
  - name: strong
    test: exp/s{seed}/strong/test
    perplexity: exp/lm/perplexity.json
"""
LANGUAGES = {"a": "de", "b": "de", "c": "fr", "d": "en"}


def make(directory, seed, system, wrong):
    score_set(directory / f"exp/s{seed}/{system}/test", wrong)
    files = {
        f"s{seed}/scales.json": {"best": {"alpha": 0.1 * seed, "label_bonus": 1}},
        f"s{seed}/output.1/rtf.json": {"rtf": 0.1, "audio_seconds": 2},
        f"s{seed}/time.json": {"seconds": 60 * seed},
        "lm/time.json": {"seconds": 30},
        "lm/perplexity.json": {"word_perplexity": 12.5},
    }
    for name, content in files.items():
        path = directory / "exp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    if system == "strong":
        scores = score_language_id(LANGUAGES, {**LANGUAGES, **dict.fromkeys("abc"[:seed], "en")})
        language_id = directory / f"exp/s{seed}/{system}/test/language_id.json"
        language_id.write_text(json.dumps(scores.as_dict()))
    (directory / f"exp/s{seed}/{system}/model.pth").write_bytes(b"large")
    (directory / "results.yaml").write_text(CONFIG)


def page():
    results = load_results("results.yaml")
    return results_markdown(results, summarize(results, 200, 0)).split("## Environments")[0]


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """The page of an experiment that ran in one place."""
    directory = tmp_path / "whole"
    for seed in (1, 2):
        for system, wrong in (("weak", 20 + seed), ("strong", 10 + seed)):
            make(directory, seed, system, wrong)
    monkeypatch.chdir(directory)
    return page()


def test_two_places_give_the_table_of_one(tmp_path, monkeypatch, whole, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    make(here, 1, "weak", 21)
    make(here, 1, "strong", 11)
    monkeypatch.chdir(here)
    main(["--archive", "../archive.tar.xz", "--collect", "results.yaml"])
    make(there, 2, "weak", 22)
    make(there, 2, "strong", 12)
    monkeypatch.chdir(there)
    main(["--archive", "../archive.tar.xz", "--restore"])
    assert "../archive.tar.xz: 10 files restored" in capsys.readouterr().out
    assert page() == whole
    # one German utterance is wrong in the first run, both in the second
    assert "|strong|25.00|100.00|100.00|75.00|62.50|" in whole
    assert not list(there.glob("exp/s1/**/*.pth"))


def test_an_archive_without_predicted_languages(tmp_path, monkeypatch, whole):
    """As archives were before: no such table, and all others as they are."""
    for seed in (1, 2):
        for system, wrong in (("weak", 20 + seed), ("strong", 10 + seed)):
            make(tmp_path, seed, system, wrong)
    for path in tmp_path.rglob("language_id.json"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    collect("results.yaml", "a.tar.xz")
    there = tmp_path / "there"
    there.mkdir()
    (there / "results.yaml").write_text(CONFIG)
    monkeypatch.chdir(there)
    restore("../a.tar.xz")
    before, after = whole.split("test: language identification, correct utterances in %\n\n")
    assert page() == before + after.split("\n\n", 1)[1]


def test_tables_by_language(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    make(here, 1, "weak", 21)
    make(here, 1, "strong", 11)
    utterances = (here / "exp/s1/weak/test/text").read_text().splitlines()
    lines = (f"{line.split()[0]} {('hi', 'en')[n % 2]}\n" for n, line in enumerate(utterances))
    (here / "utt2lang").write_text("".join(lines))
    config = CONFIG + "utt2lang: {test: utt2lang}\n"
    for directory in (here, there):
        directory.mkdir(exist_ok=True)
        (directory / "results.yaml").write_text(config)
    monkeypatch.chdir(here)
    expected = page()
    assert "|en|hi|" in expected and "scripts" in expected
    collect("results.yaml", "../archive.tar.xz")
    monkeypatch.chdir(there)
    restore("../archive.tar.xz")
    assert page() == expected


def test_what_is_here_is_newer(tmp_path, monkeypatch):
    make(tmp_path, 1, "weak", 21)
    monkeypatch.chdir(tmp_path)
    collect("results.yaml", "a.tar.xz")
    (tmp_path / "exp/s1/time.json").write_text('{"seconds": 5}')
    assert restore("a.tar.xz") == 0
    assert json.loads((tmp_path / "exp/s1/time.json").read_text()) == {"seconds": 5}
    collect("results.yaml", "a.tar.xz")
    with tarfile.open("a.tar.xz") as archive:
        assert archive.extractfile("exp/s1/time.json").read() == b'{"seconds": 5}'


def test_same_files_same_archive(tmp_path, monkeypatch):
    make(tmp_path, 1, "weak", 21)
    monkeypatch.chdir(tmp_path)
    collect("results.yaml", "a.tar.xz")
    first = (tmp_path / "a.tar.xz").read_bytes()
    collect("results.yaml", "a.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == first


def test_only_the_finished(tmp_path, monkeypatch):
    make(tmp_path, 1, "weak", 21)
    make(tmp_path, 2, "weak", 21)
    (tmp_path / "exp/s2/weak/test/scores.json").unlink()
    monkeypatch.chdir(tmp_path)
    collect("results.yaml", "a.tar.xz")
    with tarfile.open("a.tar.xz") as archive:
        names = archive.getnames()
    assert "exp/s1/time.json" in names
    assert not [name for name in names if name.startswith("exp/s2")]


def test_outside_of_the_directory(tmp_path, monkeypatch):
    make(tmp_path, 1, "weak", 21)
    monkeypatch.chdir(tmp_path)
    config = CONFIG.replace("exp/lm/time.json", str(tmp_path / "exp/lm/time.json"))
    (tmp_path / "results.yaml").write_text(config)
    with pytest.raises(UserError, match="outside the working directory; only relative"):
        collect("results.yaml", "a.tar.xz")
    with tarfile.open("evil.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    with pytest.raises(UserError, match="evil.tar.xz: ../evil is outside"):
        restore("evil.tar.xz")


def test_no_archive(tmp_path):
    (tmp_path / "a.tar.xz").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read as a tar.xz file"):
        restore(tmp_path / "a.tar.xz")


def test_a_part_of_an_archive(tmp_path, monkeypatch):
    make(tmp_path, 1, "weak", 21)
    monkeypatch.chdir(tmp_path)
    collect("results.yaml", "a.tar.xz")
    content = (tmp_path / "a.tar.xz").read_bytes()
    (tmp_path / "a.tar.xz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as a tar.xz file"):
        collect("results.yaml", "a.tar.xz")
