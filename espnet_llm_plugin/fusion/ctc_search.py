"""CTC prefix beam search, batched, with label-wise or delayed fusion of a language model.

B utterances, G scale settings of each (1 when decoding, many when tuning), R = B G rows (row =
utterance * G + setting), N hypotheses of a row, V tokens (blank 0, ``<sos/eos>`` V-1, never
emitted), L = V - 2 labels (label = token id - 1), T frames, D encoder size.

A frame costs what may change in it. Where no label can reach the beam, which is in most frames of a
trained model, only blank and repetitions are added to the scores; labels are looked at one by one
from the best that any hypothesis could still be, and the LM runs for prefixes after which a label
may survive. Nothing is lost by that: the hypotheses are those of the full search.
"""

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_beam import RECOMBINATIONS, CTCBeam, Endings, keys
from espnet_llm_plugin.fusion.delayed import Fusion, Weights
from espnet_llm_plugin.transducer.beam import Extensions, kth_best
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales, SearchError
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.search_state import RowScales, SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.external_lm import ExternalLM


class CTCSearch:
    """Time-synchronous prefix beam search over the CTC posteriors of a batch.

    The score of a label where it is emitted (not blank, and not the label of the frame before) is
    ``log P + lm_weight * external_lm - prior_weight * log prior + label_bonus``, and the end of the
    sentence adds ``lm_weight`` times its LM score. With ``beam_size`` 1, and without anything
    label-wise, the search is greedy CTC: the best path, repetitions and blanks removed, and
    ``total`` is that path's score.

    Args:
        ctc: ESPnet's ``CTC`` module.
        beam_size: Prefixes kept after a frame.
        external_lm: See :class:`~espnet_llm_plugin.fusion.external_lm.ExternalLM`.
        fusion: How LM and prior are combined with the search; default: label-wise.
        recombination: ``sum`` of the probabilities of a prefix's alignments, or ``max``.
        top_labels: Only so many of the most probable labels of a frame are looked at; default: all
            that matter.
        max_bytes: See :class:`~espnet_llm_plugin.transducer.prefix_tree.PrefixTree`.
    """

    takes_batches = True

    def __init__(
        self,
        ctc: torch.nn.Module,
        *,
        beam_size: int = 8,
        external_lm: Optional["ExternalLM"] = None,
        fusion: Optional[Fusion] = None,
        recombination: str = "sum",
        top_labels: Optional[int] = None,
        max_bytes: Optional[int] = None,
    ):
        if recombination not in RECOMBINATIONS:
            raise UserError(
                f"recombination {recombination!r}: expected {' or '.join(RECOMBINATIONS)}"
            )
        if top_labels is not None and top_labels < 1:
            raise UserError(f"{top_labels} labels of a frame: at least 1 is needed")
        self.ctc = ctc
        self.num_labels = ctc.ctc_lo.out_features - 2
        self.beam_size = beam_size
        self.external_lm = external_lm
        self.fusion = fusion or Fusion(end=external_lm is not None)
        self.combine = RECOMBINATIONS[recombination]
        self.top_labels = top_labels
        self.max_bytes = max_bytes

    def __call__(
        self,
        encoder_out: torch.Tensor,
        scales: Optional[Scales] = None,
        nbest: int = 1,
        normalize_length: bool = False,
    ) -> list[Hypothesis]:
        """Search a whole utterance (T, D): at most ``nbest`` hypotheses, best first."""
        lengths = torch.tensor([encoder_out.size(0)])
        return self.batch(encoder_out[None], lengths, scales, nbest, normalize_length)[0]

    def batch(
        self,
        encoder_out: torch.Tensor,
        lengths: torch.Tensor,
        scales: Optional[Scales] = None,
        nbest: int = 1,
        normalize_length: bool = False,
    ) -> list[list[Hypothesis]]:
        """Search utterances (B, T, D) with ``lengths`` (B,) frames: an n-best list of each."""
        state = self.start([scales or Scales()], utterances=len(encoder_out))
        return self.step(state, encoder_out, lengths).nbest(nbest, normalize_length)

    @torch.inference_mode()
    def start(
        self, scales: Sequence[Scales], tree: Optional[PrefixTree] = None, utterances: int = 1
    ) -> SearchState:
        """State before the first frame, for G settings; ``tree``: of an earlier search."""
        if tree is None:
            tree = PrefixTree(None, self.num_labels, self.external_lm, self.max_bytes)
        self.fusion.start(tree)
        state = SearchState.start(tree, scales, utterances, self.fusion)
        beam = state.beam
        beam.blank = np.full_like(beam.score, np.nan)  # not followed
        if self._is_greedy(scales):
            state.extra = np.zeros(len(beam.score), dtype=np.int64)  # tokens of the frame before
        else:
            # Before the first frame is as after a blank.
            nothing = np.full_like(beam.score, -np.inf)
            state.extra = (
                Endings(beam.score, beam.viterbi, beam.path),
                Endings(nothing, nothing, np.zeros_like(beam.path)),
            )
        return state

    def _is_greedy(self, scales: Sequence[Scales]) -> bool:
        if self.beam_size > 1:
            return False
        now = RowScales(scales, 1, delayed=self.fusion.delayed)
        extra = (now.lm_weight, now.bonus, now.prior_weight, now.blank_scale - 1)
        return not any(values.any() for values in extra)

    @torch.inference_mode()
    def step(
        self,
        state: SearchState,
        encoder_out: torch.Tensor,
        lengths: Optional[torch.Tensor] = None,
    ) -> SearchState:
        """Search the next chunk; chunks one after another equal all frames at once.

        Args:
            state: Left as it is.
            encoder_out: Frames (B, T, D), or (T, D) of the only utterance.
            lengths: Frames of each utterance in this chunk, 0 allowed (B,); default: all.

        Raises:
            SearchError: A score is not a number.
        """
        if encoder_out.dim() == 2:
            encoder_out = encoder_out[None]
        utterances, frames = encoder_out.shape[:2]
        count = np.full(utterances, frames) if lengths is None else lengths.cpu().numpy()
        log_probs = self.ctc.log_softmax(encoder_out).float()[:, :, :-1]
        best = log_probs.amax(dim=-1).cpu().numpy()
        _check(best, count, state.frame)
        state = state.copy()
        if isinstance(state.extra, tuple):
            chunk = _Chunk(self, state, log_probs.cpu().numpy(), count)
            chunk.search()
        else:
            self._greedy(state, log_probs.argmax(dim=-1).cpu().numpy(), best, count)
        state.frame += count
        return state

    def _greedy(
        self, state: SearchState, tokens: np.ndarray, best: np.ndarray, count: np.ndarray
    ) -> None:
        """Extend the best paths (B, T) by all frames of a chunk."""
        beam, settings = state.beam, len(state.scales)
        inside = np.arange(tokens.shape[1]) < count[:, None]
        score = np.repeat(np.where(inside, best, 0.0).sum(axis=1, dtype=np.float64), settings)
        beam = beam.plus_blank(score[:, None])
        before = np.concatenate([state.extra[::settings, None], tokens[:, :-1]], axis=1)
        utterance, frame = np.nonzero(inside & (tokens != 0) & (tokens != before))
        number = np.arange(len(utterance)) - np.searchsorted(utterance, utterance)
        for u in range(int(number.max(initial=-1)) + 1):
            which = number == u
            rows = (utterance[which, None] * settings + np.arange(settings)).ravel()
            label = np.repeat(tokens[utterance[which], frame[which]] - 1, settings)
            at = np.repeat(state.frame[utterance[which]] + frame[which], settings)
            beam.node[rows, 0] = state.tree.children(beam.node[rows, 0], label)
            beam.path[rows, 0] = state.emissions.add(beam.path[rows, 0], at)
        last = state.extra.copy()
        for b in np.nonzero(count)[0]:
            last[b * settings : (b + 1) * settings] = tokens[b, count[b] - 1]
        state.beam, state.extra = beam, last
        state.tree.release(beam.node)


class _Chunk:
    """The frames of a chunk.

    Args:
        search: Whose options count.
        state: At the first frame; changed.
        log_probs: Of blank and labels (B, T, L+1).
        count: Frames of each utterance (B,).
    """

    def __init__(
        self, search: CTCSearch, state: SearchState, log_probs: np.ndarray, count: np.ndarray
    ):
        self.search_, self.state, self.log_probs, self.count = search, state, log_probs, count
        self.fusion, self.combine, self.size = search.fusion, search.combine, search.beam_size
        self.tree = state.tree
        self.scales = RowScales(state.scales, len(count), delayed=self.fusion.delayed)
        self.weights = Weights.of(state.scales, len(self.scales.utterance))
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
        limit = min(limit, self.search_.top_labels or limit)
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


def _check(best: np.ndarray, count: np.ndarray, frame: np.ndarray) -> None:
    """Refuse frames (B, T) whose best log-prob is not a number below infinity."""
    bad = ~(best < np.inf) & (np.arange(best.shape[1]) < count[:, None])
    if bad.any():
        utterance, t = (int(index[0]) for index in np.nonzero(bad))
        raise SearchError(f"scores at encoder frame {frame[utterance] + t} are not finite numbers")
