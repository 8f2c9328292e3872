"""What every factorized transducer loss must show.

Dimensions: B utterances, T frames, U labels of the target, V labels (no blank).
"""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_llm_plugin.errors import UserError

OPTIONS = [
    dict(blank_norm=norm, lm_scale=scale)
    for norm in ("sigmoid", "softmax")
    for scale in (0.0, 0.6, 1.0)
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Batch(NamedTuple):
    acoustic: Tensor  # (B, T, V)
    lm: Tensor  # (B, U+1, V)
    blank: Tensor  # (B, T, U+1)
    targets: Tensor  # (B, U)
    frame_lengths: Tensor  # (B,)
    target_lengths: Tensor  # (B,)

    def to(self, dtype: torch.dtype) -> "Batch":
        """Fresh leaves of another dtype that require gradients."""
        leaves = (x.detach().to(dtype).requires_grad_() for x in self[:3])
        return Batch(*leaves, *self[3:])

    def utterance(self, b: int) -> "Batch":
        """One utterance without padding, as a batch of one."""
        frames, labels = int(self.frame_lengths[b]), int(self.target_lengths[b])
        return Batch(
            self.acoustic[b : b + 1, :frames],
            self.lm[b : b + 1, : labels + 1],
            self.blank[b : b + 1, :frames, : labels + 1],
            self.targets[b : b + 1, :labels],
            self.frame_lengths[b : b + 1],
            self.target_lengths[b : b + 1],
        )


def make_batch(
    frame_lengths=(5, 3, 4),
    target_lengths=(3, 2, 0),
    vocab=7,
    std=2.0,
    dtype=torch.float32,
    seed=0,
) -> Batch:
    """Random leaves; padding of the targets is -1, of the rest random."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_utts, frames, labels = len(frame_lengths), max(frame_lengths), max(target_lengths)
    targets = torch.randint(0, vocab, (num_utts, labels), generator=generator)
    for row, length in zip(targets, target_lengths):
        row[length:] = -1
    return Batch(
        random(num_utts, frames, vocab),
        random(num_utts, labels + 1, vocab).log_softmax(-1),
        random(num_utts, frames, labels + 1),
        targets,
        torch.tensor(frame_lengths),
        torch.tensor(target_lengths),
    ).to(dtype)


def full_joint(one: Batch, lm_scale: float, blank_norm: str) -> Tensor:
    """(T, U+1, 1+V) log-probabilities of one utterance, blank first: what ours never builds."""
    scores = one.acoustic[0, :, None]
    if lm_scale:
        scores = scores + lm_scale * one.lm[0]
    else:
        scores = scores.expand(-1, one.lm.size(1), -1)
    blank = one.blank[0, :, :, None]
    if blank_norm == "softmax":
        return torch.cat([blank, scores], -1).log_softmax(-1)
    labels = scores.log_softmax(-1) + F.logsigmoid(-blank)
    return torch.cat([F.logsigmoid(blank), labels], -1)


def sum_over_alignments(one: Batch, lm_scale: float, blank_norm: str) -> Tensor:
    """-log of the probability of each alignment, enumerated and added; scalar."""
    log_probs = full_joint(one, lm_scale, blank_norm)
    num_frames, num_labels = len(log_probs), one.targets.size(1)
    paths = []
    # The last symbol is the blank that leaves the last frame; the labels lie anywhere before it.
    for places in itertools.combinations(range(num_frames - 1 + num_labels), num_labels):
        t = u = 0
        path = log_probs.new_zeros(())
        for step in range(num_frames + num_labels):
            if step in places:
                path = path + log_probs[t, u, 1 + one.targets[0, u]]
                u += 1
            else:
                path = path + log_probs[t, u, 0]
                t += 1
        paths.append(path)
    return -torch.stack(paths).logsumexp(0)


def lattice_reference(one: Batch, lm_scale: float, blank_norm: str) -> Tensor:
    """The forward recursion on the full joint, cell by cell, differentiated by autograd; scalar."""
    log_probs = full_joint(one, lm_scale, blank_norm)
    num_frames, num_labels = len(log_probs), one.targets.size(1)
    alpha = {(0, 0): log_probs.new_zeros(())}
    for t, u in itertools.product(range(num_frames), range(num_labels + 1)):
        arrivals = []
        if t > 0:
            arrivals.append(alpha[t - 1, u] + log_probs[t - 1, u, 0])
        if u > 0:
            arrivals.append(alpha[t, u - 1] + log_probs[t, u - 1, 1 + one.targets[0, u - 1]])
        if arrivals:
            alpha[t, u] = torch.stack(arrivals).logsumexp(0)
    return -(alpha[num_frames - 1, num_labels] + log_probs[-1, -1, 0])


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    grads = torch.autograd.grad(loss, batch[:3], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, batch[:3])]


class LossContract:
    """Mixin; a subclass gives :meth:`loss`."""

    def loss(self, *batch: Tensor, **options) -> Tensor:
        """(acoustic, lm, blank, targets, frame_lengths, target_lengths, *, options) -> loss."""
        raise NotImplementedError

    def check_against_reference(self, batch: Batch, rtol: float, atol: float, **options) -> None:
        """Loss and gradients against the full joint in float64, utterance by utterance."""
        exact = batch.to(torch.float64)
        expected = torch.stack(
            [lattice_reference(exact.utterance(b), **options) for b in range(len(exact.acoustic))]
        )
        actual = self.loss(*batch, **options, reduction="none")
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=rtol, atol=atol)
        weights = torch.arange(1.0, 1.0 + len(actual))
        expected_grads = gradients((expected * weights).sum(), exact)
        for ours, reference in zip(gradients((actual * weights).sum(), batch), expected_grads):
            assert torch.isfinite(ours).all()
            torch.testing.assert_close(ours.double(), reference, rtol=rtol, atol=atol)

    @every_option
    def test_equals_the_sum_over_alignments(self, options):
        batch = make_batch(dtype=torch.float64)
        actual = self.loss(*batch, **options, reduction="none")
        expected = torch.stack(
            [sum_over_alignments(batch.utterance(b), **options) for b in range(3)]
        )
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    @every_option
    def test_gradcheck(self, options):
        batch = make_batch((3, 2), (2, 1), vocab=4, dtype=torch.float64)

        def loss(acoustic, lm, blank):
            return self.loss(acoustic, lm, blank, *batch[3:], **options, reduction="none")

        torch.autograd.gradcheck(loss, batch[:3])

    @every_option
    def test_float32_equals_the_full_joint_in_float64(self, options):
        self.check_against_reference(make_batch((9, 6), (4, 2), vocab=50), 1e-5, 1e-5, **options)

    @every_option
    def test_equals_torchaudio_on_the_full_joint(self, options):
        rnnt_loss = pytest.importorskip("torchaudio").functional.rnnt_loss
        batch = make_batch((11, 11), (6, 6), vocab=30)
        ones = [batch.utterance(b) for b in range(2)]
        expected = rnnt_loss(
            torch.stack([full_joint(one, **options) for one in ones]),
            (batch.targets + 1).int(),
            batch.frame_lengths.int(),
            batch.target_lengths.int(),
            blank=0,
            reduction="mean",
            fused_log_softmax=False,
        )
        actual = self.loss(*batch, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradients(actual, batch), gradients(expected, batch)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @every_option
    def test_finite_and_exact_at_large_logits(self, options):
        """Uniform over +-100, and acoustics and LM certain of different labels."""
        batch = make_batch((4, 3), (2, 1), vocab=12)
        with torch.no_grad():
            for x in batch[:3]:
                x.copy_((torch.rand(x.shape) * 2 - 1) * 100)
            batch.lm.copy_(batch.lm.log_softmax(-1))
            batch.acoustic[0] = -100.0
            batch.acoustic[0, :, 3] = 100.0
            batch.lm[0] = -100.0
            batch.lm[0, :, 5] = 0.0
        # float32 itself resolves 1e-5 of numbers of this size.
        self.check_against_reference(batch, 3e-5, 3e-4, **options)

    @every_option
    def test_ragged_batch_is_each_alone(self, options):
        batch = make_batch()
        with torch.no_grad():  # whatever the padding holds
            for b, (frames, labels) in enumerate(zip(batch.frame_lengths, batch.target_lengths)):
                batch.acoustic[b, frames:] = float("nan")
                batch.lm[b, labels + 1 :] = float("nan")
                batch.blank[b, frames:] = float("nan")
                batch.blank[b, :, labels + 1 :] = float("nan")
        together = self.loss(*batch, **options, reduction="none")
        together_grads = gradients(together.sum(), batch)
        for b in range(3):
            one = batch.utterance(b).to(torch.float32)
            alone = self.loss(*one, **options, reduction="none")
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-6, atol=1e-6)
            for whole, alone_grad in zip(together_grads, gradients(alone.sum(), one)):
                inside = tuple(slice(size) for size in alone_grad.shape[1:])
                torch.testing.assert_close(whole[b][inside], alone_grad[0], rtol=1e-5, atol=1e-6)
                outside = whole[b].clone()
                outside[inside] = 0.0
                assert (outside == 0).all()

    @every_option
    def test_empty_targets(self, options):
        batch = make_batch((4, 2), (0, 0))
        assert batch.targets.shape == (2, 0)
        self.check_against_reference(batch, 1e-5, 1e-5, **options)

    @pytest.mark.parametrize("options", [o for o in OPTIONS if o["lm_scale"]], ids=str)
    def test_masked_labels_are_labels_left_out(self, options):
        batch = make_batch((5, 4), (3, 2), vocab=9)
        kept = torch.tensor([0, 2, 3, 5, 6, 8])
        batch.targets[batch.targets >= 0] = kept[batch.targets[batch.targets >= 0] % len(kept)]
        masked = batch.to(torch.float32)
        with torch.no_grad():
            masked.lm[:, :, [1, 4]] = -torch.inf
            masked.acoustic[:, :, [4, 7]] = -torch.inf
        position = {int(label): i for i, label in enumerate(kept)} | {-1: -1}
        smaller = Batch(
            batch.acoustic[..., kept].detach().requires_grad_(),
            batch.lm[..., kept].detach().requires_grad_(),
            batch.blank,
            torch.tensor([[position[int(y)] for y in row] for row in batch.targets]),
            *batch[4:],
        )
        actual, expected = self.loss(*masked, **options), self.loss(*smaller, **options)
        torch.testing.assert_close(actual, expected)
        ours, reference = gradients(actual, masked), gradients(expected, smaller)
        torch.testing.assert_close(ours[0][..., kept], reference[0])
        torch.testing.assert_close(ours[1][..., kept], reference[1])
        torch.testing.assert_close(ours[2], reference[2])
        for grad in ours[:2]:
            assert (grad[..., [1, 4, 7]] == 0).all()

    @pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
    def test_scale_zero_is_no_lm(self, blank_norm):
        """Not even its masks, not even on a target; and nothing flows back into it."""
        batch = make_batch()
        without = Batch(batch.acoustic, torch.full_like(batch.lm, -torch.inf), *batch[2:])
        without.lm.requires_grad_()
        options = dict(lm_scale=0.0, blank_norm=blank_norm)
        actual = self.loss(*without, **options)
        torch.testing.assert_close(actual, self.loss(*batch, **options))
        assert (gradients(actual, without)[1] == 0).all()

    def test_target_masked_everywhere_is_impossible(self):
        batch = make_batch()
        with torch.no_grad():
            batch.lm[0, 1, batch.targets[0, 1]] = -torch.inf
        loss = self.loss(*batch, reduction="none")
        assert torch.isinf(loss).tolist() == [True, False, False]
        for grad in gradients(loss.sum(), batch):
            assert torch.isfinite(grad).all()
            assert (grad[0] == 0).all()

    def test_target_masked_in_some_frames_moves_to_the_others(self):
        """A label that only frame 2 may emit; every remaining alignment, enumerated."""
        batch = make_batch((4,), (1,), dtype=torch.float64)
        label = batch.targets[0, 0]
        with torch.no_grad():
            batch.acoustic[0, [0, 1, 3], label] = -torch.inf
        expected = sum_over_alignments(batch, 1.0, "sigmoid")
        for dtype in (torch.float64, torch.float32):
            typed = batch.to(dtype)
            actual = self.loss(*typed)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
            assert all(torch.isfinite(grad).all() for grad in gradients(actual, typed))

    def test_blank_certainty_is_not_clamped(self):
        """log(1 - P(blank)) at z = 200 is -200."""
        batch = make_batch((1,), (1,), vocab=1)
        with torch.no_grad():
            batch.blank[:] = 200.0
        torch.testing.assert_close(self.loss(*batch), torch.tensor(200.0))

    def test_reductions(self):
        batch = make_batch()
        each = self.loss(*batch, reduction="none")
        assert each.shape == (3,)
        torch.testing.assert_close(self.loss(*batch), each.mean())
        torch.testing.assert_close(self.loss(*batch, reduction="mean"), each.mean())
        torch.testing.assert_close(self.loss(*batch, reduction="sum"), each.sum())

    @every_option
    def test_no_alignment_is_worse_than_one(self, options):
        """With one label and one frame there is a single alignment: label, then blank."""
        batch = make_batch((1,), (1,), dtype=torch.float64)
        log_probs = full_joint(batch, **options)
        expected = -(log_probs[0, 0, 1 + batch.targets[0, 0]] + log_probs[0, 1, 0])
        torch.testing.assert_close(self.loss(*batch, **options), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_inputs_are_computed_in_float32(self, dtype):
        half = make_batch(vocab=40).to(dtype)
        same = half.to(torch.float32)
        actual, expected = self.loss(*half), self.loss(*same)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected)
        for ours, reference in zip(gradients(actual, half), gradients(expected, same)):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, reference.to(dtype), rtol=1e-2, atol=1e-6)

    def test_autocast_and_fast_matmul_change_nothing(self):
        batch = make_batch((40,), (20,), vocab=300)
        expected = self.loss(*batch)
        expected_grads = gradients(expected, batch)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16):
                actual = self.loss(*batch)
                grads = gradients(actual, batch)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.equal(actual, expected)
        for ours, reference in zip(grads, expected_grads):
            assert torch.equal(ours, reference)

    def test_backward_twice(self):
        batch = make_batch()
        loss = self.loss(*batch)
        first = torch.autograd.grad(loss, batch[:3], retain_graph=True)
        for one, two in zip(first, torch.autograd.grad(loss, batch[:3])):
            assert torch.equal(one, two)

    def test_without_gradients(self):
        batch = make_batch()
        with torch.no_grad():
            assert torch.allclose(self.loss(*batch), self.loss(*(x.detach() for x in batch)))
        assert not self.loss(*(x.detach() for x in batch)).requires_grad

    @pytest.mark.parametrize("wanted", [0, 1, 2])
    def test_gradient_of_one_input_alone(self, wanted):
        batch = make_batch()
        expected = gradients(self.loss(*batch), batch)[wanted]
        detached = [x.detach() for x in batch]
        detached[wanted].requires_grad_()
        (actual,) = torch.autograd.grad(self.loss(*detached), detached[wanted])
        torch.testing.assert_close(actual, expected)

    def test_strided_inputs(self):
        batch = make_batch()
        wide = torch.randn(3, 5, 9)
        wide[..., 1:-1] = batch.acoustic.detach()
        wide.requires_grad_()
        loss = self.loss(wide[..., 1:-1], *batch[1:])
        torch.testing.assert_close(loss, self.loss(*batch))
        (grad,) = torch.autograd.grad(loss, wide)
        torch.testing.assert_close(grad[..., 1:-1], gradients(self.loss(*batch), batch)[0])

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                dict(lm=torch.zeros(3, 3, 7)),
                r"lm_log_probs .* expected \(B, U\+1, V\) = \(3, 4, 7\)",
            ),
            (dict(blank=torch.zeros(3, 5, 3)), r"blank_logits .* = \(3, 5, 4\)"),
            (dict(acoustic=torch.zeros(5, 7)), r"acoustic_logits .* expected \(B, T, V\)"),
            (dict(acoustic=torch.zeros(0, 5, 7)), "no size 0"),
            (dict(targets=torch.zeros(9, dtype=torch.long)), r"targets .* expected \(B, U\)"),
            (dict(frame_lengths=torch.tensor([5, 3])), r"frame_lengths .* \(3,\)"),
            (dict(frame_lengths=torch.tensor([5, 0, 4])), "between 1 and T = 5"),
            (dict(frame_lengths=torch.tensor([6, 3, 4])), "between 1 and T = 5"),
            (dict(target_lengths=torch.tensor([4, 2, 0])), "between 0 and U = 3"),
            (dict(target_lengths=torch.tensor([3, -1, 0])), "between 0 and U = 3"),
            (dict(target_lengths=torch.tensor([3, 3, 0])), r"targets\[1\] contains -1"),
            (dict(targets=torch.full((3, 3), 7)), r"targets\[0\] contains 7.*in \[0, 7\)"),
            (dict(targets=torch.zeros(3, 3)), "targets is torch.float32; expected integers"),
            (dict(lm=torch.zeros(3, 4, 7, dtype=torch.long)), "expected a floating-point tensor"),
        ],
    )
    def test_refuses_inputs_that_do_not_fit(self, change, message):
        batch = make_batch()._replace(**change)
        with pytest.raises(UserError, match=message):
            self.loss(*batch)

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(blank_norm="hat"), "blank_norm is 'hat'; use one of sigmoid, softmax"),
            (dict(reduction="batch"), "reduction is 'batch'; use one of mean, sum, none"),
            (dict(lm_scale=-0.5), "lm_scale is -0.5"),
            (dict(lm_scale=float("nan")), "lm_scale is nan"),
        ],
    )
    def test_refuses_unknown_options(self, options, message):
        with pytest.raises(UserError, match=message):
            self.loss(*make_batch(), **options)
