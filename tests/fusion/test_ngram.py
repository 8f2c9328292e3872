"""n-gram LM by kenlm: an ARPA file written by hand."""

import math

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.external_lm import ExternalLM
from espnet_llm_plugin.fusion.ngram import NgramLM

pytest.importorskip("kenlm", reason="kenlm is optional")
from tests.contracts.scorer_contract import ScorerContract

TOKENS = ["<blank>", "<unk>", *"abcdefgh", "<sos/eos>"]
UNIGRAMS = {"<unk>": -3.0, "<s>": -99, "</s>": -1.2}
UNIGRAMS.update({token: -0.6 - 0.15 * n for n, token in enumerate("abcdefgh")})
BIGRAMS = {("<s>", "c"): -0.3, ("a", "b"): -0.2, ("b", "a"): -0.9, ("c", "</s>"): -0.4}
BACKOFF = {"<s>": -0.25, "a": -0.5, "b": -0.1, "c": -0.3}


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "bigram.arpa"
    lines = ["\\data\\", f"ngram 1={len(UNIGRAMS)}", f"ngram 2={len(BIGRAMS)}", "", "\\1-grams:"]
    lines += [f"{p}\t{w}\t{BACKOFF.get(w, 0.0)}" for w, p in UNIGRAMS.items()]
    lines += ["", "\\2-grams:"] + [f"{p}\t{a} {b}" for (a, b), p in BIGRAMS.items()]
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    return path


def by_hand(before, word):
    if (before, word) in BIGRAMS:
        return BIGRAMS[before, word] * math.log(10)
    return (BACKOFF.get(before, 0.0) + UNIGRAMS[word]) * math.log(10)


def name(token):
    return "</s>" if token == "<sos/eos>" else token


@pytest.fixture
def lm(arpa):
    return NgramLM(arpa, TOKENS)


def test_every_probability(lm):
    for prefix in ([], [2], [2, 3], [4, 2, 9]):
        row, _ = lm.score(torch.tensor([10, *prefix]), None, None)
        before = TOKENS[prefix[-1]] if prefix else "<s>"
        for token in range(1, 11):
            assert float(row[token]) == pytest.approx(
                by_hand(before, name(TOKENS[token])), abs=1e-5
            )
        assert float(row[0]) == -1e9


class TestAsScorer(ScorerContract):
    vocab_size = len(TOKENS)
    sentences = ([2, 3, 4, 2, 9, 3], [2, 3, 8])

    @pytest.fixture(autouse=True)
    def _file(self, arpa):
        self.arpa = arpa

    def make_scorer(self):
        return NgramLM(self.arpa, TOKENS)

    def full_log_probs(self, scorer, tokens):
        rows = torch.full((len(tokens) + 1, len(TOKENS)), -1e9)
        for n, before in enumerate(["<s>", *(TOKENS[token] for token in tokens)]):
            for token in range(1, len(TOKENS)):
                rows[n, token] = by_hand(before, name(TOKENS[token]))
        return rows

    def test_scores_are_log_probs_that_depend_on_the_prefix(self):
        """The file is written by hand, and does not sum to one."""
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert (rows[1:4] - rows[:3]).abs().amax(-1).min() > 1e-3


def test_in_our_searches_prefixes_of_several_lengths_are_one_batch(lm):
    external = ExternalLM(lm, len(TOKENS), len(TOKENS) - 2)
    _, start = external.start()
    rows, states = external.extend([1, 2], [start, start])
    rows, _ = external.extend([1, 4], [states[0], start])
    assert external.num_calls == 3
    for row, before in zip(rows, ("a", "d")):
        expected = torch.tensor([by_hand(before, w) if w != "<unk>" else 0 for w in TOKENS[1:-1]])
        torch.testing.assert_close(row[1:], expected[1:].float(), atol=1e-5, rtol=1e-5)


def test_rows_are_kept_up_to_a_number(lm, monkeypatch):
    monkeypatch.setattr("espnet_llm_plugin.fusion.ngram._ROWS", 2)
    for token in (2, 3, 4, 5, 3):
        lm.score(torch.tensor([10, token]), None, None)
        assert len(lm._rows) <= 2


def test_what_is_refused(arpa, tmp_path, caplog):
    with pytest.raises(UserError, match="does not exist"):
        NgramLM(tmp_path / "absent", TOKENS)
    (tmp_path / "bad").write_text("no n-gram\n")
    with pytest.raises(UserError, match="kenlm cannot read"):
        NgramLM(tmp_path / "bad", TOKENS)
    words = ["<blank>", "<unk>", "the", "cat", "a", "<sos/eos>"]
    with pytest.raises(UserError, match="another vocabulary: it lacks 2 of the 3.*'the', 'cat'"):
        NgramLM(arpa, words)
    NgramLM(arpa, [*TOKENS[:-1], "x", TOKENS[-1]])
    assert "lacks 1 of 9 tokens" in caplog.text
