"""N-gram overlap, against a search through the text for every n-gram."""

import json
import random

import pytest

from espnet_llm_plugin.bin import check_contamination as command
from espnet_llm_plugin.data.contamination import check_contamination, ngrams_of
from espnet_llm_plugin.errors import UserError


def occurs(ngram, lines):
    wanted = " ".join(ngram)
    return any(f" {wanted} " in f" {' '.join(line).casefold()} " for line in lines)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_ngram(size):
    rng = random.Random(size)

    def sentence(length):
        return [rng.choice(["a", "B", "c", "d", "E"]) for _ in range(length)]

    lines = [sentence(rng.randrange(8)) for _ in range(6)]
    sets = {
        name: {f"{name}{n}": " ".join(sentence(rng.randrange(7))) for n in range(9)}
        for name in ("x", "y")
    }
    for found, (name, transcripts) in zip(check_contamination(lines, sets, size), sets.items()):
        shares = {}
        for utt, text in transcripts.items():
            ngrams = ngrams_of(text.split(), size)
            if ngrams:
                shares[utt] = (sum(occurs(ngram, lines) for ngram in ngrams), len(ngrams))
        assert found.name == name and found.utterances == len(shares)
        assert found.seen == sum(seen for seen, _ in shares.values())
        assert found.ngrams == sum(total for _, total in shares.values())
        assert found.touched == sum(seen > 0 for seen, _ in shares.values())
        assert found.contained == sum(seen == total for seen, total in shares.values())
        assert {one.utt: (one.seen, one.ngrams) for one in found.worst} == {
            utt: pair for utt, pair in shares.items() if pair[0]
        }
        order = [one.share for one in found.worst]
        assert order == sorted(order, reverse=True)


def test_short_sentences_count_as_a_whole():
    assert ngrams_of(["One", "two"], 4) == [("one", "two")]
    (found,) = check_contamination([["he", "said", "ONE", "TWO"]], {"t": {"u": "One two"}}, 4)
    assert found.contained == 1
    (found,) = check_contamination([["one"], ["two"]], {"t": {"u": "one two"}}, 4)
    assert found.touched == 0


def test_command(tmp_path, capsys):
    for name, text in (("test", "u1 a b c d\nu2 x y z\nu3\n"), ("dev", "v1 q r s\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(text)
    (tmp_path / "lm").write_text("id1 say a b c now\n")
    (tmp_path / "plain").write_text("X Y Z\n")
    options = ["--text", tmp_path / "lm", "--plain_text", tmp_path / "plain", "--ngram", "3"]
    options += ["--eval_text", *(tmp_path / name / "text" for name in ("test", "dev"))]
    command.main([*map(str, options), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["test", "2", "100.00", "50.00", "3", "66.67"] in rows
    assert ["dev", "1", "0.00", "0.00", "1", "0.00"] in rows
    worst = (tmp_path / "out" / "worst.txt").read_text().splitlines()
    assert worst == ["test 1.00 1/1 u2 x y z", "test 0.50 1/2 u1 a b c d"]
    content = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert content["ngram"] == 3 and content["sets"][0]["seen"] == 2


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="--ngram 0"):
        check_contamination([], {"t": {"u": "a"}}, 0)
    with pytest.raises(UserError, match="transcripts of t have no words"):
        check_contamination([], {"t": {"u": ""}})
    with pytest.raises(UserError, match="--text or --plain_text"):
        command.main(["--eval_text", "x", "--output_dir", str(tmp_path)])
