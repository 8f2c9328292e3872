"""Time-synchronous beam search for transducers, prefixes merged, one predictor call per prefix.

G scale settings searched side by side (1 when decoding, many when tuning), N hypotheses of a
setting (at most the beam size), M distinct prefixes among the settings, L labels, T frames,
D encoder size, S labels a frame at most.

Score of a label: ``log P(label) + beta * lm + lm_weight * external_lm + label_bonus`` where
``log P(label)`` already contains ``alpha``; of a blank: ``log P(blank)``. Hypotheses with one label
sequence are one hypothesis, whose score is the log of the sum over its alignments.
"""

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.transducer.beam import (
    Beam,
    Extensions,
    Hypothesis,
    ScaledScores,
    Scales,
    SearchState,
    best_extensions,
    check_scores,
    extend_beam,
)
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.external_lm import ExternalLM
    from espnet_llm_plugin.transducer.scorer import TransducerScorer


class TransducerSearch:
    """Beam search over the encoder frames of one utterance at a time.

    In a frame every hypothesis may end the frame by a blank, or emit a label and go on in the same
    frame, S labels at most. An extended hypothesis survives if it is among the ``beam_size`` best
    of (hypotheses that have ended the frame, extended ones); only then is the predictor run for
    it. With ``beam_size`` 1 a label that beats the blank replaces it, which is greedy search.

    Args:
        scorer: ``FactorizedScorer``, ``RNNTScorer`` or another ``TransducerScorer``.
        beam_size: Hypotheses kept after a frame.
        max_symbols_per_frame: S.
        external_lm: See :class:`~espnet_llm_plugin.fusion.external_lm.ExternalLM`.
        forbidden_labels: Labels never emitted (``<sos/eos>`` of an RNN-T).
        prune_threshold: A label this much (nats) worse than the best hypothesis of its frame is
            not tried.
        max_prefixes: See :class:`PrefixTree`.
    """

    def __init__(
        self,
        scorer: "TransducerScorer",
        *,
        beam_size: int = 8,
        max_symbols_per_frame: int = 3,
        external_lm: Optional["ExternalLM"] = None,
        forbidden_labels: Sequence[int] = (),
        prune_threshold: float = float("inf"),
        max_prefixes: Optional[int] = None,
    ):
        self.scorer = scorer
        self.beam_size = beam_size
        self.max_symbols_per_frame = max_symbols_per_frame
        self.external_lm = external_lm
        self.forbidden_labels = tuple(forbidden_labels)
        self.prune_threshold = prune_threshold
        self.max_prefixes = max_prefixes

    def __call__(
        self,
        encoder_out: torch.Tensor,
        scales: Optional[Scales] = None,
        nbest: int = 1,
        normalize_length: bool = False,
    ) -> list[Hypothesis]:
        """Search a whole utterance (T, D): at most ``nbest`` hypotheses, best first."""
        state = self.start([scales or Scales()])
        return self.step(state, encoder_out).nbest(nbest, normalize_length)[0]

    @torch.inference_mode()
    def start(self, scales: Sequence[Scales], tree: Optional[PrefixTree] = None) -> SearchState:
        """State before the first frame.

        Args:
            scales: G settings, searched side by side with common prefixes.
            tree: Prefixes of an earlier search of the same utterance, to be reused.
        """
        if tree is None:
            tree = PrefixTree(
                self.scorer, external_lm=self.external_lm, max_prefixes=self.max_prefixes
            )
        return SearchState(tree, tuple(scales), Beam.start(len(scales)))

    @torch.inference_mode()
    def step(self, state: SearchState, encoder_out: torch.Tensor) -> SearchState:
        """Search the next chunk (T, D); chunks one after another equal all frames at once."""
        self.scorer.begin(encoder_out)
        scaled = ScaledScores(state.scales, self.forbidden_labels)
        alphas = [s.alpha for s in state.scales]
        groups = [
            (a, np.array([g for g, b in enumerate(alphas) if b == a])) for a in sorted_set(alphas)
        ]
        state = SearchState(**vars(state))
        for t in range(encoder_out.size(0)):
            state.beam = self._frame(t, state, scaled, groups)
            state.frame += 1
            state.tree.release(state.beam.node)
        return state

    def _frame(self, t: int, state: SearchState, scaled: ScaledScores, groups: list) -> Beam:
        level, ended = state.beam, None
        for symbols in range(self.max_symbols_per_frame + 1):
            # 1. What every hypothesis can do at this frame. Those that stop here emit a blank.
            blank, labels, lm = self._scores(t, level.node, state.tree, scaled, groups)
            stopped = level.plus(check_scores(blank, state.frame))
            ended = stopped if ended is None else ended.merge(stopped)
            if symbols == self.max_symbols_per_frame:
                break
            # 2. The extensions that stand up to what has ended already.
            found = best_extensions(level.score, labels, self.beam_size)
            check_scores(found.score, state.frame)
            survive = self._survivors(ended, found)
            if symbols == 0:
                add_pruned_mass(level, ended, found, survive, blank, labels, state)
            if not survive.any():
                break
            # 3. Their prefixes, computed if new: the only place where predictor and LM run.
            level = extend_beam(level, found, survive, lm, state, state.frame)
        return ended if symbols == 0 else ended.best(self.beam_size)

    def _survivors(self, ended: Beam, found: Extensions) -> np.ndarray:
        """Which extensions (G, K) go on. With a beam of one they take the place of the blank."""
        pool = np.concatenate([ended.score, found.score], axis=1)
        cut = -np.inf
        if pool.shape[1] > self.beam_size:
            kth = pool.shape[1] - self.beam_size
            cut = np.partition(pool, kth, axis=1)[:, kth, None]
        if self.prune_threshold < np.inf:
            cut = np.maximum(cut, pool.max(axis=1, keepdims=True) - self.prune_threshold)
        survive = (found.score >= cut) & (found.score > -np.inf)
        if self.beam_size == 1:
            survive &= found.score > ended.score.max(axis=1, keepdims=True)
            greedy = survive.any(axis=1)
            ended.node[greedy], ended.score[greedy] = -1, -np.inf
        return survive

    def _scores(
        self,
        t: int,
        node: np.ndarray,
        tree: PrefixTree,
        scaled: ScaledScores,
        groups: list[tuple[Optional[float], np.ndarray]],
    ) -> tuple[np.ndarray, torch.Tensor, Optional[torch.Tensor]]:
        """Blank (G, N), total of every label (G, N, L), predictor's LM (G, N, L) or None."""
        parts = []
        for alpha, rows in groups:
            if alpha is not None:
                self.scorer.alpha = alpha
            if scaled.num_settings == 1:
                nodes, index = node[0], np.arange(node.shape[1])[None]
            else:
                # Settings share most prefixes: score each once.
                nodes, index = np.unique(np.maximum(node[rows], ROOT), return_inverse=True)
                index = index.reshape(len(rows), -1)
            blank, labels, lm = self.scorer.scores(t, tree.data(nodes))
            if lm is not None:
                # Zero times -inf would be NaN; e^-10000 is zero all the same.
                lm = lm.clamp(min=-1e4)
            external = tree.external_rows(nodes) if scaled.uses_external else None
            at = torch.from_numpy(index)
            total = scaled.total(labels, lm, external, rows, at)
            parts.append(
                (blank.double().cpu().numpy()[index], total, None if lm is None else lm[at])
            )
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([rows for _, rows in groups]))
        blank = np.concatenate([p[0] for p in parts])[order]
        total = torch.cat([p[1] for p in parts])[torch.from_numpy(order)]
        lm = None
        if parts[0][2] is not None:
            lm = torch.cat([p[2] for p in parts])[torch.from_numpy(order)]
        return blank, total, lm


def add_pruned_mass(
    level: Beam,
    ended: Beam,
    found: Extensions,
    survive: np.ndarray,
    blank: np.ndarray,
    labels: torch.Tensor,
    state: SearchState,
) -> None:
    """Let pruned extensions flow into hypotheses that are live anyway.

    An extension by one label that did not survive may have the label sequence of another live
    hypothesis, whose blank at this frame is known: its probability is added without further
    scoring. (Measured on random peaky models: a beam of 8 loses 0.2 nats without it.)

    Args:
        level: Hypotheses at the start of the frame (G, N).
        ended: The same ones after a blank (G, N); changed in place.
        found, survive: The best extensions of ``level`` (G, K), and which ones go on.
        blank: Blank log-probs (G, N).
        labels: Label scores (G, N, L).
        state: Gets the emissions.
    """
    node = level.node
    pair = (state.tree.parent[node][:, :, None] == node[:, None, :]) & (node > ROOT)[:, :, None]
    if not pair.any():
        return
    g, child, parent = np.nonzero(pair)
    label = state.tree.label[node[g, child]]
    goes_on = (
        survive[g] & (found.place[g] == parent[:, None]) & (found.label[g] == label[:, None])
    ).any(axis=1)
    # A greedy label has emptied the place of its blank.
    use = ~goes_on & (ended.node[g, child] >= 0)
    g, child, parent, label = g[use], child[use], parent[use], label[use]
    at = (torch.from_numpy(g), torch.from_numpy(parent), torch.from_numpy(label))
    added = labels[at].double().cpu().numpy() + blank[g, child]
    score = level.score[g, parent] + added
    ended.score[g, child] = np.logaddexp(ended.score[g, child], score)
    viterbi = level.viterbi[g, parent] + added
    better = viterbi > ended.viterbi[g, child]
    g, child, parent = g[better], child[better], parent[better]
    ended.viterbi[g, child] = viterbi[better]
    ended.path[g, child] = state.emit(level.path[g, parent], state.frame)


def sorted_set(alphas: Sequence[Optional[float]]) -> list[Optional[float]]:
    """Distinct values in their first order."""
    return list(dict.fromkeys(alphas))
