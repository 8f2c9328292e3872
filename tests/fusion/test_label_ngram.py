"""The n-gram of labels: against its formula written out, as a scorer, as a file, in ExternalLM."""

from collections import Counter

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.external_lm import ExternalLM
from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.fusion.ngram import load_ngram
from tests.contracts.scorer_contract import ScorerContract

VOCAB = 11
SOS = VOCAB - 1
SENTENCES = [[2, 3, 2, 3, 4], [], [2, 3], [9, 4, 4, 8], [3, 2, 3], [5], [2, 3, 2, 9], [4, 4, 8, 4]]


def ngrams(k):
    """Frequencies of what ends in a label or the end of the sentence."""
    counts = Counter()
    for ids in SENTENCES:
        tokens = (SOS, *ids, SOS)
        counts.update(tokens[i - k + 1 : i + 1] for i in range(max(1, k - 1), len(tokens)))
    return counts


def by_formula(history, label, order):
    """P_k of k = len(history) + 1 tokens, by dictionaries."""
    k = len(history) + 1
    if k == 1:
        pairs = ngrams(2)
        lower = sum(pair[1] == label for pair in pairs) / len(pairs)
        return 0.99 * lower + 0.01 / (VOCAB - 1)
    counts = ngrams(k)
    if k < order:
        before = Counter(gram[1:] for gram in ngrams(k + 1))
        counts = {g: n if g[0] == SOS else before[g] for g, n in counts.items()}
    once, twice = (sum(n == times for n in counts.values()) for times in (1, 2))
    d = once / (once + 2 * twice)
    after = {g: n for g, n in counts.items() if g[:-1] == history}
    shorter = by_formula(history[1:], label, order)
    if not after:
        return shorter
    total = sum(after.values())
    share = max(after.get((*history, label), 0) - d, 0) / total
    return share + d * len(after) / total * shorter


def expected(prefix, label, order):
    return by_formula(tuple(prefix[-(order - 1) :]), label, order)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_every_probability(order):
    ngram = LabelNgram.estimate(SENTENCES, VOCAB, order)
    assert ngram.order == order and ngram.vocab_size == VOCAB
    prefixes = [(SOS,), (SOS, 2), (SOS, 2, 3), (SOS, 2, 3, 2), (SOS, 4, 4, 8), (SOS, 7, 6, 2)]
    prefixes += [(SOS, 3, 9, 4, 4), (SOS, 1, 5)]
    longest = max(map(len, prefixes))
    rows = ngram.rows(torch.tensor([(0,) * (longest - len(p)) + p for p in prefixes]))
    for prefix, row in zip(prefixes, rows):
        for label in range(1, VOCAB):
            found = float(row[label].exp())
            assert found == pytest.approx(expected(prefix, label, order), rel=1e-5), (prefix, label)
    torch.testing.assert_close(rows[:, 1:].logsumexp(-1), torch.zeros(len(prefixes)))
    assert (rows[:, 0] == -16).all()


def test_all_positions_of_sequences_at_once():
    ngram = LabelNgram.estimate(SENTENCES, VOCAB, 3)
    ids = torch.tensor([[SOS, 2, 3, 2], [SOS, 4, 4, 8]])
    found, _ = ngram(ids)
    for row, sequence in zip(found, ids):
        for i in range(4):
            torch.testing.assert_close(row[i], ngram.rows(sequence[None, : i + 1])[0])


@pytest.mark.parametrize("order", [2, 4])
class TestAsScorer(ScorerContract):
    vocab_size = VOCAB

    @pytest.fixture(autouse=True)
    def _order(self, order):
        self.order = order

    def make_scorer(self):
        return LabelNgram.estimate(SENTENCES, VOCAB, self.order)

    def test_blank_is_never_predicted(self):
        """It is subtracted: a very low score of the blank would make it likely."""
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert (rows[:, 0] == -16).all() and torch.isfinite(rows).all()


def test_paths_of_any_length_in_one_call():
    ngram = LabelNgram.estimate(SENTENCES, VOCAB, 4)
    lm = ExternalLM(ngram, VOCAB, VOCAB - 2)
    _, start = lm.start()
    rows, states = lm.extend_paths([(1, 2, 1), (3,), (8, 3, 3, 7)], [start] * 3)
    assert lm.num_calls == 2
    for row, prefix in zip(rows, [(SOS, 2, 3, 2), (SOS, 4), (SOS, 9, 4, 4, 8)]):
        torch.testing.assert_close(row, ngram.rows(torch.tensor([prefix]))[0, 1 : VOCAB - 1])
    assert [tokens for tokens, _, _ in states] == [(2, 3, 2), (SOS, 4), (4, 4, 8)]
    ends = [ngram.rows(torch.tensor([tokens]))[0, SOS] for tokens, _, _ in states]
    assert lm.end_log_probs(states) == pytest.approx([float(end) for end in ends])


def test_file(tmp_path):
    ngram = LabelNgram.estimate(SENTENCES, VOCAB, 3)
    tokens = [f"t{i}" for i in range(VOCAB)]
    ngram.save(tmp_path / "ngram.npz", tokens)
    ids = torch.tensor([[SOS, 3, 7], [0, SOS, 2]])
    for again in (
        LabelNgram.load(tmp_path / "ngram.npz", tokens),
        load_ngram(tmp_path / "ngram.npz", tokens),
    ):
        assert again.order == 3
        assert torch.equal(again.rows(ids), ngram.rows(ids))
    with pytest.raises(UserError, match=r"n-gram .*ngram.npz .*11 tokens\) than my list \(12"):
        LabelNgram.load(tmp_path / "ngram.npz", [*tokens, "more"], "my list")
    (tmp_path / "other").write_text("no")
    for name in ("other", "absent"):
        with pytest.raises(UserError, match="is not an n-gram as"):
            LabelNgram.load(tmp_path / name, tokens)
    with pytest.raises(UserError, match="does not exist"):
        load_ngram(tmp_path / "absent", tokens)


def test_bad_estimates():
    with pytest.raises(UserError, match="not one sentence"):
        LabelNgram.estimate([], VOCAB, 2)
    with pytest.raises(UserError, match="order 1 of an n-gram: expected at least 2"):
        LabelNgram.estimate(SENTENCES, VOCAB, 1)
