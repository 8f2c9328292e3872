"""CTC prefix beam search with the scales, the external LM and the n-best of the transducer search.

G scale settings searched side by side, N hypotheses of a setting, L = V - 2 labels (token ids
1..V-2; label = token id - 1), T frames, D encoder size.

A prefix has two probabilities: its alignments so far end in a blank, or in its last label. In the
second case the same label again is a repetition, not a new label [Graves 2006; Hannun 2014].
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.transducer.beam import Beam, Extensions, check_scores, kth_best
from espnet_llm_plugin.transducer.hypothesis import Hypothesis, Scales
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree
from espnet_llm_plugin.transducer.search_state import RowScales, SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.external_lm import ExternalLM


@dataclass
class Endings:
    """One of the two kinds of alignments of the hypotheses of a beam, all (G, N).

    Attributes:
        score: Log of the sum over these alignments.
        viterbi: The best of them.
        path: Its emissions.
    """

    score: np.ndarray
    viterbi: np.ndarray
    path: np.ndarray

    def take(self, order: np.ndarray) -> "Endings":
        """The places (G, K)."""
        settings = np.arange(len(order))[:, None]
        return Endings(*(array[settings, order] for array in vars(self).values()))

    def join(self, other: "Endings") -> "Endings":
        """Alignments of either kind."""
        better = other.viterbi > self.viterbi
        return Endings(
            np.logaddexp(self.score, other.score),
            np.where(better, other.viterbi, self.viterbi),
            np.where(better, other.path, self.path),
        )

    def pad(self, columns: int) -> "Endings":
        """More places, all empty."""
        return Endings(
            pad(self.score, columns, -np.inf),
            pad(self.viterbi, columns, -np.inf),
            pad(self.path, columns, 0),
        )

    def plus(self, added: np.ndarray) -> "Endings":
        """Scores plus (G, N)."""
        return Endings(self.score + added, self.viterbi + added, self.path.copy())


class CTCSearch:
    """Prefix beam search over the CTC posteriors of one utterance at a time.

    The score of a label is ``log P + lm_weight * external_lm + label_bonus``. With ``beam_size``
    1, without LM and bonus, the search is greedy CTC: the best path, repetitions and blanks
    removed, and ``total`` is that path's score.

    Args:
        ctc: ESPnet's ``CTC`` module (blank is row 0, ``<sos/eos>`` the last row, never emitted).
        beam_size: Prefixes kept after a frame.
        external_lm: See :class:`~espnet_llm_plugin.fusion.external_lm.ExternalLM`.
        max_bytes: See :class:`~espnet_llm_plugin.transducer.prefix_tree.PrefixTree`.
    """

    takes_batches = False

    def __init__(
        self,
        ctc: torch.nn.Module,
        *,
        beam_size: int = 8,
        external_lm: Optional["ExternalLM"] = None,
        max_bytes: Optional[int] = None,
    ):
        self.ctc = ctc
        self.num_labels = ctc.ctc_lo.out_features - 2
        self.beam_size = beam_size
        self.external_lm = external_lm
        self.max_bytes = max_bytes

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

    def batch(
        self,
        encoder_out: torch.Tensor,
        lengths: torch.Tensor,
        scales: Optional[Scales] = None,
        nbest: int = 1,
        normalize_length: bool = False,
    ) -> list[list[Hypothesis]]:
        """Search utterances (B, T, D) with ``lengths`` (B,) frames one after the other."""
        return [
            self(one[:length], scales, nbest, normalize_length)
            for one, length in zip(encoder_out, lengths.tolist())
        ]

    @torch.inference_mode()
    def start(
        self, scales: Sequence[Scales], tree: Optional[PrefixTree] = None, utterances: int = 1
    ) -> SearchState:
        """State before the first frame, for G settings; ``tree``: of an earlier search."""
        if utterances != 1:
            raise ValueError(f"{utterances} utterances: the CTC search takes one at a time")
        if tree is None:
            tree = PrefixTree(None, self.num_labels, self.external_lm, self.max_bytes)
        state = SearchState.start(tree, scales, utterances=1)
        beam = state.beam
        beam.blank = np.full_like(beam.score, np.nan)  # not followed
        nothing = np.full_like(beam.score, -np.inf)
        # Before the first frame is as after a blank.
        state.extra = (
            Endings(beam.score, beam.viterbi, beam.path),
            Endings(nothing, nothing, np.zeros_like(beam.path)),
        )
        return state

    @torch.inference_mode()
    def step(
        self,
        state: SearchState,
        encoder_out: torch.Tensor,
        lengths: Optional[torch.Tensor] = None,
    ) -> SearchState:
        """Search the next chunk (T, D) or (1, T, D), of which ``lengths`` (1,) frames count.

        Chunks one after another equal all frames at once.
        """
        if encoder_out.dim() == 3:
            encoder_out = encoder_out[0]
        if lengths is not None:
            encoder_out = encoder_out[: int(lengths[0])]
        log_probs = self.ctc.log_softmax(encoder_out[None])[0].float()
        state = state.copy()
        scaled = RowScales(state.scales, utterances=1)
        plain = all(scales == Scales() for scales in state.scales)
        for row in log_probs:
            labels = row[1:-1]
            blank, best = float(row[0]), float(labels.max())
            check_scores(np.array([[blank, best]]), state.frame)
            if self.beam_size == 1 and plain:
                self._greedy_frame(state, blank, labels)
            else:
                self._frame(state, blank, labels, scaled)
            state.frame += 1
            state.tree.release(state.beam.node)
        return state

    def _frame(
        self, state: SearchState, blank: float, labels: torch.Tensor, scaled: RowScales
    ) -> None:
        tree, node = state.tree, state.beam.node
        in_blank, in_label = state.extra
        either = in_blank.join(in_label)
        last = tree.label[node]
        # 1. No new label: a blank, or the last label repeated (there is none in the empty prefix).
        row = labels.double().cpu().numpy()
        stay_blank = either.plus(blank * scaled.blank_scale[:, None])
        stay_label = in_label.plus(np.where(node > ROOT, row[np.maximum(last, 0)], -np.inf))
        # 2. What a new label adds (G, N, L).
        gain = self._gain(tree, node, labels, scaled)

        def emitted(g: np.ndarray, n: np.ndarray, label: np.ndarray) -> Endings:
            """A new label after hypotheses (g, n); after itself it needs a blank between."""
            added = gain[as_index(g, n, label)].double().cpu().numpy()
            itself = label == last[g, n]
            return Endings(
                np.where(itself, in_blank.score[g, n], either.score[g, n]) + added,
                np.where(itself, in_blank.viterbi[g, n], either.viterbi[g, n]) + added,
                np.where(itself, in_blank.path[g, n], either.path[g, n]),
            )

        candidates = gain.clone()
        g, n = np.nonzero(node > ROOT)
        loss = torch.from_numpy(in_blank.score[g, n] - either.score[g, n]).to(gain)
        candidates[as_index(g, n, last[g, n])] += loss
        # 3. Labels that lead to another live prefix: its probability grows.
        pairs = state.live_pairs()
        if len(pairs):
            g, child = pairs.row, pairs.child
            into = emitted(g, pairs.parent, pairs.label)
            candidates[as_index(g, pairs.parent, pairs.label)] = -torch.inf
            stay_label.score[g, child] = np.logaddexp(stay_label.score[g, child], into.score)
            better = into.viterbi > stay_label.viterbi[g, child]
            g, child = g[better], child[better]
            stay_label.viterbi[g, child] = into.viterbi[better]
            stay_label.path[g, child] = self._emit(state, into.path[better])
        # 4. The best new prefixes that stand up to the old ones; only for these the LM runs.
        found = best_extensions(either.score, candidates, self.beam_size)
        pool = np.concatenate([np.logaddexp(stay_blank.score, stay_label.score), found.score], 1)
        cut = kth_best(pool, self.beam_size)[:, None]
        survive = (found.score >= cut) & (found.score > -np.inf)
        if survive.any():
            g, _ = np.nonzero(survive)
            place, label = found.place[survive], found.label[survive]
            column = (survive.cumsum(axis=1) - 1)[survive] + node.shape[1]
            grow = int(column.max()) + 1 - node.shape[1]
            into = emitted(g, place, label)
            parents = node[g, place]
            node = pad(node, grow, -1)
            node[g, column] = tree.children(parents, label)
            stay_blank, stay_label = stay_blank.pad(grow), stay_label.pad(grow)
            stay_label.score[g, column] = into.score
            stay_label.viterbi[g, column] = into.viterbi
            stay_label.path[g, column] = self._emit(state, into.path)
        self._keep_best(state, node, stay_blank, stay_label)

    def _gain(
        self, tree: PrefixTree, node: np.ndarray, labels: torch.Tensor, scaled: RowScales
    ) -> torch.Tensor:
        """Log-prob, LM score and bonus of each label (L) after each hypothesis: (G, N, L)."""
        rows = labels.expand(node.size, -1).clone()
        settings = np.repeat(np.arange(len(node)), node.shape[1])
        # Empty places have scores of -inf, so it does not matter what they are taken for.
        nodes = np.maximum(node, ROOT).ravel()
        return scaled.totals(rows, settings, nodes, tree).view(*node.shape, -1)

    @staticmethod
    def _emit(state: SearchState, path: np.ndarray) -> np.ndarray:
        return state.emissions.add(path, np.full(len(path), state.frame[0]))

    def _keep_best(
        self, state: SearchState, node: np.ndarray, in_blank: Endings, in_label: Endings
    ) -> None:
        both = in_blank.join(in_label)
        order = np.argsort(-both.score, axis=1, kind="stable")
        order = order[:, : min(self.beam_size, int((node >= 0).sum(axis=1).max()))]
        state.beam = Beam(
            node, both.score, both.viterbi, np.full_like(both.score, np.nan), both.path
        ).take(order)
        state.extra = (in_blank.take(order), in_label.take(order))

    def _greedy_frame(self, state: SearchState, blank: float, labels: torch.Tensor) -> None:
        """Extend the best path by a frame; ``state.extra`` is the label of the frame before."""
        best = int(labels.argmax())
        score = float(labels[best])
        before = state.extra if isinstance(state.extra, int) else None
        if blank >= score:
            best, score = None, blank
        beam = state.beam.plus_blank(np.full_like(state.beam.score, score))
        if best is not None and best != before:
            parents = beam.node[:, 0]
            beam.node[:, 0] = state.tree.children(parents, np.full_like(parents, best))
            beam.path[:, 0] = self._emit(state, beam.path[:, 0])
        state.beam, state.extra = beam, best


def best_extensions(score: np.ndarray, labels: torch.Tensor, size: int) -> Extensions:
    """The ``size`` best sums of a hypothesis' score (G, N) and a label's (G, N, L), best first."""
    num_labels = labels.size(2)
    # Totals of long utterances are large: compare in float32 relative to the best.
    best = score.max(axis=1, keepdims=True)
    best[best == -np.inf] = 0.0
    relative = torch.from_numpy(score - best).to(labels)
    both = (labels + relative[:, :, None]).flatten(1)
    index = both.topk(min(size, both.size(1)), dim=1).indices
    added = labels.flatten(1).gather(1, index).double().cpu().numpy()
    place, label = np.divmod(index.cpu().numpy(), num_labels)
    settings = np.arange(len(score))[:, None]
    return Extensions(score[settings, place] + added, added, place, label)


def as_index(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Numpy indices for a tensor."""
    return tuple(torch.from_numpy(array) for array in arrays)


def pad(array: np.ndarray, columns: int, value: float) -> np.ndarray:
    """``array`` (G, N) with more columns."""
    more = np.full((len(array), columns), value, dtype=array.dtype)
    return np.concatenate([array, more], axis=1)
