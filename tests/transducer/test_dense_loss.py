"""The low-memory loss of a dense joint; dimensions as in ``dense_loss``."""

import itertools
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer import dense_loss
from espnet_llm_plugin.transducer.dense_loss import dense_lattice, dense_rnnt_loss


class Batch(NamedTuple):
    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor
    frame_logits: Optional[Tensor]
    targets: Tensor
    frame_lengths: Tensor
    target_lengths: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self[:5] if x is not None]

    def to(self, dtype) -> "Batch":
        return Batch(
            *(None if x is None else x.detach().to(dtype).requires_grad_() for x in self[:5]),
            *self[5:],
        )

    def utterance(self, b: int) -> "Batch":
        """One utterance without padding, as a batch of one."""
        frames, labels = int(self.frame_lengths[b]), int(self.target_lengths[b])
        return self._replace(
            encoder=self.encoder[b : b + 1, :frames],
            predictor=self.predictor[b : b + 1, : labels + 1],
            frame_logits=self.frame_logits[b : b + 1, :frames],
            targets=self.targets[b : b + 1, :labels],
            frame_lengths=self.frame_lengths[b : b + 1],
            target_lengths=self.target_lengths[b : b + 1],
        )

    def loss(self, **options) -> Tensor:
        return dense_rnnt_loss(*self[:4], *self[5:], frame_logits=self.frame_logits, **options)


def make_batch(
    frame_lengths=(5, 3, 4),
    target_lengths=(3, 2, 0),
    vocab=7,
    width=4,
    std=1.5,
    dtype=torch.float64,
    blank=0,
    seed=0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_utts, frames, labels = len(frame_lengths), max(frame_lengths), max(target_lengths)
    targets = torch.randint(0, vocab - 1, (num_utts, labels), generator=generator)
    targets += targets >= blank
    for row, length in zip(targets, target_lengths):
        row[length:] = -1
    return Batch(
        random(num_utts, frames, width),
        random(num_utts, labels + 1, width),
        random(vocab, width),
        random(vocab),
        random(num_utts, frames, vocab),
        targets,
        torch.tensor(frame_lengths),
        torch.tensor(target_lengths),
    ).to(dtype)


def full_logits(batch: Batch, activation=torch.tanh) -> Tensor:
    """(B, T, U+1, V): what the loss never builds."""
    hidden = activation(batch.encoder[:, :, None] + batch.predictor[:, None])
    return hidden @ batch.weight.T + batch.bias + batch.frame_logits[:, :, None]


def sum_over_alignments(one: Batch, blank=0, activation=torch.tanh) -> Tensor:
    """-log of the probability of each alignment, enumerated and added; scalar."""
    log_probs = full_logits(one, activation)[0].log_softmax(-1)
    num_frames, num_labels = len(log_probs), one.targets.size(1)
    paths = []
    # The last symbol is the blank that leaves the last frame; the labels lie anywhere before it.
    for places in itertools.combinations(range(num_frames - 1 + num_labels), num_labels):
        t = u = 0
        path = log_probs.new_zeros(())
        for step in range(num_frames + num_labels):
            if step in places:
                path = path + log_probs[t, u, one.targets[0, u]]
                u += 1
            else:
                path = path + log_probs[t, u, blank]
                t += 1
        paths.append(path)
    return -torch.stack(paths).logsumexp(0)


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(loss, batch.leaves))


@pytest.fixture(params=["one chunk", "two cells a chunk"], autouse=True)
def chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(dense_loss, "_CPU_ENTRIES", 1)
        monkeypatch.setattr(dense_loss, "_CPU_CELLS", 2)


@pytest.mark.parametrize(
    "activation",
    [torch.tanh, torch.relu, torch.nn.Hardtanh()],
    ids=["tanh", "relu", "hardtanh"],
)
@pytest.mark.parametrize("blank", [0, 3, 6])
def test_equals_the_sum_over_alignments(blank, activation):
    batch = make_batch(blank=blank)
    actual = batch.loss(blank=blank, activation=activation, reduction="none")
    expected = torch.stack(
        [sum_over_alignments(batch.utterance(b), blank, activation) for b in range(3)]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    weights = torch.tensor([1.0, 2.0, 3.0])
    for ours, reference in zip(
        gradients((actual * weights).sum(), batch), gradients((expected * weights).sum(), batch)
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    batch = make_batch((3, 2), (2, 1), vocab=4, width=3)

    def loss(*leaves):
        return Batch(*leaves, *batch[5:]).loss(reduction="none")

    torch.autograd.gradcheck(loss, batch[:5])


def test_gradcheck_of_the_transitions():
    """With any gradient flowing in, not only a loss's."""
    batch = make_batch((3, 2), (2, 1), vocab=4, width=3)
    weights = torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def weighted(*leaves):
        blank, label = dense_lattice(*leaves[:4], *batch[5:], frame_logits=leaves[4])
        found = torch.stack([blank, label])
        return found.masked_fill(found == -torch.inf, 0.0) * weights

    torch.autograd.gradcheck(weighted, batch[:5])


def test_float32_equals_torchaudio():
    rnnt_loss = pytest.importorskip("torchaudio").functional.rnnt_loss
    batch = make_batch((11, 11), (6, 6), vocab=30, width=8, dtype=torch.float32)
    expected = rnnt_loss(
        full_logits(batch),
        batch.targets.int(),
        batch.frame_lengths.int(),
        batch.target_lengths.int(),
        blank=0,
        reduction="mean",
    )
    torch.testing.assert_close(batch.loss(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(batch.loss(), batch), gradients(expected, batch)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_float32_is_as_good_as_float64():
    """On a lattice of which most cells matter to no gradient."""
    exact = make_batch((60, 45), (20, 16), vocab=30, width=8)
    batch = exact.to(torch.float32)
    actual, expected = batch.loss(), exact.loss()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    for ours, reference in zip(gradients(actual, batch), gradients(expected, exact)):
        assert (ours - reference).abs().max() < 3e-6 * reference.abs().max()


def test_ragged_batch_is_each_alone():
    batch = make_batch(dtype=torch.float32)
    with torch.no_grad():  # whatever the padding holds
        for b, (frames, labels) in enumerate(zip(batch.frame_lengths, batch.target_lengths)):
            batch.encoder[b, frames:] = float("nan")
            batch.frame_logits[b, frames:] = float("nan")
            batch.predictor[b, labels + 1 :] = float("nan")
    together = batch.loss(reduction="none")
    grads = gradients(together.sum(), batch)
    summed = [torch.zeros_like(x) for x in batch.leaves]
    for b in range(3):
        one = batch.utterance(b).to(torch.float32)
        alone = one.loss(reduction="none")
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-6, atol=1e-6)
        for total, grad in zip(summed, gradients(alone.sum(), one)):
            if grad.dim() == 3:
                total[b, : grad.shape[1]] += grad[0]
            else:
                total += grad
    for ours, reference in zip(grads, summed):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_no_text_at_all():
    batch = make_batch((4, 2), (0, 0))
    expected = -torch.stack(
        [
            full_logits(batch)[b, :frames, 0].log_softmax(-1)[:, 0].sum()
            for b, frames in enumerate((4, 2))
        ]
    )
    torch.testing.assert_close(batch.loss(reduction="none"), expected)


def test_without_bias_and_frame_logits():
    batch = make_batch()
    plain = batch._replace(
        bias=torch.zeros_like(batch.bias), frame_logits=torch.zeros_like(batch.frame_logits)
    )
    actual = dense_rnnt_loss(*batch[:3], None, *batch[5:])
    torch.testing.assert_close(actual, plain.loss())
    for ours, reference in zip(
        torch.autograd.grad(actual, batch[:3]), torch.autograd.grad(plain.loss(), batch[:3])
    ):
        torch.testing.assert_close(ours, reference)


def test_large_logits_are_finite():
    batch = make_batch(std=100.0)
    actual = batch.to(torch.float32).loss(reduction="none")
    expected = torch.stack([sum_over_alignments(batch.utterance(b)) for b in range(3)])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)
    single = batch.to(torch.float32)
    assert all(torch.isfinite(grad).all() for grad in gradients(single.loss(), single))


def test_masked_target_is_impossible_for_its_utterance_only():
    batch = make_batch(dtype=torch.float32)
    batch.targets[0, :3], batch.targets[1, :2] = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    with torch.no_grad():
        batch.bias[2] = -torch.inf
    loss = batch.loss(reduction="none")
    assert torch.isinf(loss).tolist() == [True, False, False]
    encoder_grad, *others = gradients(loss.sum(), batch)
    assert (encoder_grad[0] == 0).all() and encoder_grad[1].abs().sum() > 0
    assert all(torch.isfinite(grad).all() for grad in (encoder_grad, *others))


@pytest.mark.parametrize("wanted", range(5))
def test_gradient_of_one_input_alone(wanted):
    batch = make_batch()
    expected = gradients(batch.loss(), batch)[wanted]
    detached = Batch(*(x.detach() for x in batch))
    detached[wanted].requires_grad_()
    (actual,) = torch.autograd.grad(detached.loss(), detached[wanted])
    torch.testing.assert_close(actual, expected)


def test_backward_twice_without_gradients_and_reductions():
    batch = make_batch()
    loss = batch.loss()
    first = torch.autograd.grad(loss, batch.leaves, retain_graph=True)
    for one, two in zip(first, gradients(loss, batch)):
        assert torch.equal(one, two)
    with torch.no_grad():
        each = batch.loss(reduction="none")
    assert not each.requires_grad
    torch.testing.assert_close(loss.detach(), each.mean())
    torch.testing.assert_close(batch.loss(reduction="sum").detach(), each.sum())


def test_half_precision_and_autocast_are_computed_in_float32():
    batch = make_batch((20, 12), (8, 5), vocab=40, dtype=torch.bfloat16)
    same = batch.to(torch.float32)
    expected = same.loss()
    with torch.autocast("cpu", torch.bfloat16):
        actual = batch.loss()
        grads = gradients(actual, batch)
    assert torch.equal(actual, expected)
    for ours, reference in zip(grads, gradients(expected, same)):
        assert torch.equal(ours, reference.bfloat16())


class _Allocations(TorchDispatchMode):
    """Entries of the largest storage that operations return."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                entries = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, entries)
        return result


def test_nothing_as_large_as_the_full_tensor_is_allocated(monkeypatch):
    monkeypatch.setattr(dense_loss, "_CPU_CELLS", 8)
    batch = make_batch((24, 24), (20, 20), vocab=2000, width=2, dtype=torch.float32)
    batch = batch._replace(frame_logits=None)
    monkeypatch.setattr(dense_loss, "_CPU_ENTRIES", 8 * 2000)
    with _Allocations() as seen:
        batch.loss().backward()
    assert seen.largest == 8 * 2000
    assert batch.encoder.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encoder=torch.zeros(5, 4)), r"encoder_proj .* expected \(B, T, H\)"),
        (dict(weight=torch.zeros(7)), r"weight .* expected \(V, H\)"),
        (dict(weight=torch.zeros(7, 5)), r"weight .* = \(7, 4\)"),
        (dict(predictor=torch.zeros(3, 3, 4)), r"predictor_proj .* = \(3, 4, 4\)"),
        (dict(bias=torch.zeros(6)), r"bias .* = \(7,\)"),
        (dict(frame_logits=torch.zeros(3, 4, 7)), r"frame_logits .* = \(3, 5, 7\)"),
        (dict(bias=torch.zeros(7, dtype=torch.long)), "bias is torch.int64"),
        (dict(targets=torch.zeros(9, dtype=torch.long)), r"targets .* expected \(B, U\)"),
        (dict(targets=torch.zeros(3, 3)), "expected integers"),
        (dict(frame_lengths=torch.tensor([5, 3])), r"frame_lengths .* \(3,\)"),
        (dict(frame_lengths=torch.tensor([6, 3, 4])), "between 1 and T = 5"),
        (dict(target_lengths=torch.tensor([4, 2, 0])), "between 0 and U = 3"),
        (dict(targets=torch.full((3, 3), 7)), r"targets\[0\] contains 7.*in \[0, 7\)"),
        (dict(targets=torch.zeros(3, 3, dtype=torch.long)), "contains 0, which is blank"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_batch()._replace(**change).loss()


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="reduction is 'max'"):
        make_batch().loss(reduction="max")
    with pytest.raises(UserError, match="blank is 7"):
        make_batch().loss(blank=7)
