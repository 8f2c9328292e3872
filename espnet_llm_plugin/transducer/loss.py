"""Loss of the factorized transducer, exact, without a tensor of T * U * V entries.

Dimensions: B utterances, T frames, U labels of the target, V labels of the vocabulary (no blank).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.lattice import lattice_nll
from espnet_llm_plugin.transducer.normalizer import label_scores

BLANK_NORMS = ("sigmoid", "softmax")
REDUCTIONS = ("mean", "sum", "none")


def factorized_rnnt_loss(
    acoustic_logits: Tensor,
    lm_log_probs: Tensor,
    blank_logits: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    lm_scale: float = 1.0,
    blank_norm: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of a factorized transducer, summed over all alignments.

    With s[t, u, v] = acoustic_logits[t, v] + lm_scale * lm_log_probs[u, v] and z = blank_logits:

    * ``blank_norm="sigmoid"``: P(blank) = sigmoid(z), P(v) = (1 - P(blank)) softmax_v(s) (hybrid
      autoregressive transducer, Variani et al. 2020; factorized in MHAT, Meng et al. 2022);
    * ``blank_norm="softmax"``: one softmax over [z, s] (factorized neural transducer, Chen et al.
      2022).

    Time and memory are those of the matrix products of (T, V) and (V, U), in float32 whatever TF32
    and autocast say (float64 if an input is); the result is that of the full tensor.

    Args:
        acoustic_logits: (B, T, V) unnormalised, any floating dtype. -inf masks a label.
        lm_log_probs: (B, U+1, V) log-probabilities of the next label after u labels. -inf masks a
            label; at lm_scale 0 they are ignored, masks included.
        blank_logits: (B, T, U+1).
        targets: (B, U) integers in [0, V); padding may hold anything.
        frame_lengths: (B,) integers in [1, T]. Padding never counts, whatever it holds.
        target_lengths: (B,) integers in [0, U].
        lm_scale: alpha, finite and >= 0.
        blank_norm: "sigmoid" or "softmax".
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        Scalar, or (B,) for reduction "none", in nats; +inf where the masks leave no alignment.
        Differentiable once in the three floating inputs.

    Raises:
        UserError: shapes that do not fit together, lengths or targets out of range, an unknown
            blank_norm or reduction.
    """
    check_reduction(reduction)
    blank_log_probs, label_log_probs = factorized_lattice(
        acoustic_logits,
        lm_log_probs,
        blank_logits,
        targets,
        frame_lengths,
        target_lengths,
        lm_scale=lm_scale,
        blank_norm=blank_norm,
    )
    nll = lattice_nll(blank_log_probs, label_log_probs, frame_lengths, target_lengths)
    return reduced(nll, reduction)


def factorized_lattice(
    acoustic_logits: Tensor,
    lm_log_probs: Tensor,
    blank_logits: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    lm_scale: float = 1.0,
    blank_norm: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the two transitions of every lattice cell.

    Arguments and errors as :func:`factorized_rnnt_loss`.

    Returns:
        log P(blank | t, u) and log P(y[u+1] | t, u), both (B, T, U+1), nats, float32 (float64 if an
        input is). The second is -inf for u >= target length, where no label is left. Cells beyond
        the lengths hold finite or -inf fillers, whatever the padding of the inputs holds.
    """
    lengths = _check(
        acoustic_logits,
        lm_log_probs,
        blank_logits,
        targets,
        frame_lengths,
        target_lengths,
        lm_scale,
        blank_norm,
    )
    device = acoustic_logits.device
    frames = torch.arange(acoustic_logits.size(1), device=device)
    positions = torch.arange(targets.size(1) + 1, device=device)
    no_label = positions >= target_lengths.to(device)[:, None]  # (B, U+1)
    no_position = positions > target_lengths.to(device)[:, None]  # (B, U+1)
    no_frame = frames >= frame_lengths.to(device)[:, None]  # (B, T)
    score, log_norm = label_scores(
        acoustic_logits,
        lm_log_probs,
        targets.to(device, torch.long).masked_fill(no_label[:, :-1], 0),
        lengths.frames,
        lengths.targets,
        float(lm_scale),
    )
    # One softmax over [z, s] is the sigmoid of z - logsumexp(s) over the label softmax.
    blank = blank_logits.to(score.dtype)
    blank = blank.masked_fill(no_frame[:, :, None] | no_position[:, None], 0.0)
    if blank_norm == "softmax":
        blank = blank - log_norm
    # A cell without any label left by the masks: the label is impossible, not undefined.
    label = score - log_norm[:, :, :-1].masked_fill(log_norm[:, :, :-1] == -math.inf, 0.0)
    label = F.pad(label, (0, 1)) + F.logsigmoid(-blank)
    return F.logsigmoid(blank), label.masked_fill(no_label[:, None], -math.inf)


def check_reduction(reduction: str) -> None:
    """Raise :class:`UserError` for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}.")


def reduced(nll: Tensor, reduction: str) -> Tensor:
    """Losses of utterances (B,) as ``reduction`` says."""
    if reduction == "none":
        return nll
    return nll.sum() if reduction == "sum" else nll.mean()


def check_blank_norm(blank_norm: str) -> None:
    """Raise :class:`UserError` for an unknown normalisation of the blank."""
    if blank_norm not in BLANK_NORMS:
        raise UserError(f"blank_norm is {blank_norm!r}; use one of {', '.join(BLANK_NORMS)}.")


class _Lengths(NamedTuple):
    frames: list[int]
    targets: list[int]


def _check(
    acoustic: Tensor,
    lm: Tensor,
    blank: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    lm_scale: float,
    blank_norm: str,
) -> _Lengths:
    """Refuse what does not fit together; the lengths as Python integers."""
    check_blank_norm(blank_norm)
    if not (math.isfinite(lm_scale) and lm_scale >= 0):
        raise UserError(f"lm_scale is {lm_scale}; it must be a finite number, zero or more.")
    if acoustic.dim() != 3 or 0 in acoustic.shape:
        raise UserError(
            f"acoustic_logits has shape {tuple(acoustic.shape)}; expected (B, T, V), no size 0."
        )
    if targets.dim() != 2:
        raise UserError(f"targets has shape {tuple(targets.shape)}; expected (B, U).")
    num_utts, num_frames, vocab = acoustic.shape
    num_labels = targets.size(1)
    expected = {
        "lm_log_probs": (lm, (num_utts, num_labels + 1, vocab), "(B, U+1, V)"),
        "blank_logits": (blank, (num_utts, num_frames, num_labels + 1), "(B, T, U+1)"),
        "targets": (targets, (num_utts, num_labels), "(B, U)"),
        "frame_lengths": (frame_lengths, (num_utts,), "(B,)"),
        "target_lengths": (target_lengths, (num_utts,), "(B,)"),
    }
    for name, (tensor, shape, legend) in expected.items():
        if tensor.shape != shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}; expected {legend} = {shape}, given "
                f"acoustic_logits (B, T, V) = {tuple(acoustic.shape)} and "
                f"targets (B, U) = {tuple(targets.shape)}."
            )
    for name, tensor in (
        ("acoustic_logits", acoustic),
        ("lm_log_probs", lm),
        ("blank_logits", blank),
    ):
        if not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.device != acoustic.device:
            raise UserError(
                f"{name} is on {tensor.device}, acoustic_logits on {acoustic.device}; "
                "move them to one device."
            )
    lengths = check_targets(targets, frame_lengths, target_lengths, num_frames, vocab)
    return _Lengths(*lengths)


def check_targets(
    targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor, num_frames: int, vocab: int
) -> tuple[list[int], list[int]]:
    """Lengths as Python integers; raises :class:`UserError` unless they and the labels are valid.

    Args:
        targets: (B, U) integers in [0, vocab) within the lengths.
        frame_lengths: (B,) integers in [1, num_frames].
        target_lengths: (B,) integers in [0, U].
        num_frames: T.
        vocab: V.
    """
    named = dict(targets=targets, frame_lengths=frame_lengths, target_lengths=target_lengths)
    for name, tensor in named.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UserError(f"{name} is {tensor.dtype}; expected integers.")
        if len(tensor) != len(targets):
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}; expected (B,) = ({len(targets)},)."
            )
    frames, labels = frame_lengths.tolist(), target_lengths.tolist()
    if not all(1 <= length <= num_frames for length in frames):
        raise UserError(f"frame_lengths is {frames}; each must be between 1 and T = {num_frames}.")
    if not all(0 <= length <= targets.shape[1] for length in labels):
        raise UserError(
            f"target_lengths is {labels}; each must be between 0 and U = {targets.shape[1]}."
        )
    for b, (row, length) in enumerate(zip(targets.tolist(), labels)):
        wrong = [label for label in row[:length] if not 0 <= label < vocab]
        if wrong:
            raise UserError(
                f"targets[{b}] contains {wrong[0]}; labels must be in [0, {vocab}): blank is not a "
                "label, so a token id is usually the label plus 1."
            )
    return frames, labels
