"""CTC prefix scores for ESPnet's beam searches, over fewer labels and frames if wanted.

Dimensions: N hypotheses, T frames, D encoder size, V tokens, S tokens to score.
"""

import itertools
from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
from espnet.nets.scorer_interface import BatchPartialScorerInterface

from espnet_llm_plugin.fusion.ctc_prefix_scorer import CTCPrefixScorer, CTCPrefixState

# What ESPnet's searches take for log 0: with a weight of zero it must stay zero.
_LOG_ZERO = -1e10


class _Scored(NamedTuple):
    """Hypotheses of a step, and the tokens scored where there is one hypothesis only."""

    state: CTCPrefixState
    tokens: Optional[torch.Tensor] = None


class _Extension(NamedTuple):
    """A hypothesis of the next step, which is followed when it is scored, and not before."""

    parents: CTCPrefixState
    row: int
    token: Optional[int]  # None: the parent itself


class CTCPartialScorer(BatchPartialScorerInterface):
    """In the place of :class:`espnet.nets.scorers.ctc.CTCPrefixScorer`, with the same scores.

    One step serves all hypotheses at once, and only hypotheses that survive are followed over the
    frames. Takes the scorer's options, see
    :class:`~espnet_llm_plugin.fusion.ctc_prefix_scorer.CTCPrefixScorer`.

    Args:
        ctc: ESPnet's ``CTC`` module.
        eos: End symbol, a row of the CTC output.
        blank: Row of the blank.
        top_k: Labels kept of an utterance besides blank and eos. None: all.
        compress_threshold: Merge frames of one sure label. None: none.
    """

    def __init__(
        self,
        ctc: torch.nn.Module,
        eos: int,
        *,
        blank: int = 0,
        top_k: Optional[int] = None,
        compress_threshold: Optional[float] = None,
    ):
        self.ctc, self.eos = ctc, eos
        self._options = dict(
            blank=blank, eos=eos, top_k=top_k, compress_threshold=compress_threshold
        )
        self.scorer: Optional[CTCPrefixScorer] = None

    def init_state(self, x: torch.Tensor) -> _Extension:
        """State before the first token of an utterance (T, D)."""
        log_probs = self.ctc.log_softmax(x[None])
        lengths = torch.tensor([len(x)], device=x.device)
        self.scorer = CTCPrefixScorer(log_probs, lengths, **self._options)
        return _Extension(self.scorer.initial_state(), 0, None)

    def select_state(
        self, state: Union[_Scored, Sequence[_Extension]], i: int, new_id: Optional[int] = None
    ) -> _Extension:
        """State of hypothesis ``i``, or of the one that token ``new_id`` makes of it.

        Of the state of :meth:`score_partial`: of the hypothesis with the i-th scored token.
        """
        if not isinstance(state, _Scored):
            return state[i]
        if state.tokens is not None:
            return _Extension(state.state, 0, int(state.tokens[i]))
        return _Extension(state.state, int(i), int(new_id))

    def score_partial(
        self, y: torch.Tensor, next_tokens: torch.Tensor, state: _Extension, x: torch.Tensor
    ) -> tuple[torch.Tensor, _Scored]:
        """Scores (S,) of ``next_tokens`` (S,) after the hypothesis of ``state``."""
        followed = self._follow([state])
        scores = self.scorer.log_probs_of(followed, next_tokens[None])[0]
        return scores.clamp(min=_LOG_ZERO).to(x.dtype), _Scored(followed, next_tokens)

    def batch_score_partial(
        self,
        ys: torch.Tensor,
        next_tokens: Optional[torch.Tensor],
        states: Sequence[_Extension],
        xs: Any,
    ) -> tuple[torch.Tensor, _Scored]:
        """Scores (N, V) after N hypotheses.

        Args:
            ys: Not looked at, the states know their labels.
            next_tokens: (N, S) tokens to score; eos is always scored. None: all.
            states: Of the hypotheses.
            xs: Not looked at.

        Returns:
            Scores, -1e10 for the blank, tokens not to be scored and labels not kept, and the state.
        """
        followed = self._follow(states)
        if next_tokens is None:
            scores = self.scorer.next_log_probs(followed)
            tokens = self.scorer.labels[followed.utterances]
        else:
            scores = self.scorer.log_probs_of(followed, next_tokens)
            tokens = next_tokens
        full = scores.new_full((len(followed), self.scorer.num_labels), _LOG_ZERO)
        full.scatter_(1, tokens, scores.clamp_(min=_LOG_ZERO))
        full[:, self.eos] = self.scorer.end_log_probs(followed).clamp_(min=_LOG_ZERO)
        return full, _Scored(followed)

    def _follow(self, states: Sequence[_Extension]) -> CTCPrefixState:
        """Forward variables of the hypotheses, all in one go."""
        groups = [
            (parents, [extension.row for extension in group])
            for parents, group in _by_parents(states)
        ]
        device = groups[0][0].last.device
        parts = [parents.select(torch.tensor(rows, device=device)) for parents, rows in groups]
        together = CTCPrefixState(
            *(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts)))
        )
        if states[0].token is None:
            return together
        tokens = torch.tensor([extension.token for extension in states], device=device)
        return self.scorer.extend(together, torch.arange(len(states), device=device), tokens)


def _by_parents(states: Sequence[_Extension]):
    """Neighbouring hypotheses that come from the same step."""
    for _, group in itertools.groupby(states, key=lambda extension: id(extension.parents)):
        group = list(group)
        yield group[0].parents, group
