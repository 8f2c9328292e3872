"""An LLM in its own vocabulary in ESPnet's beam search: against whole texts in one forward each."""

import pytest
import torch
from espnet.nets.scorer_interface import BatchScorerInterface

from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.fusion.word_lm import WordLM
from espnet_llm_plugin.fusion.word_scorer import WordScorer
from espnet_llm_plugin.fusion.words import Spelling
from espnet_llm_plugin.llm.backbone import FrozenLLM
from tests.contracts.scorer_contract import ScorerContract
from tests.fusion.test_word_lm import whole
from tests.llm.tiny import save_llm_dir

PIECES = ["\u2581the", "\u2581c", "at", "\u2581", "s", "\u2581dog", "og", "\u2581sat"]
CHARACTERS = ["<space>", "t", "h", "e", "a", "s", "c", "d"]
WORDS = ["the", "cat", "dog", "sat", "a", "on", "mat", "sea"]


def join(tokens):
    text = "".join(tokens).replace("\u2581", " ").replace("<space>", " ")
    return " ".join(text.split())


KINDS = {
    "bpe": (PIECES, join),
    "char": (CHARACTERS, join),
    "word": (WORDS, " ".join),
}


class Favourites(BatchScorerInterface):
    """Something else to add: of hypotheses of incomplete words all are equally good."""

    def __init__(self, vocab_size):
        generator = torch.Generator().manual_seed(1)
        self.row = torch.randn(vocab_size, generator=generator)

    def score(self, y, state, x):
        return self.row, None

    def batch_score(self, ys, states, xs):
        return self.row.expand(len(ys), -1), [None] * len(ys)


class WordScorerContract(ScorerContract):
    vocab_size = 11
    kind: str
    end = "eos"
    sentences = ([4, 5, 3, 4, 9, 2], [4, 5, 8])
    atol = 1e-4

    @pytest.fixture(autouse=True, scope="class")
    def llm(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("llm") / "llm"
        save_llm_dir(directory)
        type(self).loaded = FrozenLLM(directory)

    @property
    def tokens(self):
        return ["<blank>", "<unk>", *KINDS[self.kind][0], "<sos/eos>"]

    def make_scorer(self):
        spelling = Spelling(self.tokens, self.kind, KINDS[self.kind][1])
        return WordScorer(WordLM(self.loaded, end=self.end), spelling, self.vocab_size)

    def text(self, tokens):
        return KINDS[self.kind][1]([self.tokens[token] for token in tokens])

    def complete(self, tokens, following):
        """log P of the words that are complete if a token follows."""
        tokens = list(tokens)
        if following is not None:
            piece, begins = self.tokens[following], self.kind == "word"
            if not (begins or piece.startswith("\u2581") or piece == "<space>"):
                while tokens and not (
                    self.tokens[tokens[-1]].startswith("\u2581") or tokens[-1] == self.space
                ):
                    tokens.pop()
                if tokens and tokens[-1] != self.space:
                    tokens.pop()
        return whole(self.loaded, self.text(tokens), "none")

    @property
    def space(self):
        return self.tokens.index("<space>") if self.kind == "char" else -1

    def full_log_probs(self, scorer, tokens):
        """By the definition: differences of whole texts, one forward each."""
        rows = []
        for length in range(len(tokens) + 1):
            prefix = tokens[:length]
            so_far = self.complete(prefix[:-1], prefix[-1]) if prefix else 0.0
            row = [-1e10] + [self.complete(prefix, v) - so_far for v in range(1, self.vocab_size)]
            row[-1] = whole(self.loaded, self.text(prefix), self.end) - so_far
            rows.append(row)
        return torch.tensor(rows)

    def test_scores_are_log_probs_that_depend_on_the_prefix(self):
        """Not a distribution over tokens: it is the sum over a sentence that is one of texts."""
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert (rows[:, 1:] <= 1e-4).all() and (rows[:, 1:] < -1e-3).any()
        assert (rows[1:, -1] - rows[:-1, -1]).abs().min() > 1e-3

    def test_sum_over_a_sentence_is_that_of_its_text(self):
        scorer = self.make_scorer()
        for tokens in self.sentences:
            rows, _ = self.walk(scorer, tokens)
            targets = torch.tensor([*tokens, self.vocab_size - 1])
            found = float(rows.gather(1, targets[:, None]).sum())
            assert found == pytest.approx(whole(self.loaded, self.text(tokens), self.end), abs=1e-3)

    def _search(self, cls, beam_size, **options):
        scorer = self.make_scorer()
        search = cls(
            beam_size=beam_size,
            vocab_size=self.vocab_size,
            weights={"lm": 1.0, "other": 1.0},
            scorers={"lm": scorer, "other": Favourites(self.vocab_size)},
            sos=self.vocab_size - 1,
            eos=self.vocab_size - 1,
            **options,
        )
        with torch.no_grad():
            return scorer, search(torch.zeros(6, 2), maxlenratio=1.0)

    @pytest.mark.parametrize("pre_beam", [None, "full"])
    def test_serves_in_espnets_batch_beam_search(self, pre_beam):
        from espnet.nets.batch_beam_search import BatchBeamSearch
        from espnet.nets.beam_search import BeamSearch

        options = {"pre_beam_score_key": pre_beam}
        scorer, batched = self._search(BatchBeamSearch, 4, **options)
        _, single = self._search(BeamSearch, 4, **options)
        assert batched[0].yseq.tolist() == single[0].yseq.tolist()
        for hypothesis in batched:
            tokens = hypothesis.yseq.tolist()[1:-1]
            rows = self.full_log_probs(scorer, tokens)
            scored = tokens if len(tokens) == 6 else [*tokens, self.vocab_size - 1]
            score = sum(float(row[token]) for row, token in zip(rows, scored))
            assert float(hypothesis.scores["lm"]) == pytest.approx(score, abs=1e-3)

    def test_tokens_not_asked_for_are_not_scored(self):
        scorer = self.make_scorer()
        prefixes = torch.stack([self.prefix([4, 5]), self.prefix([4, 8])])
        states = [scorer.init_state(None)] * 2
        full, _ = scorer.batch_score(prefixes, states, None)
        asked = torch.tensor([[3, 5, 10], [2, 4, 9]])
        some, _ = scorer.batch_score_partial(prefixes, asked, states, None)
        torch.testing.assert_close(some.gather(1, asked), full.gather(1, asked))
        assert (some.scatter(1, asked, -1e10) == -1e10).all()
        for row, tokens in enumerate(asked):
            alone, _ = scorer.score_partial(prefixes[row], tokens, states[row], None)
            torch.testing.assert_close(alone, full[row, tokens])


class TestPieces(WordScorerContract):
    kind = "bpe"

    def test_the_llm_is_asked_at_the_end_of_words_only(self, monkeypatch):
        scorer, asked = self.make_scorer(), []
        scores = scorer.lm.scores
        monkeypatch.setattr(scorer.lm, "ends", None)
        monkeypatch.setattr(
            scorer.lm, "scores", lambda texts: asked.append(len(texts)) or scores(texts)
        )
        prefixes = torch.stack([self.prefix([3, 4]), self.prefix([2, 3])])
        tokens = torch.tensor([[4, 6, 8], [4, 6, 8]])  # at, s, og
        states = [scorer.init_state(None)] * 2
        scorer.batch_score_partial(prefixes, tokens, states, None)
        assert asked == []
        tokens[1, 1] = 7  # a word's beginning: the second hypothesis, and what it was without
        scorer.batch_score_partial(prefixes, tokens, states, None)
        assert asked == [1, 1]

    def test_no_token_is_read_twice_along_a_hypothesis(self):
        scorer, tokens = self.make_scorer(), [2, 3, 4, 9, 7]
        self.walk(scorer, tokens)
        together = WordLM(self.loaded, end="eos")
        texts = [together.text(self.text(tokens[:n])) for n in range(len(tokens) + 1)]
        together.ends(texts)
        assert scorer.lm.num_tokens == together.num_tokens


class TestCharacters(WordScorerContract):
    kind = "char"
    sentences = ([3, 4, 5, 2, 6, 2], [3, 4, 2, 2, 8])
    end = "newline"


class TestWords(WordScorerContract):
    kind = "word"
    sentences = ([2, 3, 5, 7, 2, 8], [2, 3, 4])
    end = "none"


class WithNgram(WordScorerContract):
    """The same sums over sentences; before their words are complete, an n-gram's."""

    def make_scorer(self):
        scorer = super().make_scorer()
        scorer.ngram = self.ngram
        return scorer

    @property
    def ngram(self):
        return LabelNgram.estimate([[2, 3, 4], [5, 6, 3], [7, 8, 9, 2]], self.vocab_size, order=3)

    def so_far(self, tokens):
        """Complete words by the LLM, the tokens of the last one by the n-gram."""
        begins = [self.tokens[t].startswith("\u2581") or t == self.space for t in tokens]
        start = max((i for i, begin in enumerate(begins) if begin), default=0)
        score = whole(self.loaded, self.text(tokens[:start]), "none")
        for i in range(start, len(tokens)):
            row, _ = self.ngram.score(self.prefix(tokens[:i]), None, None)
            score += float(row[tokens[i]])
        return score

    def full_log_probs(self, scorer, tokens):
        rows = []
        for length in range(len(tokens) + 1):
            prefix = list(tokens[:length])
            now = self.so_far(prefix)
            row = [-1e10] + [self.so_far([*prefix, v]) - now for v in range(1, self.vocab_size)]
            row[-1] = whole(self.loaded, self.text(prefix), self.end) - now
            rows.append(row)
        return torch.tensor(rows)

    def test_scores_are_log_probs_that_depend_on_the_prefix(self):
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert torch.isfinite(rows).all()
        assert (rows[1:, -1] - rows[:-1, -1]).abs().min() > 1e-3

    def test_states_of_beginnings_go_on(self):
        scorer, tokens = self.make_scorer(), self.sentences[0]
        rows, _ = self.walk(scorer, tokens)
        for state in (None, *(self.walk(scorer, tokens[:n])[1] for n in (0, 2))):
            row, _ = scorer.score(self.prefix(tokens), state, None)
            torch.testing.assert_close(row, rows[-1], atol=1e-4, rtol=1e-4)


class TestPiecesWithNgram(WithNgram):
    kind = "bpe"


class TestCharactersWithNgram(WithNgram):
    kind = "char"
    sentences = ([3, 4, 5, 2, 6, 2], [3, 4, 2, 2, 8])
    end = "newline"
