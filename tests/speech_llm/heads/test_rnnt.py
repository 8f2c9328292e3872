"""The transducer head: its loss against the full tensor, its greedy decoding step by step."""

import itertools

import pytest
import torch
import torchaudio
from espnet2.torch_utils.initialize import initialize

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.heads import joints
from espnet_llm_plugin.speech_llm.heads.history import HISTORIES, build_history
from espnet_llm_plugin.speech_llm.heads.rnnt import RNNTHead
from espnet_llm_plugin.speech_llm.heads.vocabulary import label_vocabulary
from espnet_llm_plugin.speech_llm.units import label_units
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native

WIDTH = 6
every_head = pytest.mark.parametrize(
    "options",
    [dict(predictor=p, joint=j) for p, j in itertools.product(HISTORIES, joints.JOINTS)],
    ids=str,
)


@pytest.fixture(scope="module", params=["adapted", "native"])
def vocabulary(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llm") / "llm"
    if request.param == "adapted":
        units = label_units(save_adapted(directory), len(TOKENS))
    else:
        llm = save_native(directory)
        units = label_units(llm, len(native_token_list(llm)))
    return label_vocabulary("key", "tokens", units)


def make(vocabulary, **options) -> RNNTHead:
    torch.manual_seed(1)
    return RNNTHead(vocabulary, WIDTH, predictor_dim=5, joint_dim=7, **options)


def batch():
    """The second text has more labels than frames, the third has none."""
    torch.manual_seed(0)
    text = torch.tensor([[3, 4, 4, 5], [6, 3, 5, -1], [-1, -1, -1, -1]])
    return torch.randn(3, 9, WIDTH), torch.tensor([9, 2, 6]), text, torch.tensor([4, 3, 0])


def full_logits(head, hs, labels):
    """(T, U+1, C) of one utterance, cell by cell: what the losses never build."""
    history = head.predictor(labels[None])[0]
    rows = [head.joint.scores(frame.expand(len(history), -1), history) for frame in hs]
    return torch.stack(rows)


@every_head
def test_loss_and_gradients_are_those_of_the_full_tensor(vocabulary, options):
    head = make(vocabulary, **options)
    hs, hlens, text, lengths = batch()
    hs.requires_grad_()
    loss = head.loss(hs, hlens, text, lengths)
    labels, counts = vocabulary.targets(text, lengths)
    expected = []
    for i in range(3):
        mine = labels[i, : counts[i]]
        expected.append(
            torchaudio.functional.rnnt_loss(
                full_logits(head, hs[i, : hlens[i]], mine)[None],
                mine[None].int(),
                hlens[i : i + 1].int(),
                counts[i : i + 1].int(),
                blank=0,
                reduction="sum",
            )
        )
    torch.testing.assert_close(loss.nll, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert loss.fits.all() and torch.equal(loss.counts, counts)
    torch.testing.assert_close(loss.reduced(by_length=True), sum(expected) / 7)
    torch.testing.assert_close(loss.reduced(by_length=False), sum(expected) / 3)
    inputs = [hs, *head.parameters()]
    ours = torch.autograd.grad(loss.nll.sum(), inputs)
    for grad, reference in zip(ours, torch.autograd.grad(sum(expected), inputs)):
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-5)


def test_factorized_joint_in_groups_of_utterances(vocabulary, monkeypatch):
    """As with an LLM's vocabulary, whose logits of a whole batch would not fit."""
    head = make(vocabulary, joint="factorized")
    hs, *data = batch()
    hs.requires_grad_()
    expected = head.loss(hs, *data)
    inputs = [hs, *head.parameters()]
    expected_grads = torch.autograd.grad(expected.nll.sum(), inputs)
    seen = []
    single = head.joint._nll
    monkeypatch.setattr(joints, "_ENTRIES", 1)
    monkeypatch.setattr(head.joint, "_nll", lambda *a: (seen.append(a[0].shape), single(*a))[1])
    found = head.loss(hs, *data)
    torch.testing.assert_close(found.nll, expected.nll)
    assert seen == [(1, 9, WIDTH), (1, 2, WIDTH), (1, 6, WIDTH)]
    for grad, reference in zip(torch.autograd.grad(found.nll.sum(), inputs), expected_grads):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-6)


def test_no_frame_is_left_out(vocabulary):
    head = make(vocabulary)
    hs, hlens, text, lengths = batch()
    loss = head.loss(hs, torch.tensor([0, 2, 6]), text, lengths)
    assert loss.fits.tolist() == [False, True, True] and loss.num_skipped == 1.0
    whole = head.loss(hs, hlens, text, lengths)
    assert loss.nll[0] == 0.0 and loss.counts.tolist() == [0, 3, 0]
    torch.testing.assert_close(loss.nll[1:], whole.nll[1:])


def test_outputs_in_half_precision(vocabulary):
    head = make(vocabulary)
    hs, *data = batch()
    found = head.loss(hs.bfloat16(), *data).nll
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head.loss(hs.bfloat16().float(), *data).nll)
    assert head.greedy(hs.bfloat16(), data[0]) == head.greedy(hs.bfloat16().float(), data[0])


@every_head
def test_mixed_precision(vocabulary, options):
    head = make(vocabulary, **options)
    hs, *data = batch()
    expected = head.loss(hs, *data).nll
    with torch.autocast("cpu", torch.bfloat16):
        found = head.loss(hs, *data)
        labels = head.greedy(hs, data[0])
    torch.testing.assert_close(found.nll, expected, rtol=0.05, atol=0.1)
    found.nll.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert len(labels) == 3


@pytest.mark.parametrize("predictor", HISTORIES)
def test_history_step_by_step_is_teacher_forced(predictor):
    torch.manual_seed(0)
    history = build_history(predictor, 8, 5)
    labels = torch.tensor([[3, 4, 4, 1], [7, 2, 5, 6]])
    expected = history(labels)
    features, state = history.start(2)
    torch.testing.assert_close(features, expected[:, 0])
    for u in range(4):
        # rows in another order, as the search has them
        features, state = history.step(labels[:, u].flip(0), state.flip(0))
        features, state = features.flip(0), state.flip(0)
        torch.testing.assert_close(features, expected[:, u + 1])
    # only the label before counts for one of them
    other = history(torch.tensor([[5, 4, 4, 1], [1, 2, 5, 6]]))
    assert torch.equal(other[:, 4], expected[:, 4]) == (predictor == "stateless")


def greedy_reference(head, hs, most=10):
    labels, t, here = [], 0, 0
    while t < len(hs):
        scores = full_logits(head, hs[t : t + 1], torch.tensor(labels, dtype=torch.long))[0, -1]
        best = int(scores.argmax())
        if best == 0 or here == most:
            t, here = t + 1, 0
        else:
            labels.append(best)
            here += 1
    return labels


@every_head
@pytest.mark.parametrize("blank", [-7.0, -1.0])
def test_greedy_is_that_of_each_utterance_alone(vocabulary, options, blank):
    head = make(vocabulary, **options)
    with torch.no_grad():  # more blanks, or fewer
        output = getattr(head.joint, "output", None) or head.joint.acoustic_output
        output.bias[0] += blank
    torch.manual_seed(3)
    hs, hlens = 3 * torch.randn(4, 9, WIDTH), torch.tensor([9, 0, 4, 1])
    expected = [greedy_reference(head, hs[i, : hlens[i]]) for i in range(4)]
    assert head.greedy(hs, hlens) == expected
    assert (expected[0] or blank > -7.0) and expected[1] == []


def test_greedy_writes_what_was_learnt(vocabulary):
    """Frames that name a label: the loss falls, and decoding reads them off."""
    head = RNNTHead(vocabulary, WIDTH, predictor="lstm")
    hs, _, text, lengths = batch()
    hlens = torch.tensor([9, 8, 6])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = head.loss(hs, hlens, text, lengths).reduced(True)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    labels, counts = vocabulary.targets(text, lengths)
    assert head.greedy(hs, hlens) == [row[:n] for row, n in zip(labels.tolist(), counts.tolist())]


@pytest.mark.parametrize("joint", joints.JOINTS)
def test_start_is_half_blank(vocabulary, joint):
    """A fresh head knows nothing, but not less: about as likely blank as a label."""
    head = make(vocabulary, joint=joint)
    for init in (lambda: None, lambda: initialize(head, "xavier_uniform")):
        init()
        features, _ = head.predictor.start(50)
        scores = head.joint.scores(torch.randn(50, WIDTH), features)
        assert 0.3 < scores.softmax(dim=1)[:, 0].mean() < 0.7


def test_unknown_parts(vocabulary):
    with pytest.raises(UserError, match="predictor is 'llm'; expected one of stateless, lstm"):
        make(vocabulary, predictor="llm")
    with pytest.raises(UserError, match="joint is 'sum'; expected one of dense, factorized"):
        make(vocabulary, joint="sum")
