"""An LLM in its own vocabulary as a scorer of ESPnet's beam searches.

N hypotheses, S tokens to score, V tokens (blank 0, sos/eos V-1), L labels (label = token id - 1).
"""

from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
from espnet.nets.scorer_interface import BatchPartialScorerInterface, BatchScorerInterface
from torch import Tensor

from espnet_llm_plugin.fusion.word_lm import Text, WordLM
from espnet_llm_plugin.fusion.words import Spelling

# What ESPnet's searches take for log 0: with a weight of zero it must stay zero.
_LOG_ZERO = -1e10


class WordState(NamedTuple):
    """A prefix.

    Attributes:
        words: Its complete words.
        pending: Labels of the last one.
        text: Both; kept alive: whoever completes the last word finds it scored.
        length: Number of its tokens.
        stood_in: Log-prob of ``pending`` under the n-gram.
        row: The n-gram's log-probs of the next token (V,).
    """

    words: Text
    pending: tuple[int, ...]
    text: Text
    length: int
    stood_in: float = 0.0
    row: Optional[Tensor] = None


class WordScorer(BatchPartialScorerInterface):
    """Log-probs of words under an LLM, at the token that completes them.

    A token that begins a word gets the log-prob of the word before it, given all words before;
    ``<sos/eos>`` gets that of the last word and of the end of the sentence; other tokens get 0. The
    sum over a hypothesis is the LLM's log-prob of its text.

    A search that compares hypotheses of equally many tokens then favours those that complete no
    words. With an n-gram over the tokens, every token gets its log-prob at once, which is taken
    back when the LLM scores the word: the sum over a hypothesis is the same.

    A partial scorer: after ESPnet's pre-beam, the LLM is asked about those hypotheses only that a
    remaining token would complete a word of. With token type ``word``, too, a word is scored when
    the next one comes: all tokens that may follow share its score.

    Args:
        lm: The LLM.
        spelling: How labels make words.
        vocab_size: V.
        ngram: N-gram over the tokens that stands in for the LLM (:func:`.ngram.load_ngram`).
    """

    def __init__(
        self,
        lm: WordLM,
        spelling: Spelling,
        vocab_size: int,
        ngram: Optional[BatchScorerInterface] = None,
    ):
        self.lm, self.spelling, self.eos, self.ngram = lm, spelling, vocab_size - 1, ngram
        completes = torch.zeros(vocab_size, dtype=torch.bool)  # the word before the token
        if spelling.separator is None:
            completes[1:] = torch.from_numpy(spelling.begins)
        else:
            completes[spelling.separator + 1] = True
        completes[self.eos] = False
        self._completes, self._is_completing = completes, completes.tolist()

    def init_state(self, x: Any) -> WordState:
        """State of ``<sos/eos>`` alone; ``x`` is not used."""
        row = None if self.ngram is None else self._rows(torch.tensor([[self.eos]]))[0]
        return WordState(self.lm.start(), (), self.lm.start(), 1, row=row)

    def select_state(
        self, state: Union[WordState, Sequence[WordState]], i: int, new_id: Optional[int] = None
    ) -> WordState:
        """State of hypothesis ``i``; a token that follows is added when that is scored."""
        return state if isinstance(state, WordState) else state[i]

    def score(self, y: Tensor, state: Optional[WordState], x: Any) -> tuple[Tensor, WordState]:
        """Scores (V,) of all tokens after prefix ``y`` (L,) including sos, and the state of it."""
        rows, states = self.batch_score_partial(y[None], None, [state], x)
        return rows[0], states[0]

    def batch_score(
        self, ys: Tensor, states: Sequence[Optional[WordState]], xs: Any
    ) -> tuple[Tensor, list[WordState]]:
        """As :meth:`score` for N prefixes (N, L)."""
        return self.batch_score_partial(ys, None, states, xs)

    def score_partial(
        self, y: Tensor, next_tokens: Tensor, state: Optional[WordState], x: Any
    ) -> tuple[Tensor, WordState]:
        """Scores (S,) of ``next_tokens`` (S,) after prefix ``y`` (L,), and the state of it."""
        rows, states = self.batch_score_partial(y[None], next_tokens[None], [state], x)
        return rows[0, next_tokens], states[0]

    def batch_score_partial(
        self,
        ys: Tensor,
        next_tokens: Optional[Tensor],
        states: Sequence[Optional[WordState]],
        xs: Any,
    ) -> tuple[Tensor, list[WordState]]:
        """Scores (N, V) after N prefixes.

        Args:
            ys: Prefixes (N, L) including sos.
            next_tokens: (N, S) tokens to score. None: all.
            states: Of the prefixes, or of beginnings of them.
            xs: Not used.

        Returns:
            Scores, -1e10 for the blank and tokens not to be scored, and N new states.
        """
        device = ys.device
        new = [self._advance(state, y) for state, y in zip(states, ys.cpu())]
        rows = torch.zeros(len(new), self.eos + 1)
        if self.ngram is not None:
            rows = self._rows(ys)
            new = [state._replace(row=row) for state, row in zip(new, rows.clone())]
        scored = torch.ones(len(new), self.eos + 1, dtype=torch.bool)
        if next_tokens is not None:
            scored = torch.zeros_like(scored).scatter_(1, next_tokens.cpu(), True)
        scored[:, 0] = False
        completing = scored & self._completes
        rows.masked_fill_(~scored, _LOG_ZERO)
        # 1. Ends first: the LLM reads the last words in the same forward.
        ending = scored[:, self.eos].nonzero().flatten().tolist()
        wordy = [n for n in completing.any(1).nonzero().flatten().tolist() if new[n].pending]
        ends = self.lm.ends([new[n].text for n in ending]) if ending else []
        words = self.lm.scores([new[n].text for n in wordy]) if wordy else []
        # 2. Without what the words before, and the labels of the last one, have been given already.
        asked = sorted({*ending, *wordy})
        before = dict(zip(asked, self.lm.scores([new[n].words for n in asked]))) if asked else {}
        for n, end in zip(ending, ends):
            rows[n, self.eos] = float(end - before[n]) - new[n].stood_in
        for n, word in zip(wordy, words):
            rows[n, completing[n]] += float(word - before[n]) - new[n].stood_in
        return rows.to(device), new

    def _advance(self, state: Optional[WordState], tokens: Tensor) -> WordState:
        """The state of a prefix (L,) that begins with that of ``state``; ``row`` is left to do."""
        words, pending, text, length, stood_in, row = state or self.init_state(None)
        for place in range(length, len(tokens)):
            token = int(tokens[place])
            if self._is_completing[token] and pending:
                words, pending, stood_in = text, (), 0.0
            pending += (token - 1,)
            text = self.lm.extend(words, self.spelling.text(pending))
            if row is not None:
                # None but the first is unknown where more than one token is new.
                row = row if place == length else self._rows(tokens[None, :place])[0]
                stood_in += float(row[token])
        return WordState(words, pending, text, len(tokens), stood_in)

    def _rows(self, ys: Tensor) -> Tensor:
        """The n-gram's log-probs (N, V) after prefixes (N, L)."""
        return self.ngram.batch_score(ys.cpu(), [None] * len(ys), None)[0]
