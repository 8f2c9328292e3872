"""The next frames of a batch in a CTC prefix search.

B utterances, R rows (a row is a scale setting of an utterance), N hypotheses of a row, L labels
(label = token id - 1), T frames.
"""

from typing import TYPE_CHECKING, Optional

import numpy as np

from espnet_llm_plugin.fusion.ctc_beam import CTCBeam, Endings, keys
from espnet_llm_plugin.transducer.beam import Extensions, kth_best
from espnet_llm_plugin.transducer.search_state import RowScales, SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.ctc_search import CTCSearch


class CTCChunk:
    """The frames of a chunk.

    Args:
        search: Whose options count.
        state: At the first frame; changed.
        log_probs: Of blank and labels (B, T, L+1).
        count: Frames of each utterance (B,).
    """

    def __init__(
        self, search: "CTCSearch", state: SearchState, log_probs: np.ndarray, count: np.ndarray
    ):
        self._search, self.state, self.log_probs, self.count = search, state, log_probs, count
        self.fusion, self.combine, self.size = search.fusion, search.combine, search.beam_size
        self.tree = state.tree
        at_once = [self.fusion.at_once(scales) for scales in state.scales]
        self.scales = RowScales(at_once, len(count))
        self.weights = self.fusion.weights(state.scales, len(self.scales.utterance))
        # log prior of labels (L,), and of blank and labels at every frame (L+1,)
        self.label_prior: Optional[np.ndarray] = None
        self.frame_prior: Optional[np.ndarray] = None
        if self.fusion.prior is not None and self.scales.prior_weight.any():
            if self.fusion.prior_of_labels is not None:
                self.label_prior = self.fusion.prior_of_labels[1:-1]
            else:
                self.frame_prior = self.fusion.prior.log_prior[:-1].double().cpu().numpy()
        # The best label of each frame (B, T): most frames need no other number.
        self.best_label: Optional[np.ndarray] = None
        if self.label_prior is None and self.frame_prior is None:
            self.best_label = log_probs[:, :, 1:].max(axis=2)

    def search(self) -> None:
        state = self.state
        last = self.count[self.scales.utterance]
        rows = np.arange(len(last))
        in_blank, in_label = state.extra
        beam = CTCBeam(state.beam.node, in_blank, in_label, state.beam.late, self.tree)
        finished: list[tuple[np.ndarray, CTCBeam]] = []
        for t in range(int(last.max(initial=0))):
            if (last[rows] <= t).any():  # rows whose utterance has ended are set aside
                ended = last[rows] <= t
                finished.append((rows[ended], beam.rows(ended)))
                rows, beam = rows[~ended], beam.rows(~ended)
            beam = self._frame(t, rows, beam)
            if self.tree.max_bytes is not None:
                live = [beam.node, *(done.node for _, done in finished)]
                self.tree.release(np.concatenate([node.ravel() for node in live]))
        beam = CTCBeam.joined([*finished, (rows, beam)])
        state.beam = beam.as_beam(self.combine)
        state.extra = (beam.in_blank, beam.in_label)

    def _frame(self, t: int, rows: np.ndarray, beam: CTCBeam) -> CTCBeam:
        scales, combine, size = self.scales, self.combine, self.size
        at = self.state.frame[scales.utterance[rows]] + t
        either = beam.in_blank.join(beam.in_label, combine)

        # 1. No new label: a blank, or the last label repeated (there is none in the empty prefix).
        blank = self._log_probs(rows, t, np.zeros_like(rows)) * scales.blank_scale[rows]
        repeated = self._log_probs(rows[:, None], t, beam.last + 1)
        repeated = np.where(beam.last >= 0, repeated, -np.inf)
        in_blank, in_label = either.plus(blank[:, None]), beam.in_label.plus(repeated)

        # 2. Labels that lead to another live prefix: its probability grows.
        if len(beam.pairs):
            self._flow(t, rows, beam, either, in_label, at)
        score = combine(in_blank.score, in_label.score)

        # 3. The best new prefixes that stand up to the old ones; only for these the LM runs.
        found = self._extensions(t, rows, beam, either, kth_best(score, size))
        if found is None:
            beam.in_blank, beam.in_label = in_blank, in_label
        else:
            beam = self._grown(beam, either, in_blank, in_label, score, found, at)

        # 4. Delayed fusion.
        if self.fusion.delayed:
            fused = self.state.fused[rows]
            added = self.fusion.after_frame(
                self.tree, beam.node, beam.late, at + 1, fused, self.weights.rows(rows)
            )
            self.state.fused[rows] = fused
            if added is not None:
                beam.in_blank, beam.in_label = beam.in_blank.plus(added), beam.in_label.plus(added)
                beam.late = beam.late + added
        return beam

    def _log_probs(self, rows: np.ndarray, t: int, tokens: np.ndarray) -> np.ndarray:
        """log P of tokens (any shape) in rows (a shape that fits), without a prior of frames."""
        found = self.log_probs[self.scales.utterance[rows], t, tokens]
        if self.frame_prior is None:
            return found
        return found - self.scales.prior_weight[rows] * self.frame_prior[tokens]

    def _flow(
        self,
        t: int,
        rows: np.ndarray,
        beam: CTCBeam,
        either: Endings,
        in_label: Endings,
        at: np.ndarray,
    ) -> None:
        """Add what flows from live prefixes into live prefixes to ``in_label``."""
        pairs = beam.pairs
        row, child, parent = pairs.row, pairs.child, pairs.parent
        added = self._log_probs(rows[row], t, pairs.label + 1) + self.scales.bonus[rows[row]]
        if self.label_prior is not None:
            added -= self.scales.prior_weight[rows[row]] * self.label_prior[pairs.label]
        if self.scales.uses_external:
            added += self.scales.lm_weight[rows[row]] * pairs.steps(self.tree, beam.node)
        if self.fusion.delayed:
            added += beam.late[row, child] - beam.late[row, parent]
        source = (row, parent)
        score, viterbi, path = (
            np.where(pairs.itself, one[source], any_[source])
            for one, any_ in zip(vars(beam.in_blank).values(), vars(either).values())
        )
        into = (row, child)  # a child has one parent: no place occurs twice
        in_label.score[into] = self.combine(in_label.score[into], score + added)
        better = viterbi + added > in_label.viterbi[into]
        if better.any():
            into = (row[better], child[better])
            in_label.viterbi[into] = (viterbi + added)[better]
            in_label.path = in_label.path.copy()
            in_label.path[into] = self.state.emissions.add(path[better], at[row[better]])

    def _labels(self, rows: np.ndarray, t: int) -> np.ndarray:
        """What every label adds to a score in rows (R,) where it is emitted, LM aside (R, L)."""
        scales = self.scales
        labels = self.log_probs[scales.utterance[rows], t, 1:]
        if self.frame_prior is not None:
            labels = labels - scales.prior_weight[rows, None] * self.frame_prior[1:]
        if self.label_prior is not None:
            labels = labels - scales.prior_weight[rows, None] * self.label_prior
        if scales.bonus.any():
            labels = labels + scales.bonus[rows, None]
        return labels

    def _extensions(
        self, t: int, rows: np.ndarray, beam: CTCBeam, either: Endings, cut: np.ndarray
    ) -> Optional[Extensions]:
        """The best new prefixes of each row that are not below ``cut`` (R,)."""
        scales, num_labels = self.scales, self.tree.num_labels
        # 1. Labels that reach the beam from the best hypothesis; an LM can only take from them.
        negative = scales.lm_weight[rows] < 0
        if negative.any():
            cut = np.where(negative, -np.inf, cut)
        bound = cut - either.score.max(axis=1)
        hopeful = np.arange(len(rows))
        if self.best_label is not None:
            best = self.best_label[scales.utterance[rows], t] + scales.bonus[rows]
            hopeful = np.nonzero(best >= bound)[0]
            if not len(hopeful):
                return None
        labels, bound = self._labels(rows[hopeful], t), bound[hopeful]
        # Without an LM the order of the labels is the same after every hypothesis: a new prefix
        # beside the 2 N best has N better ones (a label may repeat the last one, and N - 1 may
        # lead to prefixes that are there).
        limit = num_labels if scales.uses_external else 2 * self.size
        limit = min(limit, self._search.top_labels or limit)
        reaches = labels >= bound[:, None]
        if limit < num_labels and np.count_nonzero(reaches, axis=1).max() > limit:
            reaches &= labels >= kth_best(labels, limit)[:, None]
        which, label = np.nonzero(reaches)

        # 2. With each hypothesis; after its own last label it needs a blank between.
        row, added = hopeful[which], labels[which, label].astype(np.float64)
        itself = label[:, None] == beam.last[row]
        total = np.where(itself, beam.in_blank.score[row], either.score[row]) + added[:, None]
        entry, place = np.nonzero((total >= cut[row, None]) & (total > -np.inf))
        row, label, added, total = row[entry], label[entry], added[entry], total[entry, place]
        if len(beam.pairs) and len(row):
            new = keys(row, place, label, beam.node.shape[1], num_labels)
            at = np.searchsorted(beam.pairs.keys, new)
            at[at == len(beam.pairs)] = 0
            fits = beam.pairs.keys[at] != new
            row, place, label = row[fits], place[fits], label[fits]
            added, total = added[fits], total[fits]
        if not len(row):
            return None

        # 3. The LM.
        if scales.uses_external:
            nodes = beam.node[row, place]
            self.tree.need_external(np.unique(nodes))
            lm = scales.lm_weight[rows[row]] * self.tree.external_steps(nodes, label)
            added, total = added + lm, total + lm
            fits = total >= cut[row]
            row, place, label = row[fits], place[fits], label[fits]
            added, total = added[fits], total[fits]
            if not len(row):
                return None
        return Extensions.best(len(rows), self.size, row, place, label, total, added)

    def _grown(
        self,
        beam: CTCBeam,
        either: Endings,
        in_blank: Endings,
        in_label: Endings,
        score: np.ndarray,
        found: Extensions,
        at: np.ndarray,
    ) -> CTCBeam:
        """The best of the old prefixes after the frame and the new ones."""
        width = beam.node.shape[1]
        pool = np.concatenate([score, found.score], axis=1)
        keep = np.argsort(-pool, axis=1, kind="stable")[:, : self.size]
        row, column = np.nonzero((keep >= width) & (np.take_along_axis(pool, keep, 1) > -np.inf))
        if not len(row):
            beam.in_blank, beam.in_label = in_blank, in_label
            return beam
        number = keep[row, column] - width
        place, label, added = (
            array[row, number] for array in (found.place, found.label, found.added)
        )
        # 1. Old ones.
        everything = np.arange(len(keep))[:, None]
        old = np.where(keep < width, keep, 0)
        gone = keep >= width
        node = np.where(gone, -1, beam.node[everything, old])
        late = np.where(gone, 0.0, beam.late[everything, old])
        in_blank, in_label = in_blank.take(everything, old), in_label.take(everything, old)
        for endings in (in_blank, in_label):
            endings.score[gone] = endings.viterbi[gone] = -np.inf
        # 2. New ones, whose alignments all end in their last label.
        itself = label == beam.last[row, place]
        score_, viterbi, path = (
            np.where(itself, one[row, place], any_[row, place])
            for one, any_ in zip(vars(beam.in_blank).values(), vars(either).values())
        )
        node[row, column] = self.tree.children(beam.node[row, place], label)
        late[row, column] = beam.late[row, place]
        in_label.score[row, column] = score_ + added
        in_label.viterbi[row, column] = viterbi + added
        in_label.path[row, column] = self.state.emissions.add(path, at[row])
        most = int((node >= 0).sum(axis=1).max())
        some = np.arange(most)[None]
        if most < node.shape[1]:
            node, late = node[:, :most], late[:, :most]
            in_blank = in_blank.take(everything, some)
            in_label = in_label.take(everything, some)
        return CTCBeam(node, in_blank, in_label, late, self.tree)
