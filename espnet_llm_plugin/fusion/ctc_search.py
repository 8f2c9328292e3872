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
from espnet_llm_plugin.fusion.ctc_beam import RECOMBINATIONS, Endings
from espnet_llm_plugin.fusion.ctc_chunk import CTCChunk
from espnet_llm_plugin.fusion.delayed import Fusion
from espnet_llm_plugin.transducer.frame_search import FrameSearch
from espnet_llm_plugin.transducer.hypothesis import Scales, SearchError
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.search_state import RowScales, SearchState

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.external_lm import ExternalLM


class CTCSearch(FrameSearch):
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

    @torch.inference_mode()
    def start(
        self, scales: Sequence[Scales], tree: Optional[PrefixTree] = None, utterances: int = 1
    ) -> SearchState:
        """See :class:`FrameSearch`."""
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
        now = RowScales([self.fusion.at_once(s) for s in scales], 1)
        extra = (now.lm_weight, now.bonus, now.prior_weight, now.blank_scale - 1)
        return not any(values.any() for values in extra)

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
        utterances, frames = encoder_out.shape[:2]
        count = np.full(utterances, frames) if lengths is None else lengths.cpu().numpy()
        log_probs = self.ctc.log_softmax(encoder_out).float()[:, :, :-1]
        best = log_probs.amax(dim=-1).cpu().numpy()
        _check(best, count, state.frame)
        state = state.copy()
        if isinstance(state.extra, tuple):
            CTCChunk(self, state, log_probs.cpu().numpy(), count).search()
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


def _check(best: np.ndarray, count: np.ndarray, frame: np.ndarray) -> None:
    """Refuse frames (B, T) whose best log-prob is not a number below infinity."""
    bad = ~(best < np.inf) & (np.arange(best.shape[1]) < count[:, None])
    if bad.any():
        utterance, t = (int(index[0]) for index in np.nonzero(bad))
        raise SearchError(f"scores at encoder frame {frame[utterance] + t} are not finite numbers")
