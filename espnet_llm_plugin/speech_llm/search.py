"""Label-synchronous beam search over a batch of utterances, in tensors.

B utterances, A of them still searched, K beam, W hypotheses of an utterance (1, then K),
N = A W rows, V tokens, C candidate tokens of an utterance (V without CTC reduction), S scorers,
F finished hypotheses kept, U tokens.

Every step scores all hypotheses of all utterances in one batch. Utterances that have ended leave
it; the scorers are told which rows of the previous step the new ones extend, so that they share
what hypotheses have in common. Nothing in the loop is done hypothesis by hypothesis.
"""

from dataclasses import dataclass
from typing import Mapping, Optional, Protocol, Sequence, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.beam import Beam, Finished, Trie
from espnet_llm_plugin.speech_llm.guards import RepetitionGuard
from espnet_llm_plugin.speech_llm.hypothesis import (
    CTC,
    END_DETECTION,
    LabelHypothesis,
    SearchWeights,
)
from espnet_llm_plugin.transducer.hypothesis import SearchError

# Columns of the blocks in which the best scores are looked for, and from how many columns on.
BLOCK, SMALL = 64, 16384


class TokenScorer(Protocol):
    """Log-probabilities of every next token; used for one batch of utterances."""

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Extend rows by a token.

        Args:
            tokens: The start symbol at the first step, then the last token of each row (N,).
            parents: At the first step the utterances, then rows of the previous step (N,).

        Returns:
            Log-probs (N, V) float32 of the tokens that may follow.
        """
        ...


class PartialScorer(Protocol):
    """Log-probabilities of some next tokens, e.g. the CTC prefix score.

    Attributes:
        candidates: Tokens that can have a score, ascending, the end symbol among them (B, C);
            None: all V.
    """

    candidates: Optional[torch.Tensor]

    def score(self) -> torch.Tensor:
        """What each candidate adds to the log-probability of the rows: (N, C) float32."""
        ...

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """The next rows: ``parents`` (M,), rows of this step, by ``tokens`` (M,)."""
        ...


@dataclass(frozen=True)
class LabelSearch:
    """Beam search; with ``beam_size`` 1 greedy.

    In each step the 2 K best extensions of an utterance are looked at; of the K best those with
    the end symbol are finished, and the K best others go on [as transformers' ``generate``].

    Attributes:
        sos: Token that every hypothesis begins with.
        eos: End symbol.
        vocab_size: V.
        beam_size: K.
        nbest: Hypotheses of the result.
        weights: Of the scorers.
        end_detection: When an utterance is done: ``espnet``: at three lengths in a row the best
            finished hypothesis is 10 nats below the best of all [Watanabe 2017, eq. 50, as
            ``espnet.nets.e2e_asr_common.end_detect``], or no hypothesis can enter the result any
            more; ``generate``: the best running hypothesis would not enter K finished ones if it
            ended at its present length (transformers' ``early_stopping=False``).
        guard: Against token loops.
        forbidden: Tokens never emitted (blank, unused rows); CTC candidates lack them anyhow.
    """

    sos: int
    eos: int
    vocab_size: int
    beam_size: int = 4
    nbest: int = 1
    weights: SearchWeights = SearchWeights()
    end_detection: str = "espnet"
    guard: RepetitionGuard = RepetitionGuard()
    forbidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.nbest < 1:
            raise UserError(
                f"beam size {self.beam_size}, nbest {self.nbest}: both must be at least 1"
            )
        if self.end_detection not in END_DETECTION:
            raise UserError(
                f"end_detection {self.end_detection!r}: expected one of {', '.join(END_DETECTION)}"
            )

    @torch.inference_mode()
    def __call__(
        self,
        scorers: Mapping[str, TokenScorer],
        max_tokens: Sequence[int],
        *,
        ctc: Optional[PartialScorer] = None,
        min_tokens: Optional[Sequence[int]] = None,
        device: Union[str, torch.device] = "cpu",
    ) -> list[list[LabelHypothesis]]:
        """Search B utterances.

        Args:
            scorers: By name, at least those that have a weight.
            max_tokens: Length limits, see :func:`~.guards.length_limits` (B).
            ctc: Scorer of the CTC weight.
            min_tokens: Fewest tokens (B).

        Returns:
            B n-best lists, best first. An utterance none of whose hypotheses has a probability
            above 0 gets the empty one with a total of -inf.
        """
        weights = self.weights.by_scorer()
        missing = set(weights) - set(scorers) - ({CTC} if ctc is not None else set())
        if missing:
            raise ValueError(f"no scorer for the weights of {', '.join(sorted(missing))}")
        used = {name: scorers[name] for name in weights if name != CTC}
        ctc = ctc if CTC in weights else None
        names = [*used, *([CTC] if ctc is not None else [])]
        scale = [weights[name] for name in names]

        utterances = len(max_tokens)
        limit = torch.tensor(list(max_tokens), device=device)
        least = torch.tensor(list(min_tokens or [0] * utterances), device=device)
        longest_least = int(least.max())
        forbidden = torch.tensor(self.forbidden, dtype=torch.long, device=device)
        trie = Trie(device)
        beam = Beam.start(utterances, len(names), self.sos, device)
        loops = self.guard.start(utterances, device)
        size = max(self.beam_size, self.nbest)
        finished = Finished.empty(utterances, size, len(names), int(limit.max()), device)
        parents = torch.arange(utterances, device=device)

        for step in range(int(limit.max())):
            # 1. What each scorer says of the next token.
            tokens = beam.token.flatten()
            rows = [scorer.step(tokens, parents) for scorer in used.values()]
            candidates = None
            if ctc is not None and ctc.candidates is not None:
                candidates = ctc.candidates[beam.utterance]
                rows = [pick(row, candidates, beam.width) for row in rows]
            if ctc is not None:
                rows.append(ctc.score())
            # 2. Their weighted sum; what may not follow.
            total = weighted_sum(beam.total.view(-1, 1) + self.weights.penalty, rows, scale)
            if candidates is None and len(forbidden):
                total.index_fill_(1, forbidden, -torch.inf)
            if loops is not None:
                forbid(total, *loops.forbidden(), candidates, beam.width)
            if step < longest_least:
                too_short = (step < least[beam.utterance]).repeat_interleave(beam.width)
                row = too_short.nonzero().flatten()
                forbid(total, row, torch.full_like(row, self.eos), candidates, beam.width)
            # 3. The 2 K best extensions.
            total = total.view(len(beam), -1)
            width = total.size(1) // beam.width
            values, indices = best_of(total, min(2 * self.beam_size, total.size(1)))
            check_numbers(values, beam.utterance)
            place = indices.div(width, rounding_mode="floor")
            column = indices - place * width
            token = column if candidates is None else candidates.gather(1, column)
            row = place + torch.arange(len(beam), device=device)[:, None] * beam.width
            added = torch.stack([scores[row, column] for scores in rows], dim=2)
            found = beam.extensions(values, place, token, added)
            # 4. Some are finished: by the end symbol, or because they are long enough.
            last = (limit[beam.utterance] == step + 1)[:, None]
            is_end = token == self.eos
            in_beam = torch.arange(token.size(1), device=device) < self.beam_size
            ends = (is_end | last) & in_beam & (values > -torch.inf)
            finished.add(found, ends, step + 1, self.weights.length_norm)
            # 5. The K best others go on.
            order = is_end.long().argsort(dim=1, stable=True)[:, : self.beam_size]
            chosen = found.take(order)
            chosen.total.masked_fill_(is_end.gather(1, order), -torch.inf)
            done = last[:, 0] | self._is_done(chosen, finished, step, is_end[:, 0])
            keep = (~done).nonzero().flatten()
            if not len(keep):
                break
            chosen = chosen.utterances(keep)
            parents = row.gather(1, order)[keep].flatten()
            beam = chosen.grow(trie)
            if ctc is not None:
                ctc.extend(parents, beam.token.flatten())
            if loops is not None:
                loops = loops.extend(parents, beam.token.flatten())
        return finished.nbest(trie, names, self.nbest, self.weights, self.eos)

    def _is_done(
        self, running: Beam, finished: Finished, step: int, best_ends: torch.Tensor
    ) -> torch.Tensor:
        """Whether the search of each of A utterances has ended after a step: (A,)."""
        at, top = running.utterance, running.total[:, 0]
        if self.beam_size == 1:
            return best_ends | (top == -torch.inf)
        if self.end_detection == "generate":
            worst = finished.ranking[at, self.beam_size - 1]
            return ~(top / (step + 1) ** self.weights.length_norm > worst)
        done = finished.is_over(at, step) | (top == -torch.inf)
        if self.weights.only_falls:
            done |= ~(top > finished.ranking[at, self.nbest - 1])
        return done


def best_of(scores: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``topk`` of scores (A, C): values and indices (A, ``number``), faster where C is large.

    The best numbers are among the blocks with the best maxima, as many as numbers are wanted.
    """
    rows, columns = scores.shape
    if columns < SMALL:
        return scores.topk(number, dim=1)
    whole = columns // BLOCK * BLOCK
    blocks = scores[:, :whole].view(rows, -1, BLOCK)
    chosen = blocks.amax(dim=2).topk(min(number, blocks.size(1)), dim=1).indices[:, :, None]
    inside = torch.arange(columns, device=scores.device)
    some = blocks.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)
    index = (chosen * BLOCK + inside[:BLOCK]).flatten(1)
    some = torch.cat([some, scores[:, whole:]], dim=1)
    index = torch.cat([index, inside[whole:].expand(rows, -1)], dim=1)
    best = some.topk(number, dim=1)
    return best.values, index.gather(1, best.indices)


def pick(scores: torch.Tensor, candidates: torch.Tensor, width: int) -> torch.Tensor:
    """Scores (N, C) of the candidates (A, C), from those of all tokens (N, V)."""
    scores = scores.view(len(candidates), width, -1)
    return scores.gather(2, candidates[:, None].expand(-1, width, -1)).flatten(0, 1)


def weighted_sum(
    base: torch.Tensor, rows: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """Scores (N, C): ``base`` (N, 1) and the weighted ``rows``, each (N, C).

    What is impossible to one scorer stays so, whatever the sign of its weight.
    """
    total = torch.add(base, rows[0], alpha=weights[0])
    for row, weight in zip(rows[1:], weights[1:]):
        total.add_(row, alpha=weight)
    for row, weight in zip(rows, weights):
        if weight < 0:
            total.masked_fill_(row == -torch.inf, -torch.inf)
    return total


def check_numbers(best: torch.Tensor, utterance: torch.Tensor) -> None:
    """Refuse scores (A, M), best first, that are not numbers: topk puts these first.

    Raises:
        SearchError: Names an utterance of the batch.
    """
    wrong = best[:, 0].isnan() | (best[:, 0] == torch.inf)
    if bool(wrong.any()):
        raise SearchError(
            f"the scores of utterance {int(utterance[wrong][0])} of the batch are not numbers: the "
            "model is broken, or the precision is too low for it"
        )


def forbid(
    total: torch.Tensor,
    row: torch.Tensor,
    token: torch.Tensor,
    candidates: Optional[torch.Tensor],
    width: int,
) -> None:
    """Set scores (N, C) of tokens (M,) after rows (M,) to -inf, in place."""
    if candidates is None:
        total[row, token] = -torch.inf
        return
    theirs = candidates[row.div(width, rounding_mode="floor")]
    column = torch.searchsorted(theirs, token[:, None]).clamp(max=theirs.size(1) - 1)
    there = (theirs.gather(1, column) == token[:, None]).flatten()
    total[row[there], column.flatten()[there]] = -torch.inf
