"""The tensors of a label-synchronous search: hypotheses that run, that are finished, and tokens.

A utterances of a beam (of B in all), W hypotheses of each, S scorers, F finished hypotheses,
U longest output.
"""

from dataclasses import dataclass

import torch

from espnet_llm_plugin.speech_llm.hypothesis import LabelHypothesis, SearchWeights

# ESPnet's end detection: lengths looked at, and how far below the best (natural log).
END_LENGTHS = 3
END_DIFFERENCE = -10.0
# Its lengths count <sos> and lag one step behind.
END_LAG = 2


class Trie:
    """Tokens of all prefixes of a search: a prefix is a node, a token and the node before it.

    Node -1 is the empty prefix.
    """

    def __init__(self, device: torch.device):
        self._tokens: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._device = device
        self._size = 0

    def add(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Nodes of new prefixes, any shape."""
        self._tokens.append(tokens.flatten())
        self._parents.append(parents.flatten())
        first, self._size = self._size, self._size + tokens.numel()
        return torch.arange(first, self._size, device=self._device).view(tokens.shape)

    def paths(self, nodes: torch.Tensor) -> list[list[int]]:
        """Token sequences of M nodes."""
        if not self._tokens:
            return [[] for _ in nodes]
        tokens, parents = torch.cat(self._tokens), torch.cat(self._parents)
        columns = []
        while bool((nodes >= 0).any()):
            columns.append(torch.where(nodes >= 0, tokens[nodes], -1))
            nodes = torch.where(nodes >= 0, parents[nodes], -1)
        if not columns:
            return [[] for _ in nodes]
        table = torch.stack(columns[::-1], dim=1).tolist()
        return [[token for token in row if token >= 0] for row in table]


@dataclass(frozen=True)
class Beam:
    """W hypotheses of each of A utterances, best first.

    Attributes:
        utterance: Of each row (A,).
        total: Weighted score; -inf where there is no hypothesis (A, W).
        token: Last token (A, W).
        node: Prefix without ``token`` for extensions, with it for running hypotheses (A, W).
        scores: Unweighted sums of the scorers (A, W, S).
    """

    utterance: torch.Tensor
    total: torch.Tensor
    token: torch.Tensor
    node: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def start(cls, utterances: int, num_scorers: int, sos: int, device: torch.device) -> "Beam":
        """One empty hypothesis for each utterance."""
        one = torch.zeros(utterances, 1, device=device)
        number = torch.full((utterances, 1), sos, device=device)
        return cls(
            torch.arange(utterances, device=device),
            one,
            number,
            torch.full_like(number, -1),
            torch.zeros(utterances, 1, num_scorers, device=device),
        )

    def __len__(self) -> int:
        return len(self.utterance)

    @property
    def width(self) -> int:
        """W."""
        return self.total.size(1)

    def extensions(
        self, total: torch.Tensor, place: torch.Tensor, token: torch.Tensor, added: torch.Tensor
    ) -> "Beam":
        """Candidates (A, M): the hypotheses ``place`` by ``token``, which adds (A, M, S)."""
        scores = self.scores.gather(1, place[:, :, None].expand_as(added)) + added
        return Beam(self.utterance, total, token, self.node.gather(1, place), scores)

    def take(self, order: torch.Tensor) -> "Beam":
        """The places ``order`` (A, M)."""
        more = order[:, :, None].expand(-1, -1, self.scores.size(2))
        return Beam(
            self.utterance,
            self.total.gather(1, order),
            self.token.gather(1, order),
            self.node.gather(1, order),
            self.scores.gather(1, more),
        )

    def utterances(self, keep: torch.Tensor) -> "Beam":
        """The utterances at some places."""
        return Beam(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    def grow(self, trie: Trie) -> "Beam":
        """Extensions as running hypotheses."""
        return Beam(
            self.utterance, self.total, self.token, trie.add(self.node, self.token), self.scores
        )


@dataclass
class Finished:
    """The best finished hypotheses of all B utterances, best first.

    Attributes:
        ranking: Score per length; -inf where there is none (B, F).
        total: Weighted score (B, F).
        node: Prefix without the last token (B, F).
        token: Last token, which may be the end symbol (B, F).
        length: Tokens, the end symbol counted (B, F).
        scores: Unweighted sums (B, F, S).
        best_at: Best total of the hypotheses that ended at each step (B, U).
    """

    ranking: torch.Tensor
    total: torch.Tensor
    node: torch.Tensor
    token: torch.Tensor
    length: torch.Tensor
    scores: torch.Tensor
    best_at: torch.Tensor

    @classmethod
    def empty(
        cls, utterances: int, size: int, num_scorers: int, longest: int, device: torch.device
    ) -> "Finished":
        """None yet."""
        nothing = torch.full((utterances, size), -torch.inf, device=device)
        number = torch.full((utterances, size), -1, device=device)
        return cls(
            nothing,
            nothing.clone(),
            number,
            number.clone(),
            torch.zeros_like(number),
            torch.zeros(utterances, size, num_scorers, device=device),
            torch.full((utterances, longest), -torch.inf, device=device),
        )

    def add(self, found: Beam, ends: torch.Tensor, length: int, length_norm: float) -> None:
        """Add extensions.

        Args:
            found: Of A utterances (A, M).
            ends: Which of them are finished (A, M).
            length: Their tokens, the end symbol counted.
            length_norm: See :class:`~.hypothesis.SearchWeights`.
        """
        at = found.utterance
        total = found.total.masked_fill(~ends, -torch.inf)
        self.best_at[at, length - 1] = total.amax(dim=1)
        ranking = total / length**length_norm
        together = {
            "ranking": ranking,
            "total": total,
            "node": found.node,
            "token": found.token,
            "length": torch.full_like(found.node, length),
            "scores": found.scores,
        }
        order = torch.cat([self.ranking[at], ranking], dim=1).topk(self.ranking.size(1)).indices
        for name, new in together.items():
            mine = getattr(self, name)
            both = torch.cat([mine[at], new], dim=1)
            index = order if both.dim() == 2 else order[:, :, None].expand(-1, -1, both.size(2))
            mine[at] = both.gather(1, index)

    def is_over(self, at: torch.Tensor, step: int) -> torch.Tensor:
        """ESPnet's end detection for the utterances ``at`` (A,) after a step: (A,)."""
        last = step - END_LAG + 1
        if last < END_LENGTHS:
            return torch.zeros_like(at, dtype=torch.bool)
        mine = self.best_at[at]
        recent = mine[:, last - END_LENGTHS : last]
        # nothing ended at a length: not over
        below = recent - mine.amax(dim=1, keepdim=True) < END_DIFFERENCE
        return (below & (recent > -torch.inf)).all(dim=1)

    def nbest(
        self, trie: Trie, names: list[str], nbest: int, weights: SearchWeights, eos: int
    ) -> list[list[LabelHypothesis]]:
        """B lists of at most ``nbest``."""
        ranking, total, token, length, scores = (
            getattr(self, name)[:, :nbest].tolist()
            for name in ("ranking", "total", "token", "length", "scores")
        )
        paths = iter(trie.paths(self.node[:, :nbest].flatten()))
        lists = []
        for b, mine in enumerate(ranking):
            hyps = []
            for f, rank in enumerate(mine):
                tokens = next(paths)
                if rank == -torch.inf:
                    continue
                ended = token[b][f] == eos
                hyps.append(
                    LabelHypothesis(
                        tuple(tokens) if ended else (*tokens, token[b][f]),
                        total[b][f],
                        rank,
                        dict(zip(names, scores[b][f])),
                        weights.penalty * length[b][f],
                        ended,
                    )
                )
            lists.append(hyps or [LabelHypothesis((), -torch.inf, -torch.inf, ended=False)])
        return lists
