"""Sets of sampled utterances in files: complete, the same again, continued after a kill."""

import json
import random

import pytest

from espnet_llm_plugin.bin.sample_text import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import sampling
from tests.llm.tiny import save_llm_dir

SIZES = ["--num_test", "4", "--num_dev", "3", "--num_train", "20", "--num_lm", "30"]
OPTIONS = [*SIZES, "--min_words", "3", "--max_words", "8", "--min_word_count", "1"]
OPTIONS += ["--ngram", "3", "--batch_size", "10"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm_dir(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def writer(monkeypatch):
    """Plain stories in place of the tiny LLM's; the numbers of the batches that were asked for."""
    asked = []

    def batches(model, tokenizer, *, seed, first, batch_size, temperature, max_tokens):
        number = first
        while True:
            asked.append(number)
            rng = random.Random(f"{seed} {number}")
            yield [
                sampling.Sample(
                    " ".join(
                        " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) + "."
                        for _ in range(3)
                    ),
                    True,
                )
                for _ in range(batch_size)
            ]
            number += 1

    monkeypatch.setattr(sampling, "sample_batches", batches)
    return asked


def run(directory, llm, *options):
    main(["--output_dir", str(directory), "--llm", str(llm), *OPTIONS, *options])


def texts(directory):
    return {
        name: (directory / name / "text").read_text() for name in ("test", "dev", "train", "lm")
    }


def test_sets_in_files(tmp_path, llm, writer, capsys):
    run(tmp_path, llm)
    found = texts(tmp_path)
    lines = {name: text.splitlines() for name, text in found.items()}
    assert {name: len(one) for name, one in lines.items()} == dict(test=4, dev=3, train=20, lm=30)
    assert lines["test"][0].startswith("test_000000 ")
    assert "lm/text: 30 utterances, 150 words" in capsys.readouterr().out
    run(tmp_path, llm)
    assert "already complete" in capsys.readouterr().out
    assert texts(tmp_path) == found


def test_a_killed_run_continues(tmp_path, llm, writer):
    run(tmp_path / "whole", llm)
    run(tmp_path / "killed", llm)
    batches = sorted((tmp_path / "killed" / "stories").iterdir())
    assert len(batches) > 1
    batches[-1].unlink()
    (tmp_path / "killed" / "sampled.json").unlink()
    writer.clear()
    run(tmp_path / "killed", llm)
    assert writer == [len(batches) - 1]
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole")


def test_stories_of_another_seed_are_not_used_again(tmp_path, llm, writer):
    run(tmp_path, llm)
    before, first = texts(tmp_path), list(writer)
    writer.clear()
    run(tmp_path, llm, "--seed", "1")
    assert writer[0] == 0 and texts(tmp_path) != before
    writer.clear()
    run(tmp_path, llm, "--seed", "1", "--ngram", "4")  # the same stories, cut otherwise
    assert writer == [] and first
    assert json.loads((tmp_path / "sampled.json").read_text())["options"]["ngram"] == 4


def test_an_llm_that_writes_nothing_plain(tmp_path, llm, writer):
    with pytest.raises(UserError, match="does this LLM write plain English"):
        run(tmp_path, llm, "--min_words", "20", "--max_words", "20", "--max_batches", "3")
    assert writer == [0, 1, 2]


def test_without_llm_the_grammar_speaks(tmp_path):
    main(["--output_dir", str(tmp_path), *SIZES])
    assert len(texts(tmp_path)["lm"].splitlines()) == 30


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--num_dev", "0"], "--num_dev 0: at least 1"),
        (["--seed", "-1"], "must not be negative"),
        (["--llm", "/nowhere/llm"], "/nowhere/llm does not exist"),
        (["--min_words", "9"], "expected 1 <= min_words"),
    ],
)
def test_bad_options(tmp_path, llm, option, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", llm, *option)
    assert not (tmp_path / "out").exists()


def test_stories260k(tmp_path, shared_data):
    """A real pretrained LLM writes plain English from the first batch on."""
    llm = shared_data / "llm" / "stories260K"
    options = ["--num_train", "60", "--num_lm", "60", "--batch_size", "48", "--max_tokens", "120"]
    main(["--output_dir", str(tmp_path), "--llm", str(llm), *SIZES, *options])
    words = " ".join(texts(tmp_path).values()).split()
    assert words.count("the") > 20 and words.count("and") > 20
