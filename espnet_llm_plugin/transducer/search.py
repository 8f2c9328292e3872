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
    PrefixRows,
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
        max_prefixes: Optional[int] = None,
    ):
        self.scorer = scorer
        self.beam_size = beam_size
        self.max_symbols_per_frame = max_symbols_per_frame
        self.external_lm = external_lm
        self.forbidden_labels = tuple(forbidden_labels)
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
            best = check_scores(labels.amax(dim=2).double().cpu().numpy(), state.frame)
            found = survive = None
            if self._may_survive(ended, level.score + best):
                found = best_extensions(level.score, labels, self.beam_size)
                survive = self._survivors(ended, found)
            if symbols == 0:
                add_pruned_mass(level, ended, found, survive, blank, labels, state)
            if survive is None or not survive.any():
                break
            # 3. Their prefixes, computed if new: the only place where predictor and LM run.
            level = extend_beam(level, found, survive, lm, state, state.frame)
        return ended if symbols == 0 else ended.best(self.beam_size)

    def _may_survive(self, ended: Beam, extended: np.ndarray) -> bool:
        """False if no extension (their best scores: (G, N)) can; true of most blank frames."""
        if ended.score.shape[1] < self.beam_size:
            return True
        if ended.score.shape[1] == self.beam_size:
            last = ended.score.min(axis=1)
        else:
            last = np.partition(ended.score, -self.beam_size, axis=1)[:, -self.beam_size]
        return bool((extended.max(axis=1) >= last).any())

    def _survivors(self, ended: Beam, found: Extensions) -> np.ndarray:
        """Which extensions (G, K) go on. With a beam of one they take the place of the blank."""
        pool = np.concatenate([ended.score, found.score], axis=1)
        cut = -np.inf
        if pool.shape[1] > self.beam_size:
            kth = pool.shape[1] - self.beam_size
            cut = np.partition(pool, kth, axis=1)[:, kth, None]
        survive = (found.score >= cut) & (found.score > -np.inf)
        if self.beam_size == 1:
            survive &= found.score > ended.score.max(axis=1, keepdims=True)
            ended.drop(np.broadcast_to(survive.any(axis=1)[:, None], ended.node.shape))
        return survive

    def _scores(
        self,
        t: int,
        node: np.ndarray,
        tree: PrefixTree,
        scaled: ScaledScores,
        groups: list[tuple[Optional[float], np.ndarray]],
    ) -> tuple[np.ndarray, torch.Tensor, Optional[PrefixRows]]:
        """Blank (G, N), total of every label (G, N, L), predictor's LM or None."""
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
            total = scaled.total(labels, lm, external, rows, torch.from_numpy(index))
            blank = blank.double().cpu().numpy()[index]
            parts.append((blank, total, None if lm is None else PrefixRows(lm, index)))
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([rows for _, rows in groups]))
        blank = np.concatenate([part[0] for part in parts])[order]
        total = torch.cat([part[1] for part in parts])[torch.from_numpy(order)]
        lm = None if parts[0][2] is None else PrefixRows.join([part[2] for part in parts], order)
        return blank, total, lm


def add_pruned_mass(
    level: Beam,
    ended: Beam,
    found: Optional[Extensions],
    survive: Optional[np.ndarray],
    blank: np.ndarray,
    labels: torch.Tensor,
    state: SearchState,
) -> None:
    """Let pruned extensions flow into hypotheses that are live anyway.

    An extension that did not survive may have the label sequence of another live hypothesis, whose
    blank at this frame is known: its probability is added without further scoring. (Measured on
    random peaky models: a beam of 8 loses 0.2 nats without it.)

    Args:
        level: Hypotheses at the start of the frame (G, N), the beam of ``state``.
        ended: The same ones after a blank (G, N); changed in place.
        found, survive: The best extensions of ``level`` (G, K), and which ones go on; None if
            none does.
        blank: Blank log-probs (G, N).
        labels: Label scores (G, N, L).
        state: Gets the emissions.
    """
    pairs = state.live_pairs()
    if not len(pairs):
        return
    g, child, parent, label = pairs.setting, pairs.child, pairs.parent, pairs.label
    if survive is not None and survive.any():
        goes_on = (
            survive[g] & (found.place[g] == parent[:, None]) & (found.label[g] == label[:, None])
        ).any(axis=1)
        g, child, parent, label = (x[~goes_on] for x in (g, child, parent, label))
    at = tuple(torch.from_numpy(array) for array in (g, parent, label))
    added = labels[at].double().cpu().numpy() + blank[g, child]
    ended.score[g, child] = np.logaddexp(ended.score[g, child], level.score[g, parent] + added)
    viterbi = level.viterbi[g, parent] + added
    better = viterbi > ended.viterbi[g, child]
    if better.any():
        g, child, parent = g[better], child[better], parent[better]
        ended.viterbi[g, child] = viterbi[better]
        ended.path[g, child] = state.emit(level.path[g, parent], state.frame)


def sorted_set(alphas: Sequence[Optional[float]]) -> list[Optional[float]]:
    """Distinct values in their first order."""
    return list(dict.fromkeys(alphas))
