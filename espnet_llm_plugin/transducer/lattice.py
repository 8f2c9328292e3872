"""Transducer lattice with two classes a cell: blank (next frame) and the next label.

Dimensions: B utterances, T frames, U labels of the target; cell (t, u) = t frames consumed and u
labels emitted; D = T + U + 1 anti-diagonals of the lattice with its final row t = T.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Stand-in for log 0 in torchaudio's kernel, whose log-add of two -inf is NaN.
_LOG_ZERO = -1e30


def lattice_nll(
    blank_log_probs: Tensor,
    label_log_probs: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
) -> Tensor:
    """Negative log-likelihood of the targets, summed over all alignments.

    From cell (t, u) blank leads to (t+1, u) and label u+1 to (t, u+1); an alignment runs from
    (0, 0) to (T_b, U_b): its last symbol is the blank of the last frame (Graves 2012, section 2.4).

    Args:
        blank_log_probs: (B, T, U+1) log P(blank | t, u), nats. -inf is legal.
        label_log_probs: (B, T, U+1) log P(label u+1 | t, u), nats; entries with u >= target length
            are ignored. -inf is legal.
        frame_lengths: (B,) integers in [1, T].
        target_lengths: (B,) integers in [0, U].

    Returns:
        (B,) nats, in the dtype of the inputs; +inf (and zero gradient) where no alignment has a
        positive probability. Differentiable once in both log-probabilities.

    On a GPU float32 runs in torchaudio's kernel. Elsewhere both recursions run together in float64,
    one anti-diagonal a step: on a CPU that is faster than torchaudio's kernel and more exact.
    """
    if _has_kernel_for(blank_log_probs):
        return _torchaudio_nll(blank_log_probs, label_log_probs, frame_lengths, target_lengths)
    need_grad = torch.is_grad_enabled() and (
        blank_log_probs.requires_grad or label_log_probs.requires_grad
    )
    return _LatticeNLL.apply(
        blank_log_probs, label_log_probs, frame_lengths, target_lengths, need_grad
    )


def _has_kernel_for(log_probs: Tensor) -> bool:
    """Whether torchaudio's transducer kernel is the faster way for this tensor."""
    return (
        log_probs.is_cuda
        and log_probs.dtype == torch.float32
        and importlib.util.find_spec("torchaudio") is not None
    )


def _torchaudio_nll(blank: Tensor, label: Tensor, frame_lengths: Tensor, target_lengths: Tensor):
    from torchaudio.functional import rnnt_loss

    # The kernel wants lengths whose maxima are the tensor's sizes.
    num_frames, num_labels = int(frame_lengths.max()), int(target_lengths.max())
    log_probs = torch.stack([label, blank], dim=-1)[:, :num_frames, : num_labels + 1]
    nll = rnnt_loss(
        log_probs.clamp_min(_LOG_ZERO).contiguous(),
        log_probs.new_zeros((len(log_probs), num_labels), dtype=torch.int32),
        frame_lengths.to(log_probs.device, torch.int32),
        target_lengths.to(log_probs.device, torch.int32),
        blank=1,
        reduction="none",
        # The inputs are normalised over all labels; renormalising the pair would be silently wrong.
        fused_log_softmax=False,
    )
    return torch.where(nll > -0.5 * _LOG_ZERO, nll.new_tensor(float("inf")), nll)


class _LatticeNLL(torch.autograd.Function):
    """Forward and backward variables in one pass over the anti-diagonals.

    The lattice gets a final row t = T, and every utterance free transitions from its own end
    (T_b, U_b) to the corner (T, U): along the blanks of column U_b, then along the labels of row T.
    So a ragged batch is a batch of equal lattices, and the backward variables are the forward
    variables of the lattice read from the other corner.
    """

    @staticmethod
    def forward(ctx, blank, label, frame_lengths, target_lengths, need_grad):
        num_utts, num_frames, width = blank.shape
        frames = torch.arange(num_frames, device=blank.device)
        positions = torch.arange(width, device=blank.device)
        frame_lengths = frame_lengths.to(blank.device)[:, None, None]
        target_lengths = target_lengths.to(blank.device)[:, None, None]
        in_time = frames[:, None] < frame_lengths  # (B, T, 1)
        at_end = positions == target_lengths  # (B, 1, U+1)

        # 1. Transitions that exist: (B, T, U+1) blanks, (B, T+1, U) labels.
        blanks = blank.double().masked_fill(~in_time | (positions > target_lengths), -torch.inf)
        blanks.masked_fill_(~in_time & at_end, 0.0)
        labels = F.pad(label[:, :, :-1].double(), (0, 0, 0, 1))
        labels[:, :-1].masked_fill_(~in_time | (positions[:-1] >= target_lengths), -torch.inf)
        labels[:, -1].masked_fill_(positions[:-1] < target_lengths[:, 0], -torch.inf)

        # 2. The recursion; gradients need it from both corners.
        if not need_grad:
            return -_forward_variables(blanks, labels)[:, -1, -1].to(blank.dtype)
        variables = _forward_variables(
            torch.cat([blanks, blanks.flip(1, 2)]), torch.cat([labels, labels.flip(1, 2)])
        )
        alpha, beta = variables[:num_utts], variables[num_utts:].flip(1, 2)
        log_likelihood = alpha[:, -1, -1]

        # 3. Gradients = minus the posterior of each transition.
        total = log_likelihood[:, None, None]
        total = total.masked_fill(
            total == -torch.inf, torch.inf
        )  # impossible target: zero gradient
        blank_grad = blanks.add_(alpha[:, :-1]).add_(beta[:, 1:]).sub_(total).exp_().neg_()
        blank_grad.masked_fill_(~in_time, 0.0)
        label_grad = labels[:, :-1].add_(alpha[:, :-1, :-1]).add_(beta[:, :-1, 1:])
        label_grad = F.pad(label_grad.sub_(total).exp_().neg_(), (0, 1))
        ctx.save_for_backward(blank_grad.to(blank.dtype), label_grad.to(label.dtype))
        return -log_likelihood.to(blank.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll):
        blank_grad, label_grad = ctx.saved_tensors
        scale = grad_nll[:, None, None]
        return blank_grad * scale, label_grad * scale, None, None, None


def _forward_variables(blanks: Tensor, labels: Tensor) -> Tensor:
    """log sum over the paths from (0, 0) to each cell, (B, T+1, U+1).

    Args:
        blanks: (B, T, U+1) log weight of (t, u) -> (t+1, u).
        labels: (B, T+1, U) log weight of (t, u) -> (t, u+1).
    """
    num_utts, num_frames, width = blanks.shape
    num_diagonals = num_frames + width
    # arrivals[d, 0 | 1, b, u] = weight of the label | blank transition into cell (d - u, u).
    arrivals = blanks.new_full((num_diagonals, 2, num_utts, width), -torch.inf)
    _unskew(arrivals[:, 0])[:, :, 1:] = labels
    _unskew(arrivals[:, 1])[:, 1:] = blanks
    # variables[d, b, 1 + u] = cell (d - u, u); column 0 is the wall left of u = 0.
    variables = blanks.new_full((num_diagonals, num_utts, width + 1), -torch.inf)
    variables[0, :, 1] = 0.0
    # sources[d, 0 | 1, b, u] = cell (d - u + 1, u - 1) | (d - u, u), where those arrivals start.
    stride = variables.stride()
    sources = variables.as_strided(
        (num_diagonals, 2, num_utts, width), (stride[0], 1, stride[1], 1)
    )
    terms = torch.empty_like(arrivals[0])
    by_label, by_blank = terms.unbind(0)
    steps = zip(sources.unbind(0), arrivals.unbind(0)[1:], variables[1:, :, 1:].unbind(0))
    for source, arrival, cells in steps:
        torch.add(source, arrival, out=terms)
        torch.logaddexp(by_label, by_blank, out=cells)
    return _unskew(variables[:, :, 1:])


def _unskew(diagonals: Tensor) -> Tensor:
    """View (D, B, U+1) indexed by (t + u, b, u) as (B, T+1, U+1) indexed by (b, t, u)."""
    num_diagonals, num_utts, width = diagonals.shape
    by_diagonal, by_utt, by_label = diagonals.stride()
    return diagonals.as_strided(
        (num_utts, num_diagonals - width + 1, width),
        (by_utt, by_diagonal, by_diagonal + by_label),
        diagonals.storage_offset(),
    )
