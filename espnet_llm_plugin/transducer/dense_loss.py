"""Loss of an ordinary transducer, exact, without a tensor of B * T * (U+1) * V entries.

Dimensions: B utterances, T frames, U labels of the target, H width of the joint, V tokens, blank
among them; N cells (t, u) of the lattices, those within the lengths only, ordered by utterance,
frame and position.

The joint network is that of Graves et al. 2013, ESPnet and others::

    logits[t, u] = weight @ activation(encoder[t] + predictor[u]) + bias   (+ frame_logits[t])

The lattice needs two numbers of each cell, log P(blank) and log P(next label). They are computed
for a few cells at a time, and in the backward pass once more. There only those cells count which
some alignment passes with a probability above the rounding error: a diagonal band, and soon after
the start of training a narrow one. The forward pass has one matrix product of N * H * V
multiply-adds, the backward pass three for the cells of that band.
"""

import math
from typing import Callable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.lattice import lattice_nll
from espnet_llm_plugin.transducer.loss import check_reduction, check_targets, reduced

# Entries of the largest temporary, (n, V), and the fewest cells n that still make the matrix
# products efficient. On a CPU the temporary should stay in the caches.
_CPU_ENTRIES, _CPU_CELLS = 1 << 19, 128
_ACCELERATOR_ENTRIES, _ACCELERATOR_CELLS = 1 << 26, 1024


def dense_rnnt_loss(
    encoder_proj: Tensor,
    predictor_proj: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    frame_logits: Optional[Tensor] = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of a transducer with a dense joint, summed over all alignments.

    Equal to ``torchaudio.functional.rnnt_loss`` of the logits above, in less time and with memory
    for a few cells.

    Args:
        encoder_proj: (B, T, H) what the joint adds for a frame, any floating dtype.
        predictor_proj: (B, U+1, H) and after u labels.
        weight: (V, H) output layer of the joint.
        bias: (V,) or None.
        targets: (B, U) tokens in [0, V), not blank; padding may hold anything.
        frame_lengths: (B,) integers in [1, T]. Padding never counts, whatever it holds.
        target_lengths: (B,) integers in [0, U].
        blank: its token.
        activation: of the joint, entry by entry; without parameters.
        frame_logits: (B, T, V) added to the logits, from the frame alone.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        Scalar, or (B,) for reduction "none", in nats, float32 (float64 if an input is).
        Differentiable once in the floating inputs. Matrix products are float32, or what
        ``torch.set_float32_matmul_precision`` allows, autocast or not.

    Raises:
        UserError: shapes that do not fit together, lengths or targets out of range, an unknown
            reduction.
    """
    check_reduction(reduction)
    log_probs = dense_lattice(
        encoder_proj,
        predictor_proj,
        weight,
        bias,
        targets,
        frame_lengths,
        target_lengths,
        blank=blank,
        activation=activation,
        frame_logits=frame_logits,
    )
    return reduced(lattice_nll(*log_probs, frame_lengths, target_lengths), reduction)


def dense_lattice(
    encoder_proj: Tensor,
    predictor_proj: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    frame_logits: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the two transitions of every lattice cell.

    Arguments and errors as :func:`dense_rnnt_loss`.

    Returns:
        log P(blank | t, u) and log P(y[u+1] | t, u), both (B, T, U+1), nats, float32 (float64 if an
        input is). The second is -inf for u >= target length. Cells beyond the lengths hold -inf.
        In the backward pass cells whose gradient is below the rounding error of the largest one of
        their utterance are left out: together they matter less than that error.
    """
    tensors = {
        "encoder_proj": encoder_proj,
        "predictor_proj": predictor_proj,
        "weight": weight,
        "bias": bias,
        "frame_logits": frame_logits,
    }
    _check(tensors, targets, frame_lengths, target_lengths, blank)
    given = [x for x in tensors.values() if x is not None]
    exact = any(x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if exact else torch.float32
    inputs = [None if x is None else x.to(dtype) for x in tensors.values()]
    lattice = _lattice(encoder_proj, targets, frame_lengths, target_lengths)
    return _TransitionLogProbs.apply(*inputs, lattice, blank, activation)


class _Lattice(NamedTuple):
    """Where the cells of a batch are, and what may follow them."""

    inside: Tensor  # (B, T, U+1) whether a cell is within the lengths
    labels: Tensor  # (B, U+1) next label of each position, 0 where there is none
    no_label: Tensor  # (B, U+1) whether there is none

    def cells(self, chosen: Tensor) -> "_Cells":
        """Those that ``chosen`` (B, T, U+1) marks."""
        _, frames, width = chosen.shape
        flat = chosen.flatten().nonzero().squeeze(1)
        row = flat.div(width, rounding_mode="floor")
        position = row.div(frames, rounding_mode="floor") * width + flat - row * width
        return _Cells(flat, row, position, self.labels.flatten()[position])


class _Cells(NamedTuple):
    """Some cells, (N,) each."""

    flat: Tensor  # among B * T * (U+1)
    frames: Tensor  # rows of (B * T)
    positions: Tensor  # rows of (B * (U+1))
    labels: Tensor  # next labels

    def chunks(self, vocab: int) -> Iterator[tuple[slice, "_Cells"]]:
        """As many at a time as one temporary should hold."""
        on_cpu = self.flat.device.type == "cpu"
        entries = _CPU_ENTRIES if on_cpu else _ACCELERATOR_ENTRIES
        least = _CPU_CELLS if on_cpu else _ACCELERATOR_CELLS
        size = max(least, entries // vocab)
        for start in range(0, len(self.flat), size):
            part = slice(start, start + size)
            yield part, _Cells(*(x[part] for x in self))


def _lattice(
    encoder_proj: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor
) -> _Lattice:
    device = encoder_proj.device
    frame_lengths, target_lengths = frame_lengths.to(device), target_lengths.to(device)
    positions = torch.arange(targets.shape[1] + 1, device=device)
    in_time = torch.arange(encoder_proj.shape[1], device=device) < frame_lengths[:, None]
    in_text = positions <= target_lengths[:, None]
    no_label = positions >= target_lengths[:, None]
    labels = torch.nn.functional.pad(targets.to(device, torch.long), (0, 1))
    labels = labels.masked_fill(no_label, 0)
    return _Lattice(in_time[:, :, None] & in_text[:, None], labels, no_label)


class _TransitionLogProbs(torch.autograd.Function):
    """From the joint's inputs to log P(blank) and log P(next label) of every cell."""

    @staticmethod
    def forward(ctx, encoder, predictor, weight, bias, frame_logits, lattice, blank, activation):
        joint = _Joint(encoder, predictor, weight, bias, frame_logits, activation)
        cells = lattice.cells(lattice.inside)
        log_norm, at_blank, at_label = encoder.new_empty(3, len(cells.flat)).unbind(0)
        with torch.autocast(encoder.device.type, enabled=False):
            for part, chunk in cells.chunks(len(weight)):
                logits = joint.logits(chunk, joint.hidden(chunk))
                at_blank[part] = logits[:, blank]
                at_label[part] = logits.gather(1, chunk.labels[:, None]).squeeze(1)
                peak = logits.amax(dim=1)
                total = logits.sub_(peak[:, None]).exp_().sum(dim=1)
                log_norm[part] = total.log_().add_(peak)
        blank_log_probs, label_log_probs, norm = (
            encoder.new_full(lattice.inside.shape, -math.inf) for _ in range(3)
        )
        blank_log_probs.view(-1)[cells.flat] = at_blank - log_norm
        label_log_probs.view(-1)[cells.flat] = at_label - log_norm
        label_log_probs.masked_fill_(lattice.no_label[:, None], -math.inf)
        norm.view(-1)[cells.flat] = log_norm
        ctx.save_for_backward(encoder, predictor, weight, bias, frame_logits, norm)
        ctx.lattice, ctx.blank, ctx.activation = lattice, blank, activation
        return blank_log_probs, label_log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_blank, grad_label):
        *inputs, norm = ctx.saved_tensors
        joint = _Joint(*inputs, ctx.activation)
        grads = [
            torch.zeros_like(x) if wanted else None
            for x, wanted in zip(inputs, ctx.needs_input_grad)
        ]
        encoder_grad, predictor_grad, weight_grad, bias_grad, frame_logits_grad = grads
        needs_hidden = encoder_grad is not None or predictor_grad is not None

        # 1. The cells that matter.
        grad_label = grad_label.masked_fill(ctx.lattice.no_label[:, None], 0.0)
        size = (grad_blank.abs() + grad_label.abs()).masked_fill(~ctx.lattice.inside, 0.0)
        tolerance = torch.finfo(size.dtype).eps / size.shape[2]
        cells = ctx.lattice.cells(size > tolerance * size.amax(dim=(1, 2), keepdim=True))
        grad_blank, grad_label, log_norm = (
            x.flatten()[cells.flat] for x in (grad_blank, grad_label, norm)
        )
        # d log P(k) / d logits = (1 at k) - softmax, for both transitions together.
        grad_norm = -(grad_blank + grad_label)

        with torch.autocast(norm.device.type, enabled=False):
            for part, chunk in cells.chunks(len(joint.weight)):
                # 2. Gradient of the logits.
                with torch.set_grad_enabled(needs_hidden):
                    before = joint.before_activation(chunk).requires_grad_(needs_hidden)
                    hidden = joint.activation(before)
                grad = joint.logits(chunk, hidden.detach())
                grad.sub_(log_norm[part, None]).exp_().mul_(grad_norm[part, None])
                grad[:, ctx.blank] += grad_blank[part]
                grad.scatter_add_(1, chunk.labels[:, None], grad_label[part, None])
                # 3. Of the joint's inputs.
                if weight_grad is not None:
                    weight_grad.addmm_(grad.t(), hidden.detach())
                if bias_grad is not None:
                    bias_grad += grad.sum(dim=0)
                if frame_logits_grad is not None:
                    frame_logits_grad.flatten(0, 1).index_add_(0, chunk.frames, grad)
                if needs_hidden:
                    (grad,) = torch.autograd.grad(hidden, before, grad @ joint.weight)
                if encoder_grad is not None:
                    encoder_grad.flatten(0, 1).index_add_(0, chunk.frames, grad)
                if predictor_grad is not None:
                    predictor_grad.flatten(0, 1).index_add_(0, chunk.positions, grad)
        return *grads, None, None, None


class _Joint:
    """The joint network on some cells at a time."""

    def __init__(self, encoder, predictor, weight, bias, frame_logits, activation):
        self.encoder, self.predictor = encoder.flatten(0, 1), predictor.flatten(0, 1)
        self.weight, self.activation = weight, activation
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.frame_logits = None if frame_logits is None else frame_logits.flatten(0, 1)
        self._logits = weight.new_empty(0)

    def before_activation(self, cells: _Cells) -> Tensor:
        """(n, H)"""
        return self.encoder[cells.frames].add_(self.predictor[cells.positions])

    def hidden(self, cells: _Cells) -> Tensor:
        """(n, H)"""
        return self.activation(self.before_activation(cells))

    def logits(self, cells: _Cells, hidden: Tensor) -> Tensor:
        """(n, V), until the next call."""
        if self._logits.shape[:1] < hidden.shape[:1]:
            self._logits = hidden.new_empty(len(hidden), len(self.weight))
        logits = self._logits[: len(hidden)]
        torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        if self.frame_logits is not None:
            logits += self.frame_logits[cells.frames]
        return logits


def _check(
    tensors: dict[str, Optional[Tensor]],
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> None:
    """Refuse what does not fit together."""
    encoder, weight = tensors["encoder_proj"], tensors["weight"]
    if encoder.dim() != 3 or 0 in encoder.shape:
        raise UserError(
            f"encoder_proj has shape {tuple(encoder.shape)}; expected (B, T, H), no size 0."
        )
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise UserError(f"weight has shape {tuple(weight.shape)}; expected (V, H), V > 1.")
    if targets.dim() != 2:
        raise UserError(f"targets has shape {tuple(targets.shape)}; expected (B, U).")
    num_utts, num_frames, width = encoder.shape
    vocab, num_labels = len(weight), targets.shape[1]
    expected = {
        "predictor_proj": ((num_utts, num_labels + 1, width), "(B, U+1, H)"),
        "weight": ((vocab, width), "(V, H)"),
        "bias": ((vocab,), "(V,)"),
        "frame_logits": ((num_utts, num_frames, vocab), "(B, T, V)"),
    }
    for name, (shape, legend) in expected.items():
        if tensors[name] is not None and tensors[name].shape != shape:
            raise UserError(
                f"{name} has shape {tuple(tensors[name].shape)}; expected {legend} = {shape}, "
                f"given encoder_proj (B, T, H) = {tuple(encoder.shape)}, "
                f"weight (V, H) = {tuple(weight.shape)} and targets (B, U) = "
                f"{tuple(targets.shape)}."
            )
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor is not None and tensor.device != encoder.device:
            raise UserError(
                f"{name} is on {tensor.device}, encoder_proj on {encoder.device}; move them to "
                "one device."
            )
    if not 0 <= blank < vocab:
        raise UserError(f"blank is {blank}; expected a token in [0, {vocab}).")
    _, lengths = check_targets(targets, frame_lengths, target_lengths, num_frames, vocab)
    for b, (row, length) in enumerate(zip(targets.tolist(), lengths)):
        if blank in row[:length]:
            raise UserError(f"targets[{b}] contains {blank}, which is blank; blank is no label.")
