"""Label scores and their normaliser for a distribution that factorises, without a (T, U, V) tensor.

Dimensions: B utterances, T frames, U labels of the target, V labels of the vocabulary (no blank),
C labels of one chunk of V, N utterances of one block, W positions of the LM: U+1, or 1 where it is
switched off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of the largest temporary, (N, T, C). On a CPU it should stay in the last-level cache;
# smaller ones gain nothing, and every further operation is a further barrier between threads.
_CPU_ENTRIES = 1 << 21
_ACCELERATOR_ENTRIES = 1 << 25


def label_scores(
    acoustic_logits: Tensor,
    lm_log_probs: Tensor,
    targets: Tensor,
    frame_lengths: list[int],
    target_lengths: list[int],
    lm_scale: float,
) -> tuple[Tensor, Tensor]:
    """Score of the target's next label, and the log of the sum over all labels.

    With s[t, u, v] = a[t, v] + lm_scale * l[u, v]: ``score[t, u] = s[t, u, y[u+1]]`` and
    ``log_norm[t, u] = logsumexp_v s[t, u, v]``. The sum is the matrix product
    ``exp(a - max a) @ exp(lm_scale * l - max)^T``; cells in which it underflows are summed one by
    one.

    Args:
        acoustic_logits: (B, T, V) ``a``, any floating dtype and strides. -inf masks a label.
        lm_log_probs: (B, U+1, V) ``l``. -inf masks a label; at lm_scale 0 ``l`` is not looked at.
        targets: (B, U) int64 in [0, V), in the padding too.
        frame_lengths: B integers in [1, T].
        target_lengths: B integers in [0, U].
        lm_scale: finite, >= 0.

    Returns:
        score (B, T, U) and log_norm (B, T, U+1), float32 (float64 if an input is), 0 beyond the
        lengths. Differentiable once in the first two arguments. Only the gradients asked for are
        computed, and nothing else of their size is ever allocated.
    """
    return _LabelScores.apply(
        acoustic_logits, lm_log_probs, targets, frame_lengths, target_lengths, lm_scale
    )


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Float32 matrix products in float32: no autocast, no TF32, no bfloat16."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    saved = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user drives the newer switches, and this one disagrees with them
        legacy = None
    try:
        # The older switch sets the newer ones too; the reverse leaves PyTorch refusing the mixture.
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, saved):
            backend.fp32_precision = precision


class _Inputs(NamedTuple):
    acoustic: Tensor  # (B, T, V)
    lm: Optional[Tensor]  # (B, U+1, V); None at scale 0, where 0 * -inf must not be computed
    targets: Tensor  # (B, U)
    frame_lengths: list[int]
    target_lengths: list[int]
    lm_scale: float
    dtype: torch.dtype  # of the computation


class _Block:
    """Utterances computed together, cut to the longest of them, one chunk of labels at a time."""

    def __init__(self, inputs: _Inputs, utts: slice, entries: int):
        self.utts, self.lm_scale, self.dtype = utts, inputs.lm_scale, inputs.dtype
        frames = inputs.frame_lengths[utts]
        positions = [length + 1 for length in inputs.target_lengths[utts]]
        self.shape = len(frames), max(frames), max(positions)  # N, T, U+1
        self.acoustic = inputs.acoustic[utts, : self.shape[1]]
        self.lm = None if inputs.lm is None else inputs.lm[utts, : self.shape[2]]
        self.targets = inputs.targets[utts, : self.shape[2] - 1]
        self.no_frame = _beyond(frames, self.acoustic.device)  # (N, T, 1) or None
        self.no_position = _beyond(positions, self.acoustic.device)  # (N, U+1, 1) or None
        vocab = self.acoustic.size(2)
        num_chunks = -(-self.shape[0] * self.shape[1] * vocab // entries)
        width = -(-vocab // min(vocab, num_chunks))
        self.chunks = [slice(v, min(v + width, vocab)) for v in range(0, vocab, width)]
        self.cells_at_once = max(1, entries // (4 * vocab))

    def cells(self, tensor: Tensor, last: int = 0) -> Tensor:
        """View of this block in a (B, T, U+1) tensor, or with ``last`` -1 in a (B, T, U) one."""
        return tensor[self.utts, : self.shape[1], : self.shape[2] + last]

    def clear_outside(self, cells: Tensor, first: int = 0) -> Tensor:
        """Zero what lies beyond an utterance, in place; (N, T, U+1 - first) starts at ``first``."""
        if self.no_frame is not None:
            cells.masked_fill_(self.no_frame, 0)
        if self.no_position is not None and cells.size(2) > 1:
            cells.masked_fill_(self.no_position[:, first:].transpose(1, 2), 0)
        return cells

    def target_scores(self) -> Tensor:
        """(N, T, U) a[t, y[u+1]] + lm_scale * l[u, y[u+1]]."""
        index = self.targets[:, None].expand(-1, self.shape[1], -1)
        scores = self.acoustic.gather(2, index).to(self.dtype)
        if self.lm is not None:
            chosen = self.lm[:, :-1].gather(2, self.targets[:, :, None])
            scores.add_(chosen.transpose(1, 2), alpha=self.lm_scale)
        return scores

    def peaks(self) -> tuple[Tensor, Tensor]:
        """Largest exponents of the two factors, (N, T, 1) and (N, W, 1)."""
        acoustic = _peak(self.acoustic, 1.0, self.dtype)
        if self.lm is None:
            return acoustic, acoustic.new_zeros((self.shape[0], 1, 1))
        return acoustic, _peak(self.lm, self.lm_scale, self.dtype)

    def factors(self, peaks: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunks of labels with exp(a - peak) (N, T, C) and exp(lm_scale * l - peak) (N, W, C).

        Both live in buffers that the next chunk overwrites.
        """
        num_utts, num_frames, num_positions = self.shape
        width = self.chunks[0].stop
        acoustic_buffer = peaks[0].new_empty((num_utts, num_frames, width))
        lm_buffer = peaks[1].new_ones((num_utts, peaks[1].size(1), width))
        for labels in self.chunks:
            acoustic = acoustic_buffer[:, :, : labels.stop - labels.start]
            lm = lm_buffer[:, :, : labels.stop - labels.start]
            _exp(self.acoustic[:, :, labels], 1.0, peaks[0], self.no_frame, out=acoustic)
            if self.lm is not None:
                _exp(self.lm[:, :, labels], self.lm_scale, peaks[1], self.no_position, out=lm)
            yield labels, acoustic, lm

    def targets_in(self, labels: slice) -> tuple[Tensor, Tensor]:
        """Index of the targets within a chunk (N, U), and whether they are in it (N, U)."""
        index = self.targets - labels.start
        width = labels.stop - labels.start
        return index.clamp(0, width - 1), (index >= 0) & (index < width)

    def slabs(self, cells: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
        """Listed cells (M, 3), a few at a time: (n, t, u), each (m,), and s[t, u, :] (m, V)."""
        for part in cells.split(self.cells_at_once):
            n, t, u = part.unbind(1)
            logits = self.acoustic[n, t].to(self.dtype)
            if self.lm is not None:
                logits.add_(self.lm[n, u], alpha=self.lm_scale)
            yield (n, t, u), logits


def _blocks(inputs: _Inputs) -> list[_Block]:
    """Neighbouring utterances together, as many as one temporary holds; at least one."""
    on_cpu = inputs.acoustic.device.type == "cpu"
    entries = _CPU_ENTRIES if on_cpu else _ACCELERATOR_ENTRIES
    vocab = inputs.acoustic.size(2)
    starts, longest = [], 0
    for b, length in enumerate(inputs.frame_lengths):
        longest = max(longest, length)
        if not starts or (b + 1 - starts[-1]) * longest * vocab > entries:
            starts.append(b)
            longest = length
    stops = [*starts[1:], len(inputs.frame_lengths)]
    return [_Block(inputs, slice(*ends), entries) for ends in zip(starts, stops)]


def _beyond(lengths: list[int], device: torch.device) -> Optional[Tensor]:
    """(N, max length, 1): the step is beyond the sequence; None: no step is."""
    if min(lengths) == max(lengths):
        return None
    steps = torch.arange(max(lengths), device=device)
    return (steps >= torch.tensor(lengths, device=device)[:, None]).unsqueeze(-1)


def _peak(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Maximum of scale * x over the labels, 0 where every label is masked; (N, rows, 1)."""
    peak = x.amax(-1, keepdim=True).to(dtype) * scale
    return peak.masked_fill_(peak == -torch.inf, 0.0)


def _exp(x: Tensor, scale: float, peak: Tensor, outside: Optional[Tensor], out: Tensor) -> None:
    torch.add(-peak, x, alpha=scale, out=out).exp_()
    if outside is not None:
        out.masked_fill_(outside, 0.0)  # whatever the padding holds, NaN included


class _LabelScores(torch.autograd.Function):
    """See :func:`label_scores`.

    With P[t,u,v] = exp(s[t,u,v] - log_norm[t,u]) and the incoming gradients g of score and h of
    log_norm, the gradient of a[t,v] is sum_u (h[t,u] P[t,u,v] + g[t,u] [v = y[u+1]]). Its first
    part is ``exp(a - peak) * ((h * exp(peaks - log_norm)) @ exp(lm_scale * l - peak))``. Likewise
    for l.
    """

    @staticmethod
    def forward(ctx, acoustic, lm, targets, frame_lengths, target_lengths, lm_scale):
        dtype = torch.promote_types(torch.promote_types(acoustic.dtype, lm.dtype), torch.float32)
        used_lm = lm if lm_scale else None
        inputs = _Inputs(acoustic, used_lm, targets, frame_lengths, target_lengths, lm_scale, dtype)
        log_norm = acoustic.new_zeros((*acoustic.shape[:2], lm.size(1)), dtype=dtype)
        score = torch.zeros_like(log_norm[:, :, 1:])
        # A sum this large has lost nothing to underflow that rounding would have kept.
        floor = acoustic.size(2) * torch.finfo(dtype).tiny / torch.finfo(dtype).eps
        blocks = _blocks(inputs)
        ctx.per_block = []  # peaks, exp(peaks - log_norm) (N, T, W), underflowing cells (M, 3)
        with exact_float32(acoustic.device.type):
            for block in blocks:
                # 1. The target's own score.
                block.cells(score, -1).copy_(block.target_scores())
                block.clear_outside(block.cells(score, -1), first=1)
                # 2. The sum over the labels as a matrix product, chunk by chunk.
                peaks = block.peaks()
                total = peaks[0].new_zeros((block.shape[0], peaks[1].size(1), block.shape[1]))
                for _, acoustic_exp, lm_exp in block.factors(peaks):
                    # The short factor first: a quarter faster than the transposed product on CPUs.
                    total.baddbmm_(lm_exp, acoustic_exp.transpose(1, 2))
                total = total.transpose(1, 2).contiguous()
                norm = block.cells(log_norm)
                norm.copy_(total.log() + peaks[0] + peaks[1].transpose(1, 2))
                # 3. Cells whose sum may have lost terms, one by one.
                lost = total < floor
                underflow = block.clear_outside(lost.expand(block.shape).clone()).nonzero()
                for cell, logits in block.slabs(underflow):
                    norm[cell] = logits.logsumexp(-1)
                block.clear_outside(norm)
                inverse = block.clear_outside(total.reciprocal_().masked_fill_(lost, 0.0))
                ctx.per_block.append((peaks, inverse, underflow))
        ctx.inputs = inputs._replace(acoustic=None, lm=None)
        ctx.save_for_backward(acoustic, lm, log_norm)
        return score, log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_score, grad_norm):
        acoustic, lm, log_norm = ctx.saved_tensors
        inputs = ctx.inputs._replace(acoustic=acoustic, lm=lm if ctx.inputs.lm_scale else None)
        grad_acoustic = grad_lm = None
        if ctx.needs_input_grad[0]:
            grad_acoustic = acoustic.new_empty(acoustic.shape)
        if ctx.needs_input_grad[1] and inputs.lm is None:
            grad_lm = torch.zeros_like(lm)
        elif ctx.needs_input_grad[1]:
            grad_lm = lm.new_empty(lm.shape)
        with exact_float32(acoustic.device.type):
            for block, (peaks, inverse, underflow) in zip(_blocks(inputs), ctx.per_block):
                g = block.clear_outside(block.cells(grad_score, -1).clone(), first=1)
                h = block.clear_outside(block.cells(grad_norm).clone())
                rows_acoustic = rows_lm = None
                if grad_acoustic is not None:
                    rows_acoustic = _rows(grad_acoustic, block.utts, block.shape[1])
                if grad_lm is not None and inputs.lm is not None:
                    rows_lm = _rows(grad_lm, block.utts, block.shape[2])
                weight = (h if inputs.lm is not None else h.sum(2, keepdim=True)) * inverse
                _backward_product(block, peaks, weight, g, rows_acoustic, rows_lm)
                norm = block.cells(log_norm)
                cells = tuple(underflow.unbind(1))
                worth = (h[cells] != 0) & (norm[cells] > -torch.inf)
                _backward_cells(block, underflow[worth], norm, h, rows_acoustic, rows_lm)
        return grad_acoustic, grad_lm, None, None, None, None


def _rows(grad: Tensor, utts: slice, length: int) -> Tensor:
    """View of a block's rows (N, length, V) of a new gradient; the rows beyond become zero."""
    grad[utts, length:] = 0.0
    return grad[utts, :length]


def _backward_product(
    block: _Block,
    peaks: tuple[Tensor, Tensor],
    weight: Tensor,
    grad_score: Tensor,
    grad_acoustic: Optional[Tensor],
    grad_lm: Optional[Tensor],
) -> None:
    """Fill the gradients of a block, (N, T, V) and (N, U+1, V), but for cells that underflow.

    ``weight`` (N, T, W) is the gradient of log_norm times exp(peaks - log_norm).
    """
    for labels, acoustic_exp, lm_exp in block.factors(peaks):
        index, inside = block.targets_in(labels)
        direct = grad_score * inside[:, None]  # (N, T, U)
        if grad_acoustic is not None:
            part = grad_acoustic[:, :, labels]
            out = _workspace(part, weight.dtype)
            torch.bmm(weight, lm_exp, out=out).mul_(acoustic_exp)
            out.scatter_add_(2, index[:, None].expand(direct.shape), direct)
            if out is not part:
                part.copy_(out)
        if grad_lm is not None:
            part = grad_lm[:, :, labels]
            out = _workspace(part, weight.dtype)
            torch.bmm(weight.transpose(1, 2), acoustic_exp, out=out).mul_(lm_exp)
            out[:, :-1].scatter_add_(2, index[:, :, None], direct.sum(1)[:, :, None])
            out.mul_(block.lm_scale)
            if out is not part:
                part.copy_(out)


def _workspace(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to compute ``part`` of a gradient in ``dtype``: in place if that is its dtype."""
    return part if part.dtype == dtype else part.new_empty(part.shape, dtype=dtype)


def _backward_cells(
    block: _Block,
    cells: Tensor,
    log_norm: Tensor,
    grad_norm: Tensor,
    grad_acoustic: Optional[Tensor],
    grad_lm: Optional[Tensor],
) -> None:
    """Add the gradients of log_norm in the listed cells (M, 3), label by label."""
    for (n, t, u), logits in block.slabs(cells):
        part = logits.sub_(log_norm[n, t, u, None]).exp_().mul_(grad_norm[n, t, u, None])
        if grad_acoustic is not None:
            grad_acoustic.index_put_((n, t), part.to(grad_acoustic.dtype), accumulate=True)
        if grad_lm is not None:
            part = (part * block.lm_scale).to(grad_lm.dtype)
            grad_lm.index_put_((n, u), part, accumulate=True)
