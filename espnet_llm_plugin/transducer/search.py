"""Batched time-synchronous beam search for transducers: RNN-T and factorized.

B utterances, G scale settings of each (1 when decoding, many when tuning), R = B G rows,
N hypotheses of a row (at most the beam size), E live hypotheses of all rows, L labels, T frames,
D encoder size, S labels a frame at most.

Hypotheses with one label sequence are one hypothesis, whose score is the log of the sum over its
alignments. What costs most is done least: the blank is scored for every hypothesis and frame, the
labels only where one of them can still enter the beam, the networks only for prefixes whose labels
are scored, once each and in one batch.
"""

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.transducer.beam import (
    Beam,
    Extensions,
    LivePairs,
    check_scores,
    kth_best,
)
from espnet_llm_plugin.transducer.chunk import Chunk, numpy
from espnet_llm_plugin.transducer.frame_search import FrameSearch
from espnet_llm_plugin.transducer.greedy import greedy_step
from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.search_state import SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.delayed import Fusion
    from espnet_llm_plugin.fusion.external_lm import ExternalLM
    from espnet_llm_plugin.transducer.scorer import TransducerScorer

# An alignment this much less probable (natural log) than another changes no digit of their sum.
NEGLIGIBLE = 30.0


class TransducerSearch(FrameSearch):
    """Beam search over the encoder frames of a batch of utterances.

    In a frame every hypothesis may end the frame by a blank, or emit a label and go on in the same
    frame, S labels at most. An extended hypothesis survives if it is among the ``beam_size`` best
    of (hypotheses that have ended the frame, extended ones). With ``beam_size`` 1 a label that
    beats the blank replaces it: greedy search, in which utterances advance by themselves from
    label to label (label looping).

    The predictor's and the external LM's memory: one row of L numbers for each prefix that a live
    hypothesis reaches, and otherwise at most ``max_bytes`` in all.

    Args:
        scorer: ``FactorizedScorer``, ``RNNTScorer`` or another ``TransducerScorer``.
        beam_size: Hypotheses kept after a frame.
        max_symbols_per_frame: S.
        external_lm: See :class:`~espnet_llm_plugin.fusion.external_lm.ExternalLM`.
        forbidden_labels: Labels never emitted (``<sos/eos>`` of an RNN-T).
        max_bytes: See :class:`PrefixTree`.
        fusion: How the LM is combined with the search; default: label-wise, without the end of the
            sentence.
    """

    def __init__(
        self,
        scorer: "TransducerScorer",
        *,
        beam_size: int = 8,
        max_symbols_per_frame: int = 3,
        external_lm: Optional["ExternalLM"] = None,
        forbidden_labels: Sequence[int] = (),
        max_bytes: Optional[int] = None,
        fusion: Optional["Fusion"] = None,
    ):
        self.scorer = scorer
        self.num_labels = scorer.num_labels
        self.beam_size = beam_size
        self.max_symbols_per_frame = max_symbols_per_frame
        self.external_lm = external_lm
        self.forbidden_labels = tuple(forbidden_labels)
        self.max_bytes = max_bytes
        self.fusion = fusion

    @torch.inference_mode()
    def start(
        self, scales: Sequence[Scales], tree: Optional[PrefixTree] = None, utterances: int = 1
    ) -> SearchState:
        """See :class:`FrameSearch`."""
        if tree is None:
            tree = PrefixTree(
                self.scorer.prefixes(), self.scorer.num_labels, self.external_lm, self.max_bytes
            )
        if self.fusion is not None:
            self.fusion.start(tree)
        return SearchState.start(tree, scales, utterances, self.fusion)

    @torch.inference_mode()
    def step(
        self,
        state: SearchState,
        encoder_out: torch.Tensor,
        lengths: Optional[torch.Tensor] = None,
    ) -> SearchState:
        """See :class:`FrameSearch`."""
        if encoder_out.dim() == 2:
            encoder_out = encoder_out[None]
        state = state.copy()
        utterances, frames = encoder_out.shape[:2]
        count = np.full(utterances, frames) if lengths is None else lengths.cpu().numpy()
        chunk = Chunk(
            self.scorer,
            state,
            encoder_out,
            count,
            max_symbols_per_frame=self.max_symbols_per_frame,
            forbidden_labels=self.forbidden_labels,
        )
        if self.beam_size == 1:
            greedy_step(chunk)
        else:
            self._beam_step(chunk)
        state.frame += count
        return state

    def _beam_step(self, chunk: Chunk) -> None:
        state, last = chunk.state, chunk.count[chunk.scales.utterance]
        rows = np.arange(len(last))
        beam, finished = state.beam, []
        for t in range(int(last.max(initial=0))):
            if (last[rows] <= t).any():  # rows whose utterance has ended are set aside
                ended, active = last[rows] <= t, last[rows] > t
                finished.append((rows[ended], beam.rows(ended)))
                rows, beam = rows[active], beam.rows(active)
            if beam is not state.beam:
                state.beam = beam
            state.beam = beam = self._frame(t, rows, chunk)
            if self.fusion is not None and self.fusion.delayed:
                self._fuse(t, rows, chunk)
            if state.tree.max_bytes is not None:
                nodes = [beam.node, *(done.node for _, done in finished)]
                state.tree.release(np.concatenate([array.ravel() for array in nodes]))
        if finished:
            state.beam = Beam.join([*finished, (rows, beam)])

    def _fuse(self, t: int, rows: np.ndarray, chunk: Chunk) -> None:
        """Delayed scores of the live rows after a frame."""
        state, beam = chunk.state, chunk.state.beam
        fused = state.fused[rows]
        frames = chunk.emitted_at(rows, np.full(len(rows), t)) + 1
        weights = chunk.late_weights.rows(rows)
        added = self.fusion.after_frame(state.tree, beam.node, beam.late, frames, fused, weights)
        state.fused[rows] = fused
        if added is not None:
            beam.add_late(added)

    def _frame(self, t: int, rows: np.ndarray, chunk: Chunk) -> Beam:
        """One frame of the live rows, whose hypotheses are ``chunk.state.beam``."""
        state, scales = chunk.state, chunk.scales
        level, ended = state.beam, None
        at = chunk.emitted_at(rows, np.full(len(rows), t))
        for symbols in range(self.max_symbols_per_frame + 1):
            # 1. Every hypothesis may stop here by a blank.
            row, place = np.nonzero(level.node >= 0)
            node = level.node[row, place]
            cells = chunk.cells(rows[row], np.full(len(row), t), node)
            blank = np.zeros(level.node.shape)
            blank[row, place] = cells.blank
            stopped = level.plus_blank(check_scores(blank, at))
            ended = stopped if ended is None else ended.merge(stopped)
            if symbols == self.max_symbols_per_frame:
                break

            # 2. Labels are scored where the best one could stand up to what has ended already,
            #    or could flow into another live hypothesis.
            cut = kth_best(ended.score, self.beam_size)
            score = level.score[row, place]
            ceiling = score + cells.ceiling + scales.most_added[rows[row]]
            wanted = ceiling >= cut[row]
            pairs = None
            if symbols == 0 and len(state.live_pairs()):
                entry = np.zeros(level.node.shape, dtype=np.int64)
                entry[row, place] = np.arange(len(row))
                pairs = relevant_pairs(state.live_pairs(), ceiling, entry, ended, blank)
                wanted[entry[pairs.row, pairs.parent]] = True
            if not wanted.any():
                break
            index = np.nonzero(wanted)[0]
            # If networks must run, they run for all hypotheses of this level: most of those not
            # wanted yet will be wanted in the next frame, and a call costs more than a prefix.
            totals = chunk.totals(cells, index, rows[row[index]], node[index], together=node)
            best = check_scores(numpy(totals.amax(dim=1)), at[row[index]])

            # 3. The best of them, and those that survive.
            found = self._extensions(len(level.node), row, place, score, index, totals, best, cut)
            survive = self._survivors(ended, found)
            if pairs is not None and len(pairs):
                position = np.full(len(row), -1)
                position[index] = np.arange(len(index))
                where = position[entry[pairs.row, pairs.parent]]
                added = numpy(totals[torch.from_numpy(where), torch.from_numpy(pairs.label)])
                add_pruned_mass(level, ended, pairs, added, blank, found, survive, at, state)
            if not survive.any():
                break
            level = extend(level, found, survive, at, state)
        return ended if symbols == 0 else ended.best(self.beam_size)

    def _extensions(
        self,
        num_rows: int,
        row: np.ndarray,
        place: np.ndarray,
        score: np.ndarray,
        index: np.ndarray,
        totals: torch.Tensor,
        best: np.ndarray,
        cut: np.ndarray,
    ) -> Extensions:
        """The best extensions of each row, from label totals of the hypotheses ``index``."""
        # Only hypotheses whose best label reaches the beam are looked through.
        hopeful = np.nonzero((score[index] + best >= cut[row[index]]) & (best > -np.inf))[0]
        index = index[hopeful]
        if not len(index):
            empty = np.zeros((num_rows, 0))
            return Extensions(empty, empty, empty.astype(np.int64), empty.astype(np.int64))
        some = totals if len(hopeful) == len(totals) else totals[torch.from_numpy(hopeful)]
        top = some.topk(min(self.beam_size, some.size(1)), dim=1)
        added, label = numpy(top.values), top.indices.cpu().numpy()
        total = score[index, None] + added
        fits = (total >= cut[row[index], None]) & (added > -np.inf)
        which, _ = np.nonzero(fits)
        return Extensions.best(
            num_rows,
            self.beam_size,
            row[index][which],
            place[index][which],
            label[fits],
            total[fits],
            added[fits],
        )

    def _survivors(self, ended: Beam, found: Extensions) -> np.ndarray:
        """Which extensions (R, K) go on."""
        pool = np.concatenate([ended.score, found.score], axis=1)
        cut = kth_best(pool, self.beam_size)
        return (found.score >= cut[:, None]) & (found.score > -np.inf)


def relevant_pairs(
    pairs: LivePairs, ceiling: np.ndarray, entry: np.ndarray, ended: Beam, blank: np.ndarray
) -> LivePairs:
    """The pairs through which enough probability could flow to change a score.

    Args:
        pairs: Of the beam.
        ceiling: The most that a hypothesis can score after its best label (E).
        entry: Number of each hypothesis, in [0, E) (R, N).
        ended: The hypotheses after a blank (R, N).
        blank: Score of that blank (R, N).
    """
    row, child = pairs.row, pairs.child
    late = ended.late[row, child] - ended.late[row, pairs.parent]
    most = ceiling[entry[row, pairs.parent]] + blank[row, child] + late
    return pairs.only(most >= ended.score[row, child] - NEGLIGIBLE)


def add_pruned_mass(
    level: Beam,
    ended: Beam,
    pairs: LivePairs,
    added: np.ndarray,
    blank: np.ndarray,
    found: Extensions,
    survive: np.ndarray,
    at: np.ndarray,
    state: SearchState,
) -> None:
    """Let pruned extensions flow into hypotheses that are live anyway.

    An extension that did not survive may have the label sequence of another live hypothesis, whose
    blank at this frame is known: its probability is added without further scoring. (Measured on
    random peaky models: a beam of 8 loses 0.2 nats without it.)

    Args:
        level: Hypotheses at the start of the frame (R, N), the beam of ``state``.
        ended: The same ones after a blank (R, N); changed in place.
        pairs: Live hypotheses that are another one plus a label (P).
        added: Score of that label (P).
        blank: Blank scores (R, N).
        found, survive: The best extensions of ``level`` (R, K), and which ones go on.
        at: Frame numbers of the rows (R).
        state: Gets the emissions.
    """
    goes_on = (
        survive[pairs.row]
        & (found.place[pairs.row] == pairs.parent[:, None])
        & (found.label[pairs.row] == pairs.label[:, None])
    ).any(axis=1)
    added, pairs = added[~goes_on], pairs.only(~goes_on)
    row, child, parent = pairs.row, pairs.child, pairs.parent
    added = added + blank[row, child] + ended.late[row, child] - level.late[row, parent]
    # A child has one parent: no place occurs twice.
    flow = level.score[row, parent] + added
    ended.score[row, child] = np.logaddexp(ended.score[row, child], flow)
    viterbi = level.viterbi[row, parent] + added
    better = viterbi > ended.viterbi[row, child]
    if better.any():
        row, child, parent = row[better], child[better], parent[better]
        ended.viterbi[row, child] = viterbi[better]
        ended.blank[row, child] = level.blank[row, parent] + blank[row, child]
        ended.path[row, child] = state.emissions.add(level.path[row, parent], at[row])


def extend(
    level: Beam, found: Extensions, survive: np.ndarray, at: np.ndarray, state: SearchState
) -> Beam:
    """The hypotheses (R, at most K) that the surviving extensions make.

    Args:
        level: Hypotheses before the label (R, N).
        found, survive: Extensions of them (R, K), and which ones to make.
        at: Frame numbers of the rows (R).
        state: Gets the new prefixes and emissions.
    """
    row, _ = np.nonzero(survive)
    place, label, added = found.place[survive], found.label[survive], found.added[survive]
    column = (survive.cumsum(axis=1) - 1)[survive]
    new = Beam.empty(len(survive), int(column.max()) + 1)
    new.node[row, column] = state.tree.children(level.node[row, place], label)
    new.score[row, column] = found.score[survive]
    new.viterbi[row, column] = level.viterbi[row, place] + added
    new.blank[row, column] = level.blank[row, place]
    new.late[row, column] = level.late[row, place]
    new.path[row, column] = state.emissions.add(level.path[row, place], at[row])
    return new
