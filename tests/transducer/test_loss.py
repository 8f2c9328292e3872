"""The loss of the factorized transducer; dimensions as in ``loss_contract``."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espnet_llm_plugin.transducer import lattice, normalizer
from espnet_llm_plugin.transducer.loss import factorized_lattice, factorized_rnnt_loss
from tests.contracts.loss_contract import (
    LossContract,
    every_option,
    full_joint,
    gradients,
    make_batch,
)


class TestFactorizedLoss(LossContract):
    """As it comes: these small batches are one padded block."""

    def loss(self, *batch, **options):
        return factorized_rnnt_loss(*batch, **options)


class TestInSmallChunks(LossContract):
    """One utterance, a few labels and a single underflowing cell at a time."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(normalizer, "_CPU_ENTRIES", 20)

    def loss(self, *batch, **options):
        return factorized_rnnt_loss(*batch, **options)


class TestInTorchaudiosKernel(LossContract):
    """The lattice as on a GPU, the utterances in blocks of one or two."""

    @pytest.fixture(autouse=True)
    def kernel(self, monkeypatch):
        pytest.importorskip("torchaudio")
        monkeypatch.setattr(normalizer, "_CPU_ENTRIES", 70)
        monkeypatch.setattr(lattice, "_has_kernel_for", lambda x: x.dtype == torch.float32)

    def loss(self, *batch, **options):
        return factorized_rnnt_loss(*batch, **options)


@every_option
def test_lattice_is_the_full_joint_at_blank_and_target(options):
    batch = make_batch(dtype=torch.float64)
    blank, label = factorized_lattice(*batch, **options)
    for b in range(3):
        one = batch.utterance(b)
        expected = full_joint(one, **options)
        frames, positions = expected.shape[:2]
        torch.testing.assert_close(blank[b, :frames, :positions], expected[..., 0])
        for u in range(positions - 1):
            torch.testing.assert_close(label[b, :frames, u], expected[:, u, 1 + one.targets[0, u]])
        assert (label[b, :, positions - 1 :] == -torch.inf).all()


def test_long_float32_lattice_stays_exact():
    """Rounding of the recursion must not pile up over a minute of frames."""
    batch = make_batch((1500, 700), (300, 150), vocab=4)
    blank, label = (x.detach().requires_grad_() for x in factorized_lattice(*batch))
    actual = lattice.lattice_nll(blank, label, *batch[4:])
    exact = [x.detach().double().requires_grad_() for x in (blank, label)]
    expected = lattice.lattice_nll(*exact, *batch[4:])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(actual.sum(), (blank, label))
    for grad, reference in zip(ours, torch.autograd.grad(expected.sum(), exact)):
        torch.testing.assert_close(grad.double(), reference, rtol=1e-4, atol=1e-6)
    # Every frame is left by exactly one blank, every label emitted exactly once.
    torch.testing.assert_close(-ours[0][0].sum(1), torch.ones(1500), rtol=1e-5, atol=0)
    torch.testing.assert_close(-ours[1][0].sum(0)[:300], torch.ones(300), rtol=1e-5, atol=0)


class _Allocations(TorchDispatchMode):
    """Sizes, in entries, of the storages that operations return."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.by_storage = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _real(x)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if _real(x) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def _real(x) -> bool:
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize("lm_needs_grad", [True, False])
@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
def test_nothing_larger_than_a_gradient_is_allocated(monkeypatch, lm_needs_grad, blank_norm):
    frames, labels, vocab = 24, 20, 2000
    monkeypatch.setattr(normalizer, "_CPU_ENTRIES", 2000)
    batch = make_batch((frames, frames), (labels, labels), vocab=vocab)
    batch.lm.requires_grad_(lm_needs_grad)
    with _Allocations() as forward:
        loss = factorized_rnnt_loss(*batch, blank_norm=blank_norm)
    assert forward.largest < 2 * frames * vocab / 8
    with _Allocations() as backward:
        loss.backward()
    assert backward.largest == 2 * frames * vocab  # the gradient of the acoustic logits
    assert (batch.lm.grad is not None) == lm_needs_grad


def test_acoustic_gradient_is_not_computed_for_a_frozen_encoder(monkeypatch):
    monkeypatch.setattr(normalizer, "_CPU_ENTRIES", 500)
    batch = make_batch((24, 24), (2, 2), vocab=400)
    batch.acoustic.requires_grad_(False)
    loss = factorized_rnnt_loss(*batch)
    with _Allocations() as backward:
        loss.backward()
    assert backward.largest <= 2 * 3 * 400
    assert batch.lm.grad.abs().sum() > 0


def test_underflow_is_found_and_only_there():
    """The slow way is for cells that need it: count them."""
    batch = make_batch((2,), (1,), vocab=5)
    with torch.no_grad():
        batch.acoustic[:] = 0.0
        batch.lm[:] = 0.0
        batch.acoustic[0, 0, 2:] = -300.0  # frame 0 knows labels 0 and 1,
        batch.lm[0, 1, :2] = -300.0  # position 1 only the others
    score, _ = normalizer.label_scores(batch.acoustic, batch.lm, batch.targets, [2], [1], 1.0)
    ((_, inverse, underflow),) = score.grad_fn.per_block
    assert underflow.tolist() == [[0, 0, 1]]
    assert (inverse == 0).tolist() == [[[False, True], [False, False]]]
    loss = factorized_rnnt_loss(*batch)
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, batch))


@pytest.mark.parametrize("setting", ["ieee", "tf32", "none"])
def test_matmul_switches_are_put_back(setting):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        found = matmul.fp32_precision
        with normalizer.exact_float32("cpu"):
            assert matmul.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == "highest"
        assert matmul.fp32_precision == found
    finally:
        matmul.fp32_precision = before


def test_utterances_share_a_block_while_they_fit(monkeypatch):
    monkeypatch.setattr(normalizer, "_CPU_ENTRIES", 60)
    batch = make_batch((3, 3, 4, 12, 1), (2, 0, 1, 2, 1), vocab=5)
    targets = batch.targets.clamp_min(0)
    lengths = batch.frame_lengths.tolist(), batch.target_lengths.tolist()
    inputs = normalizer._Inputs(batch.acoustic, batch.lm, targets, *lengths, 1.0, torch.float32)
    blocks = normalizer._blocks(inputs)
    assert [(block.utts.start, block.utts.stop) for block in blocks] == [(0, 3), (3, 4), (4, 5)]
    assert [block.shape for block in blocks] == [(3, 4, 3), (1, 12, 3), (1, 1, 2)]
    assert [len(block.chunks) for block in blocks] == [1, 1, 1]
