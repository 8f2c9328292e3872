"""The label bigram: against its formula written out, as a scorer, and in a transducer search."""

from collections import Counter

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.bigram import LabelBigram
from tests.contracts.scorer_contract import ScorerContract

VOCAB = 11
SENTENCES = [[2, 3, 2, 3, 4], [], [2, 3], [9, 4, 4, 8], [3, 2, 3], [5]]


def by_formula(before, label):
    pairs = Counter()
    for ids in SENTENCES:
        pairs.update(zip([VOCAB - 1, *ids], [*ids, VOCAB - 1]))
    once = sum(count == 1 for count in pairs.values())
    twice = sum(count == 2 for count in pairs.values())
    d = once / (once + 2 * twice)
    lower = sum(b == label for _, b in pairs) / len(pairs)
    lower = 0.99 * lower + 0.01 / (VOCAB - 1)
    total = sum(count for (a, _), count in pairs.items() if a == before)
    if not total:
        return lower
    kinds = sum(a == before for a, _ in pairs)
    return max(pairs[before, label] - d, 0) / total + d * kinds / total * lower


@pytest.fixture(scope="module")
def bigram():
    return LabelBigram.estimate(SENTENCES, VOCAB)


def test_every_probability(bigram):
    rows = bigram.rows(torch.arange(1, VOCAB))
    for before in range(1, VOCAB):
        for label in range(1, VOCAB):
            expected = by_formula(before, label)
            assert float(rows[before - 1, label].exp()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(rows[:, 1:].logsumexp(-1), torch.zeros(VOCAB - 1))
    assert (rows[:, 0] == -16).all()


class TestAsScorer(ScorerContract):
    vocab_size = VOCAB

    def make_scorer(self):
        return LabelBigram.estimate(SENTENCES, VOCAB)

    def test_blank_is_never_predicted(self):
        """It is subtracted: a very low score of the blank would make it likely."""
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert (rows[:, 0] == -16).all() and torch.isfinite(rows).all()


def test_file(bigram, tmp_path):
    tokens = [f"t{i}" for i in range(VOCAB)]
    bigram.save(tmp_path / "bigram.npz", tokens)
    again = LabelBigram.load(tmp_path / "bigram.npz", tokens)
    ids = torch.tensor([VOCAB - 1, 3, 7])
    assert torch.equal(again.rows(ids), bigram.rows(ids))
    with pytest.raises(UserError, match=r"bigram .*bigram.npz .*11 tokens\) than my list \(12"):
        LabelBigram.load(tmp_path / "bigram.npz", [*tokens, "more"], "my list")
    (tmp_path / "other").write_text("no")
    for name in ("other", "absent"):
        with pytest.raises(UserError, match="is not a bigram"):
            LabelBigram.load(tmp_path / name, tokens)
    with pytest.raises(UserError, match="not one sentence"):
        LabelBigram.estimate([], VOCAB)
