"""Language models beside the labels of a time-synchronous search: at the end, or delayed.

B utterances, G scale settings of each, R = B G rows, N hypotheses of a row, M prefixes.

Label-wise fusion adds an LM's score to every label, before the beam is pruned. Delayed fusion
[arXiv 2501.09258; arXiv 2603.15045] prunes by ``S_asr + last known S_LM`` and asks the LM now and
then, for the hypotheses that are still alive: for far fewer prefixes, for many at once, and, for an
LLM with a vocabulary of its own, for whole words only. What balances the LM comes with it and not
before: a prior of the labels, an internal LM that is subtracted, the bonus of labels.

Pruning without an LM loses hypotheses that it would have kept. A cheap LM over the labels, such as
an n-gram, can stand in: it scores labels at once with the LM's weight, and what the LM has read of
a hypothesis is then scored by the LM instead. Prior, internal LM and bonus are then there at once.
"""

from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Protocol, Sequence

import numpy as np
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.words import Spelling, WordEnds
from espnet_llm_plugin.transducer.beam import Beam
from espnet_llm_plugin.transducer.hypothesis import Scales, without_late
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.prior import Prior
    from espnet_llm_plugin.fusion.word_lm import Text, WordLM

POLICIES = ("never", "every_n_frames", "shortest", "every_word")


class Prefixes(Protocol):
    """An LM over the prefixes of a search, by node number."""

    def complete(self, nodes: np.ndarray) -> np.ndarray:
        """The beginning of each prefix that the LM can score: nodes (M,)."""

    def words(self, nodes: np.ndarray) -> np.ndarray:
        """Complete words of the prefixes (M,)."""

    def scores(self, nodes: np.ndarray) -> np.ndarray:
        """log P of what :meth:`complete` returned (M,)."""

    def ends(self, nodes: np.ndarray) -> np.ndarray:
        """log P of whole prefixes, with the end of the sentence if that is scored (M,)."""


class LabelPrefixes:
    """The search's external LM, in the ASR vocabulary.

    Args:
        tree: With the external LM.
        spelling: Says what a word is; None: every label.
        whole_words: Score complete words only.
        end: Score the end of the sentence.
    """

    def __init__(
        self,
        tree: PrefixTree,
        spelling: Optional[Spelling] = None,
        whole_words: bool = False,
        end: bool = True,
    ):
        self._tree, self._end, self._whole_words = tree, end, whole_words
        self._words = None if spelling is None else WordEnds(tree, spelling)

    def complete(self, nodes: np.ndarray) -> np.ndarray:
        return self._words.complete(nodes) if self._whole_words else nodes

    def words(self, nodes: np.ndarray) -> np.ndarray:
        return self._tree.depth(nodes) if self._words is None else self._words.number(nodes)

    def scores(self, nodes: np.ndarray) -> np.ndarray:
        return self._tree.external_sums(nodes)

    def ends(self, nodes: np.ndarray) -> np.ndarray:
        scores = self._tree.external_sums(nodes)
        return scores + self._tree.external_ends(nodes) if self._end else scores


class WordPrefixes:
    """An LLM with its own vocabulary: words are complete where the next one begins.

    Args:
        tree: Of the search.
        spelling: Of its labels.
        lm: The LLM.
    """

    def __init__(self, tree: PrefixTree, spelling: Spelling, lm: "WordLM"):
        self._tree, self._lm = tree, lm
        self._ends = WordEnds(tree, spelling)
        self._texts: dict[int, Text] = {ROOT: lm.start()}  # of complete beginnings
        tree.followers.append(self)

    def complete(self, nodes: np.ndarray) -> np.ndarray:
        return self._ends.complete(nodes)

    def words(self, nodes: np.ndarray) -> np.ndarray:
        return self._ends.number(nodes)

    def scores(self, nodes: np.ndarray) -> np.ndarray:
        distinct, inverse = np.unique(nodes, return_inverse=True)
        return self._lm.scores([self._text(node) for node in distinct.tolist()])[inverse]

    def ends(self, nodes: np.ndarray) -> np.ndarray:
        distinct, inverse = np.unique(nodes, return_inverse=True)
        texts = []
        for node, complete in zip(distinct.tolist(), self.complete(distinct).tolist()):
            last = self._ends.text(complete, node)
            texts.append(self._lm.extend(self._text(complete), last))
        return self._lm.ends(texts)[inverse]

    def _text(self, node: int) -> "Text":
        path = []
        while node not in self._texts:
            path.append(node)
            node = self._ends.before(node)
        for longer in reversed(path):
            word = self._ends.text(node, longer)
            self._texts[longer] = self._lm.extend(self._texts[node], word)
            node = longer
        return self._texts[node]

    @property
    def bytes_per_prefix(self) -> int:
        """The LLM's keys and values, shared among the prefixes there are."""
        return self._lm.nbytes // len(self._tree)

    def forget(self, nodes: list[int]) -> None:
        """See :class:`PrefixTree`."""
        for node in nodes:
            self._texts.pop(node, None)


class Weights(NamedTuple):
    """What is weighed beside the labels, of each row (R,)."""

    lm: np.ndarray
    stand_in: np.ndarray  # of the search's LM, which is replaced
    prior: np.ndarray
    internal: np.ndarray  # below zero: the internal LM's, subtracted
    bonus: np.ndarray

    @classmethod
    def of(cls, scales: Sequence[Scales], at_once: Sequence[Scales], rows: int) -> "Weights":
        """Of G settings and what of each is there at once, repeated for R rows."""
        names = ("prior_weight", "beta", "label_bonus")
        late = [
            [s.lm_weight for s in scales],
            [now.lm_weight for now in at_once],
            *(
                [getattr(s, name) - getattr(now, name) for s, now in zip(scales, at_once)]
                for name in names
            ),
        ]
        return cls(*(np.tile(np.array(one, dtype=float), rows // len(scales)) for one in late))

    def rows(self, which: np.ndarray) -> "Weights":
        """Some of the rows."""
        return Weights(*(weight[which] for weight in self))


class Fusion:
    """Label-wise fusion: what comes at the end of the utterance.

    Args:
        prior: Subtracted with ``prior_weight``.
        end: Score the end of the sentence.
    """

    delayed = False

    def __init__(self, prior: Optional["Prior"] = None, end: bool = True):
        self.prior = prior
        self.end = end

    @property
    def prior_of_labels(self) -> Optional[np.ndarray]:
        """The log prior of tokens (V,) where it belongs to labels, not to frames."""
        if self.prior is None or self.prior.mode != "label":
            return None
        return self.prior.log_prior.double().cpu().numpy()

    def start(self, tree: PrefixTree) -> None:
        """Prepare the prefixes of a search."""
        log_prior = self.prior_of_labels
        if log_prior is not None and tree.prior_sums is None:
            tree.prior_sums = tree.sums(lambda parents, labels: log_prior[labels + 1])

    def at_once(self, scales: Scales) -> Scales:
        """Those of the labels, where they are emitted."""
        return scales

    def weights(self, scales: Sequence[Scales], rows: int) -> Weights:
        """What comes later, of G settings, repeated for R rows."""
        return Weights.of(scales, [self.at_once(s) for s in scales], rows)

    def final(self, tree: PrefixTree, beam: Beam, scales: Sequence[Scales]) -> np.ndarray:
        """What is added to the scores of a beam if no frame comes any more (R, N)."""
        added = np.zeros_like(beam.score)
        weights = self.weights(scales, len(added))
        row, place = np.nonzero((beam.node >= 0) & (weights.lm != 0)[:, None])
        if self.end and len(row):
            added[row, place] = weights.lm[row] * tree.external_ends(beam.node[row, place])
        return added

    def parts(self, tree: PrefixTree, node: int, scales: Scales) -> tuple[float, float]:
        """Weighted scores of the external LM and the prior of a whole hypothesis."""
        external = prior = 0.0
        at = np.array([node])
        if scales.lm_weight:
            external = scales.lm_weight * float(self.lm_scores(tree, at)[0])
        if scales.prior_weight:
            prior = -scales.prior_weight * float(self.prior_scores(tree, at)[0])
        return external, prior

    def lm_scores(self, tree: PrefixTree, nodes: np.ndarray) -> np.ndarray:
        """log P of whole hypotheses (M,), not weighted."""
        scores = tree.external_sums(nodes)
        return scores + tree.external_ends(nodes) if self.end else scores

    def prior_scores(self, tree: PrefixTree, nodes: np.ndarray) -> np.ndarray:
        """Log prior of the labels of whole hypotheses (M,), not weighted."""
        if tree.prior_sums is None:
            return np.zeros(len(nodes))
        return tree.prior_sums(nodes)


class DelayedFusion(Fusion):
    """Delayed fusion.

    Policies, looked at after the pruning of every frame:

    ``never``: the LM ranks the hypotheses that are left at the end (rescoring of the n-best list).
    ``every_n_frames``: after every ``interval`` encoder frames.
    ``shortest``: when the hypothesis with the fewest complete words has more of them than at the
    last time.
    ``every_word``: as soon as a hypothesis has completed a word.

    Then, and only then, the LM runs for what is new in the hypotheses that are alive, those of all
    utterances in one batch. At the end of the utterance it runs for the rest and the end of the
    sentence.

    Args:
        prefixes: Makes the LM's side of a search's prefixes.
        policy: One of ``POLICIES``.
        interval: Frames, of ``every_n_frames``.
        prior: Of labels; with ``stand_in`` of frames, too.
        llm: What ``prefixes`` asks, if it is no LM of the search; kept for its counters.
        stand_in: The search has another LM, which stands in where ``llm`` has not scored yet.

    Raises:
        UserError: No such policy, no interval, or a prior of frames.
    """

    delayed = True

    def __init__(
        self,
        prefixes: Callable[[PrefixTree], Prefixes],
        policy: str = "every_n_frames",
        interval: int = 10,
        prior: Optional["Prior"] = None,
        llm: Optional["WordLM"] = None,
        stand_in: bool = False,
    ):
        if policy not in POLICIES:
            raise UserError(f"fusion policy {policy!r}: expected one of {', '.join(POLICIES)}")
        if interval < 1:
            raise UserError(f"fusion interval {interval}: at least 1 frame is needed")
        if prior is not None and prior.mode != "label" and not stand_in:
            raise UserError(
                f"a prior of mode {prior.mode!r} acts on every frame, so it cannot come together "
                "with a delayed LM: estimate a prior of mode label"
            )
        super().__init__(prior)
        self._make, self.policy, self.interval = prefixes, policy, interval
        self.llm, self.stand_in = llm, stand_in

    def at_once(self, scales: Scales) -> Scales:
        return scales if self.stand_in else without_late(scales)

    def start(self, tree: PrefixTree) -> None:
        super().start(tree)
        if tree.late is None:
            tree.late = self._make(tree)

    @torch.inference_mode()
    def after_frame(
        self,
        tree: PrefixTree,
        node: np.ndarray,
        late: np.ndarray,
        frames: np.ndarray,
        fused: np.ndarray,
        weights: Weights,
    ) -> Optional[np.ndarray]:
        """What the policy adds to the hypotheses of some rows after a frame.

        Args:
            tree: Of the prefixes.
            node: Hypotheses (R, N), -1 where there is none.
            late: What has been added to each so far (R, N).
            frames: Frames searched so far, this one included (R,).
            fused: Complete words of the shortest hypothesis at the last time (R,); changed.
            weights: Of the rows.

        Returns:
            (R, N), or None if there is nothing to add.
        """
        due = self._due(tree, node, frames, fused) & self._wanted(weights)
        if not due.any():
            return None
        row, place = np.nonzero((node >= 0) & due[:, None])
        added = np.zeros(node.shape)
        complete = tree.late.complete(node[row, place])
        now = self._weighted(tree, complete, weights.rows(row), tree.late.scores)
        added[row, place] = now - late[row, place]
        return added

    def _due(
        self, tree: PrefixTree, node: np.ndarray, frames: np.ndarray, fused: np.ndarray
    ) -> np.ndarray:
        if self.policy == "never":
            return np.zeros(len(node), dtype=bool)
        if self.policy == "every_n_frames":
            return frames % self.interval == 0
        if self.policy == "every_word":  # the prefixes know which words are complete and new
            return np.ones(len(node), dtype=bool)
        words = tree.late.words(np.maximum(node, ROOT).ravel()).reshape(node.shape)
        shortest = np.where(node >= 0, words, np.iinfo(words.dtype).max).min(axis=1)
        grown = shortest > fused
        fused[grown] = shortest[grown]
        return grown

    @staticmethod
    def _wanted(weights: Weights) -> np.ndarray:
        return np.logical_or.reduce([weight != 0 for weight in weights])

    def _weighted(
        self,
        tree: PrefixTree,
        nodes: np.ndarray,
        weights: Weights,
        lm: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """LM, less its stand-in, prior, internal LM and bonus of M prefixes, weights (M,)."""
        total = weights.bonus * tree.depth(nodes)
        some = weights.lm != 0
        if some.any():
            total[some] += weights.lm[some] * lm(nodes[some])
        some = weights.stand_in != 0
        if some.any():
            total[some] -= weights.stand_in[some] * tree.external_sums(nodes[some])
        some = weights.prior != 0
        if some.any() and tree.prior_sums is not None:
            total[some] -= weights.prior[some] * tree.prior_sums(nodes[some])
        some = weights.internal != 0
        if some.any():
            total[some] += weights.internal[some] * tree.lm_sums(nodes[some])
        return total

    def final(self, tree: PrefixTree, beam: Beam, scales: Sequence[Scales]) -> np.ndarray:
        added = np.zeros_like(beam.score)
        weights = self.weights(scales, len(added))
        row, place = np.nonzero((beam.node >= 0) & self._wanted(weights)[:, None])
        if len(row):
            nodes = beam.node[row, place]
            now = self._weighted(tree, nodes, weights.rows(row), tree.late.ends)
            added[row, place] = now - beam.late[row, place]
        return added

    def lm_scores(self, tree: PrefixTree, nodes: np.ndarray) -> np.ndarray:
        return tree.late.ends(nodes)
