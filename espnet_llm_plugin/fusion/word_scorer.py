"""An LLM in its own vocabulary as a scorer of ESPnet's beam searches.

N hypotheses, S tokens to score, V tokens (blank 0, sos/eos V-1), L labels (label = token id - 1).
"""

from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
from espnet.nets.scorer_interface import BatchPartialScorerInterface
from torch import Tensor

from espnet_llm_plugin.fusion.word_lm import Text, WordLM
from espnet_llm_plugin.fusion.words import Spelling

# What ESPnet's searches take for log 0: with a weight of zero it must stay zero.
_LOG_ZERO = -1e10


class WordState(NamedTuple):
    """A prefix: its complete words, labels of the last one, both as text, and its tokens."""

    words: Text
    pending: tuple[int, ...]
    text: Text  # kept alive: whoever completes the last word finds it scored
    length: int


class WordScorer(BatchPartialScorerInterface):
    """Log-probs of words under an LLM, at the token that completes them.

    A token that begins a word gets the log-prob of the word before it, given all words before;
    ``<sos/eos>`` gets that of the last word and of the end of the sentence; other tokens get 0. The
    sum over a hypothesis is the LLM's log-prob of its text.

    A partial scorer: after ESPnet's pre-beam, the LLM is asked about those hypotheses only that a
    remaining token would complete a word of. With token type ``word``, too, a word is scored when
    the next one comes: all tokens that may follow share its score.

    Args:
        lm: The LLM.
        spelling: How labels make words.
        vocab_size: V.
    """

    def __init__(self, lm: WordLM, spelling: Spelling, vocab_size: int):
        self.lm, self.spelling, self.eos = lm, spelling, vocab_size - 1
        completes = torch.zeros(vocab_size, dtype=torch.bool)  # the word before the token
        if spelling.separator is None:
            completes[1:] = torch.from_numpy(spelling.begins)
        else:
            completes[spelling.separator + 1] = True
        completes[self.eos] = False
        self._completes, self._is_completing = completes, completes.tolist()

    def init_state(self, x: Any) -> WordState:
        """State of ``<sos/eos>`` alone; ``x`` is not used."""
        return WordState(self.lm.start(), (), self.lm.start(), 1)

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
        new = [self._advance(state, y) for state, y in zip(states, ys.tolist())]
        scored = torch.ones(len(new), self.eos + 1, dtype=torch.bool)
        if next_tokens is not None:
            scored = torch.zeros_like(scored).scatter_(1, next_tokens.cpu(), True)
        scored[:, 0] = False
        completing = scored & self._completes
        rows = torch.zeros(len(new), self.eos + 1)
        rows.masked_fill_(~scored, _LOG_ZERO)
        # 1. Ends first: the LLM reads the last words in the same forward.
        ending = scored[:, self.eos].nonzero().flatten().tolist()
        wordy = [n for n in completing.any(1).nonzero().flatten().tolist() if new[n].pending]
        ends = self.lm.ends([new[n].text for n in ending]) if ending else []
        words = self.lm.scores([new[n].text for n in wordy]) if wordy else []
        # 2. Without what the words before have been given already.
        asked = sorted({*ending, *wordy})
        before = dict(zip(asked, self.lm.scores([new[n].words for n in asked]))) if asked else {}
        for n, end in zip(ending, ends):
            rows[n, self.eos] = float(end - before[n])
        for n, word in zip(wordy, words):
            rows[n].masked_fill_(completing[n], float(word - before[n]))
        return rows.to(device), new

    def _advance(self, state: Optional[WordState], tokens: list[int]) -> WordState:
        """The state of a prefix that begins with that of ``state``."""
        words, pending, text, length = state or self.init_state(None)
        for number, token in enumerate(tokens[length:]):
            if self._is_completing[token] and pending:
                complete = text if number == 0 else self._extend(words, pending)
                words, pending = complete, ()
            pending += (token - 1,)
        return WordState(words, pending, self._extend(words, pending), len(tokens))

    def _extend(self, words: Text, pending: tuple[int, ...]) -> Text:
        return self.lm.extend(words, self.spelling.text(pending))
