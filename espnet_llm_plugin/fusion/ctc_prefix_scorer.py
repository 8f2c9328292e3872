"""CTC prefix scores for label-synchronous search: many utterances and hypotheses at once.

psi(h) is the probability that the label sequence of an utterance begins with h, phi_t(h, c) that
of the alignments of h in the frames before t that may be followed by the label c in frame t
[Watanabe et al. 2017, Algorithm 2]:

    phi_t(h, c) = a_t(h), or b_t(h) if c is the last label of h
    a_t(h) = b_t(h) + n_t(h)                 b, n: ending in blank, in the last label
    psi(h c) = sum_t phi_t(h, c) p_t(c),     psi(h <eos>) = a_T(h)

ESPnet's scorer follows this label by label and frame by frame, (T, 2, N, V) numbers in a step.
Here a step has two parts, and memory never exceeds N (T + K) numbers beside the posteriors and
their exponentials, (B, T, K) each:

* psi for all labels is one matrix product of phi (N, T) and p (T, K) for each utterance, over the
  frames in which phi is not zero to machine precision, and corrected where the last label is
  repeated;
* a is followed only for the hypotheses that the search keeps: n_{t+1} = (n_t + phi_t) p_t(c) and
  a_{t+1} = a_t p_t(blank) + n_{t+1} are linear recurrences, and cumulative sums solve them.

Dimensions: B utterances, T frames, V labels with blank and eos, K of them kept, N hypotheses,
M hypotheses after an extension or labels of a hypothesis. Time t of a, b, n is before frame t.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_frames import compress_frames, keep_labels
from espnet_llm_plugin.transducer.normalizer import exact_float32

# log 0 where a cumulative sum must not be -inf; what is below half of it is impossible.
_LOG_ZERO = -1e6
# Entries of a temporary in which single cells are recomputed.
_ENTRIES = 1 << 21


@dataclass(frozen=True)
class CTCPrefixState:
    """Hypotheses of a search; never changed by the scorer.

    Attributes:
        utterances: (N,) utterance of each hypothesis.
        last: (N,) column of its last label, -1 for the empty hypothesis.
        forward: (N, T+1) float64, log a: alignments of the hypothesis in the frames before t.
        log_prefix: (N,) float64, log psi; -inf for an impossible hypothesis.
    """

    utterances: Tensor
    last: Tensor
    forward: Tensor
    log_prefix: Tensor

    def __len__(self) -> int:
        return len(self.last)

    def select(self, rows: Tensor) -> "CTCPrefixState":
        """Hypotheses ``rows`` (M,), in that order."""
        return CTCPrefixState(
            self.utterances[rows], self.last[rows], self.forward[rows], self.log_prefix[rows]
        )


class CTCPrefixScorer:
    """Prefix scores over the CTC posteriors of a batch.

    Scores are conditional, log psi(h c) - log psi(h), so that the sum along a hypothesis with its
    eos is the CTC log-probability of its labels.

    Args:
        log_probs: (B, T, V) log-posteriors, any floating dtype; kept by reference unless reduced.
            Whatever the padding holds is not looked at.
        lengths: (B,) frames of the utterances, 0 allowed.
        blank: Column of the blank.
        eos: Column whose score is the end of the hypothesis; its posteriors are not used.
            None: the last.
        top_k: Labels kept of each utterance besides blank and eos, see
            :func:`~espnet_llm_plugin.fusion.ctc_frames.keep_labels`. None: all.
        compress_threshold: Merge frames, see
            :func:`~espnet_llm_plugin.fusion.ctc_frames.compress_frames`. None: none.

    Attributes:
        labels: (B, K) labels of the score columns, ascending.

    Raises:
        UserError: An option is out of its range.
    """

    @torch.no_grad()
    def __init__(
        self,
        log_probs: Tensor,
        lengths: Tensor,
        *,
        blank: int = 0,
        eos: Optional[int] = None,
        top_k: Optional[int] = None,
        compress_threshold: Optional[float] = None,
    ):
        num_labels = log_probs.size(2)
        eos = num_labels - 1 if eos is None else eos
        if blank == eos or not (0 <= blank < num_labels and 0 <= eos < num_labels):
            raise UserError(
                f"blank {blank} and eos {eos}: must be two different columns of the {num_labels} "
                "of the CTC posteriors"
            )
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k {top_k}: must be at least 1 (or None to keep all labels)")
        if compress_threshold is not None and not 0 <= compress_threshold <= 1:
            raise UserError(
                f"compress_threshold {compress_threshold}: must be a probability in [0, 1] "
                "(or None to keep all frames)"
            )
        lengths = lengths.to(log_probs.device)
        labels = torch.arange(num_labels, device=log_probs.device).expand(len(log_probs), -1)
        always = (blank, eos)
        if top_k is not None and top_k + len(always) >= num_labels:
            top_k = None
        if top_k is not None or compress_threshold is not None:
            # One utterance after the other: what is computed on the way may be large.
            reduced, kept = [], []
            for frames, length in zip(log_probs, lengths.tolist()):
                if top_k is None:
                    reduced.append(compress_frames(frames[:length], compress_threshold))
                else:
                    best, names = keep_labels(frames[:length], top_k, always, compress_threshold)
                    reduced.append(best)
                    kept.append(names)
            lengths = lengths.new_tensor([len(frames) for frames in reduced])
            log_probs = pad_sequence(reduced, batch_first=True, padding_value=-torch.inf)
            labels = torch.stack(kept) if kept else labels
        if not log_probs.size(1):  # no utterance has a frame
            log_probs = torch.nn.functional.pad(log_probs, (0, 0, 0, 1))
        self.log_probs, self.lengths, self.labels = log_probs, lengths, labels
        self.num_labels, self.blank, self.eos = num_labels, blank, eos
        self.dtype = torch.promote_types(log_probs.dtype, torch.float32)
        everyone = torch.arange(len(lengths), device=lengths.device)
        self._blank_column, _ = self._find(torch.full_like(everyone, blank), everyone)
        self._eos_column, _ = self._find(torch.full_like(everyone, eos), everyone)
        self._prepare()

    def _prepare(self) -> None:
        """Posteriors relative to the best label of each frame, and cumulative blanks."""
        batch, num_frames, _ = self.log_probs.shape
        frames = torch.arange(num_frames, device=self.lengths.device)
        self._outside = frames >= self.lengths[:, None]  # (B, T)
        # 1. p_t(c) / max_c' p_t(c'), blank not among the labels: no frame of blank underflows.
        is_blank = self._blank_column[:, None, None]
        relative = self.log_probs.to(self.dtype, copy=True)
        relative.scatter_(2, is_blank.expand(-1, num_frames, 1), -torch.inf)
        for row, length in zip(relative, self.lengths.tolist()):
            row[length:] = -torch.inf
        self._peak = relative.amax(2)  # (B, T)
        shift = self._peak.masked_fill(self._peak == -torch.inf, 0.0)
        # Labels that no frame allows need not be looked at again.
        self._possible = relative.amax(1) > _LOG_ZERO / 2  # (B, K)
        self._relative = relative.sub_(shift[:, :, None]).exp_()  # (B, T, K)
        # 2. log p(blank) of the frames before t.
        blanks = self._column_log_probs(
            torch.arange(batch, device=self.lengths.device), self._blank_column
        )
        self._blanks = torch.nn.functional.pad(blanks.clamp_(min=_LOG_ZERO).cumsum(1), (1, 0))

    # ------------------------------------------------------------------ interface of a search

    def initial_state(self) -> CTCPrefixState:
        """The empty hypothesis of each utterance, N = B."""
        return CTCPrefixState(
            torch.arange(len(self.lengths), device=self.lengths.device),
            torch.full_like(self.lengths, -1),
            self._blanks,
            self._blanks.new_zeros(len(self.lengths)),
        )

    @torch.no_grad()
    def next_log_probs(self, state: CTCPrefixState) -> Tensor:
        """(N, K) log-probability of each kept label and of eos after each hypothesis.

        The columns of row n are ``labels[utterances[n]]``. Blank is -inf, and so is all after an
        impossible hypothesis.
        """
        scores = self._products(state)
        # Where the last label is repeated a blank must come between.
        rows = torch.arange(len(state), device=scores.device)
        follows = state.last.clamp(min=0)
        repeated = self._cells(state, rows, follows)
        scores[rows, follows] = torch.where(state.last < 0, scores[rows, follows], repeated)
        scores[rows, self._eos_column[state.utterances]] = self.end_log_probs(state)
        scores[rows, self._blank_column[state.utterances]] = -torch.inf
        return scores

    @torch.no_grad()
    def log_probs_of(self, state: CTCPrefixState, labels: Tensor) -> Tensor:
        """(N, M) log-probability of some labels (N, M) after each hypothesis, -inf if not kept."""
        num_rows, width = labels.shape
        rows = torch.arange(num_rows, device=labels.device)[:, None].expand(-1, width)
        columns, kept = self._find(labels, state.utterances)
        flat = self._cells(state, rows.flatten(), columns.flatten())
        scores = flat.view(num_rows, width).masked_fill(~kept | (labels == self.blank), -torch.inf)
        return torch.where(labels == self.eos, self.end_log_probs(state)[:, None], scores)

    @torch.no_grad()
    def end_log_probs(self, state: CTCPrefixState) -> Tensor:
        """(N,) log-probability of eos after each hypothesis."""
        end = state.forward.gather(1, self.lengths[state.utterances][:, None])
        return self._conditional(end.squeeze(1), state.log_prefix)

    @torch.no_grad()
    def extend(self, state: CTCPrefixState, parents: Tensor, labels: Tensor) -> CTCPrefixState:
        """Hypotheses ``parents`` (M,), rows of ``state``, each with one of ``labels`` (M,) more.

        A hypothesis with a label that is not kept, blank or eos is impossible.
        """
        utterances = state.utterances[parents]
        columns, kept = self._find(labels, utterances)
        kept = kept & (labels != self.blank) & (labels != self.eos)
        # 1. The new label starts in frame t.
        phi = self._phi(state, parents, columns)
        log_probs = self._column_log_probs(utterances, columns)
        log_psi = (phi + log_probs).logsumexp(1)
        # 2. n[t+1] = (n[t] + phi[t]) p_t(label).
        path = log_probs.clamp_(min=_LOG_ZERO).cumsum(1)
        phi[:, 1:] -= path[:, :-1]
        n = torch.logcumsumexp(phi, 1).add_(path)
        # 3. a[t+1] = a[t] p_t(blank) + n[t+1].
        blanks = self._blanks[utterances, 1:]
        forward = phi.new_full((len(labels), n.size(1) + 1), -torch.inf)
        torch.logcumsumexp(n.sub_(blanks), 1, out=forward[:, 1:]).add_(blanks)
        impossible = ~(kept & (log_psi > _LOG_ZERO / 2))
        forward.masked_fill_(impossible[:, None], -torch.inf)
        log_psi.masked_fill_(impossible, -torch.inf)
        return CTCPrefixState(utterances, columns, forward, log_psi)

    # ------------------------------------------------------------------------------- internals

    def _find(self, labels: Tensor, utterances: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of labels (N,) or (N, M), and whether the label is kept."""
        num_columns = self.labels.size(1)
        if num_columns == self.num_labels:
            return labels, torch.ones_like(labels, dtype=torch.bool)
        table = self.labels[utterances]
        wanted = labels.reshape(len(utterances), -1).contiguous()
        columns = torch.searchsorted(table, wanted).clamp_(max=num_columns - 1)
        kept = table.gather(1, columns) == wanted
        return columns.view(labels.shape), kept.view(labels.shape)

    def _phi(self, state: CTCPrefixState, rows: Tensor, columns: Tensor) -> Tensor:
        """(M, T) log phi of hypotheses ``rows`` and one column each; a new tensor."""
        phi = state.forward[rows, :-1]
        again = (columns == state.last[rows]).nonzero().squeeze(1)
        if len(again):
            # A blank must come between: b[t+1] = a[t] p_t(blank). a[0] is zero already.
            blanks = self._blanks[state.utterances[rows[again]], :-1].diff(dim=1)
            phi[again, 1:] = phi[again, :-1] + blanks
        return phi

    def _column_log_probs(self, utterances: Tensor, columns: Tensor) -> Tensor:
        """(N, T) float64 log p_t of one column for each hypothesis, -inf beyond the utterance."""
        frames = torch.arange(self.log_probs.size(1), device=columns.device)
        chosen = self.log_probs[utterances[:, None], frames, columns[:, None]].double()
        return chosen.masked_fill_(self._outside[utterances], -torch.inf)

    def _conditional(self, log_psi: Tensor, log_prefix: Tensor) -> Tensor:
        impossible = (log_psi < _LOG_ZERO / 2) | (log_prefix == -torch.inf)
        return (log_psi - log_prefix).masked_fill_(impossible, -torch.inf).to(self.dtype)

    def _products(self, state: CTCPrefixState) -> Tensor:
        """(N, K) log-probability of each label as if none were a repetition, by matrix products."""
        weights = state.forward[:, :-1] + self._peak[state.utterances]
        largest = weights.amax(1, keepdim=True)
        alive = largest > -torch.inf
        weights = weights.sub_(largest.masked_fill(~alive, 0.0)).to(self.dtype).exp_()
        # 1. One product for each utterance: hypotheses of an utterance need not be neighbours.
        total = weights.new_empty((len(state), self.labels.size(1)))
        with exact_float32(total.device.type):
            for rows, utterance, frames in _blocks(state.utterances, weights > 0):
                relative = self._relative[utterance, frames]
                torch.mm(weights[rows, frames], relative, out=total[rows])
        # 2. Sums that may have lost terms, one by one. One this large has lost nothing to
        # underflow that rounding would have kept.
        finfo = torch.finfo(self.dtype)
        floor = self.log_probs.size(1) * finfo.tiny / finfo.eps
        rows, columns = (total < torch.where(alive, floor, 0.0)).nonzero(as_tuple=True)
        lost = self._possible[state.utterances[rows], columns]
        rows, columns = rows[lost], columns[lost]
        scale = (largest - state.log_prefix[:, None]).masked_fill_(~alive, -torch.inf)
        scores = total.log_().add_(scale.to(self.dtype))
        if len(rows):
            scores[rows, columns] = self._cells(state, rows, columns, repetitions=False)
        return scores

    def _cells(
        self, state: CTCPrefixState, rows: Tensor, columns: Tensor, repetitions: bool = True
    ) -> Tensor:
        """(M,) log-probability of single columns after hypotheses ``rows``, summed directly."""
        parts = []
        step = max(1, _ENTRIES // self.log_probs.size(1))
        for row, column in zip(rows.split(step), columns.split(step)):
            phi = self._phi(state, row, column) if repetitions else state.forward[row, :-1]
            log_probs = self._column_log_probs(state.utterances[row], column)
            parts.append(self._conditional(log_probs.add_(phi).logsumexp(1), state.log_prefix[row]))
        return torch.cat(parts)


@torch.no_grad()
def ctc_prefix_score(
    scorer: CTCPrefixScorer, utterances: Tensor, labels: Tensor, label_lengths: Tensor
) -> Tensor:
    """CTC scores of given hypotheses, label by label, for rescoring.

    Args:
        scorer: Of the batch.
        utterances: (N,) utterance of each hypothesis.
        labels: (N, U) its labels, without sos and eos.
        label_lengths: (N,) how many of them count.

    Returns:
        (N, U+1) log-probability of each label after those before it, at ``label_lengths`` that of
        eos, 0 beyond. The sum of a row is the CTC log-probability of the hypothesis.
    """
    state = scorer.initial_state().select(utterances)
    rows = torch.arange(len(utterances), device=utterances.device)
    scores = []
    for position in range(labels.size(1) + 1):
        step = torch.where(label_lengths == position, scorer.end_log_probs(state), 0.0)
        if position < labels.size(1):
            label = labels[:, position]
            gain = scorer.log_probs_of(state, label[:, None])[:, 0]
            step = torch.where(label_lengths > position, gain, step)
            state = scorer.extend(state, rows, label)
        scores.append(step)
    return torch.stack(scores, 1)


def _blocks(utterances: Tensor, active: Tensor) -> Iterator[tuple[slice, int, slice]]:
    """Neighbouring hypotheses of one utterance: rows, utterance, and frames that count for any.

    Args:
        utterances: (N,) utterance of each hypothesis.
        active: (N, T) whether a frame counts for a hypothesis.
    """
    first = active.int().argmax(1)
    end = active.size(1) - active.flip(1).int().argmax(1)
    table = torch.stack([utterances, first, end], 1).tolist()
    row = 0
    for utterance, block in itertools.groupby(table, key=lambda entry: entry[0]):
        block = list(block)
        frames = slice(min(entry[1] for entry in block), max(entry[2] for entry in block))
        yield slice(row, row + len(block)), utterance, frames
        row += len(block)
