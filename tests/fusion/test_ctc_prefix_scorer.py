"""CTC prefix scores against all alignments written out, and against ESPnet's two scorers."""

import itertools
import math

import numpy as np
import pytest
import torch
from espnet.nets.ctc_prefix_score import CTCPrefixScore, CTCPrefixScoreTH
from torch.utils._python_dispatch import TorchDispatchMode

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_prefix_scorer import CTCPrefixScorer, ctc_prefix_score


def posteriors(shape, spread=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    return logits.log_softmax(-1).to(dtype)


def collapse(path, blank):
    """Labels of an alignment: repetitions joined, blanks removed."""
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def sequence_probabilities(log_probs, blank):
    """{labels: probability} of an utterance (T, V) from each of its V**T alignments."""
    total = {}
    for path in itertools.product(range(log_probs.size(1)), repeat=len(log_probs)):
        labels = collapse(path, blank)
        probability = math.exp(sum(float(log_probs[t, v]) for t, v in enumerate(path)))
        total[labels] = total.get(labels, 0.0) + probability
    return total


def log(probability):
    return math.log(probability) if probability > 0 else -math.inf


def walk(scorer, prefix, utterance=0):
    """State of one hypothesis, label by label."""
    state = scorer.initial_state().select(torch.tensor([utterance]))
    for label in prefix:
        state = scorer.extend(state, torch.tensor([0]), torch.tensor([label]))
    return state


PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (1, 2, 1), (2, 2, 2), (1, 2, 1, 2)]


@pytest.mark.parametrize("blank,eos", [(0, 3), (2, 0)])
def test_all_alignments_written_out(blank, eos):
    log_probs = posteriors((1, 5, 4))
    names = [v for v in range(4) if v not in (blank, eos)]
    # What eos has of the posteriors belongs to no hypothesis.
    log_probs[:, :, eos] = -math.inf
    log_probs = log_probs.log_softmax(-1)
    exact = sequence_probabilities(log_probs[0], blank)
    scorer = CTCPrefixScorer(log_probs, torch.tensor([5]), blank=blank, eos=eos)
    for prefix in PREFIXES:
        prefix = tuple(names[label - 1] for label in prefix)
        state = walk(scorer, prefix)
        psi = sum(p for labels, p in exact.items() if labels[: len(prefix)] == prefix)
        assert state.log_prefix.item() == pytest.approx(log(psi), abs=1e-12)
        scores = scorer.next_log_probs(state)[0]
        assert scores[blank] == -math.inf
        assert scores[eos].item() == pytest.approx(log(exact.get(prefix, 0.0) / psi), abs=1e-10)
        for label in names:
            longer = (*prefix, label)
            part = sum(p for labels, p in exact.items() if labels[: len(longer)] == longer)
            assert scores[label].item() == pytest.approx(log(part / psi), abs=1e-10)


def test_some_labels_are_the_columns_of_all():
    log_probs = posteriors((2, 12, 9))
    for top_k in (None, 3):
        scorer = CTCPrefixScorer(log_probs, torch.tensor([12, 9]), top_k=top_k)
        state = scorer.initial_state()
        first = scorer.labels[:, 1]
        for label in (None, first, first):
            if label is not None:
                state = scorer.extend(state, torch.arange(2), label)
            rows = torch.full((2, 9), -math.inf, dtype=torch.float64)
            rows.scatter_(1, scorer.labels, scorer.next_log_probs(state))
            every = torch.arange(9).expand(2, -1)
            torch.testing.assert_close(scorer.log_probs_of(state, every), rows)
            torch.testing.assert_close(scorer.end_log_probs(state), rows[:, 8])


def walk_with_espnet(log_probs, lengths, beams, steps, check):
    """Follow random labels, every third a repetition, in our scorer and in ESPnet's.

    ``check(state, prefixes, cumulative scores of ESPnet's in float64)`` at each step.
    """
    generator = torch.Generator().manual_seed(1)
    batch, _, num_labels = log_probs.shape
    espnet = CTCPrefixScoreTH(log_probs.double().clone(), lengths, 0, num_labels - 1)
    scorer = CTCPrefixScorer(log_probs, lengths)
    state = scorer.initial_state().select(torch.arange(batch).repeat_interleave(beams))
    prefixes = [[num_labels - 1] for _ in range(batch * beams)]
    theirs = None
    for step in range(steps):
        _, new = espnet(prefixes, theirs)
        check(scorer, state, prefixes, new[1])
        labels = torch.randint(1, num_labels - 1, (batch * beams,), generator=generator)
        if step % 3 == 2:
            labels = torch.tensor([prefix[-1] for prefix in prefixes])
        parents = torch.arange(beams).repeat(batch)
        theirs = espnet.index_select_state(new, (parents * num_labels + labels).view(batch, beams))
        state = scorer.extend(state, torch.arange(batch * beams), labels)
        prefixes = [prefix + [label] for prefix, label in zip(prefixes, labels.tolist())]


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("spread", [1.0, 6.0, 30.0])
def test_espnets_batch_scorer(dtype, atol, spread):
    """All labels and eos of a ragged batch with repeated labels; at 30 products underflow."""
    log_probs = posteriors((3, 40, 30), spread, dtype=dtype)
    lengths = torch.tensor([40, 33, 21])

    def check(scorer, state, prefixes, expected):
        ours = scorer.next_log_probs(state).double() + state.log_prefix[:, None]
        torch.testing.assert_close(ours[:, 1:], expected[:, 1:], atol=atol, rtol=1e-7)

    walk_with_espnet(log_probs, lengths, 4, 12, check)


def test_neither_sure_blanks_nor_unused_labels_are_summed_one_by_one(monkeypatch):
    """Labels below exp(-100) in every frame of blank, and rows of the CTC output masked out."""
    logits = posteriors((1, 30, 40), dtype=torch.float32)
    logits[:, :, 0] += 110.0
    logits[:, ::10, 0] -= 220.0
    logits[:, :, 20:39] = -torch.inf
    scorer = CTCPrefixScorer(logits.log_softmax(-1), torch.tensor([30]))
    direct = scorer._cells

    def cells(state, rows, columns, repetitions=True):
        assert repetitions, f"{len(rows)} sums of the matrix product were not trusted"
        return direct(state, rows, columns)

    monkeypatch.setattr(scorer, "_cells", cells)
    state = walk(scorer, [5, 5, 7])  # all three peaks: what follows is in frames of blank
    assert (scorer.next_log_probs(state)[0, 1:20] < -90).all()
    assert (scorer.next_log_probs(state)[0, 20:39] == -torch.inf).all()


def test_espnets_single_scorer():
    log_probs = posteriors((2, 40, 20), dtype=torch.float32)
    lengths = torch.tensor([40, 25])
    labels = np.arange(20)

    def check(scorer, state, prefixes, _):
        ours = scorer.next_log_probs(state).double() + state.log_prefix[:, None]
        for row, (prefix, utterance) in enumerate(zip(prefixes, state.utterances.tolist())):
            posterior = log_probs[utterance, : lengths[utterance]].numpy()
            single = CTCPrefixScore(posterior, 0, 19, np)
            forward = single.initial_state()
            for end in range(1, len(prefix)):
                _, states = single(prefix[:end], labels, forward)
                forward = states[prefix[end]]
            expected, _ = single(prefix, labels, forward)
            np.testing.assert_allclose(ours[row, 1:], expected[1:], atol=1e-4, rtol=0)

    walk_with_espnet(log_probs, lengths, 2, 5, check)


REDUCTIONS = [{}, {"top_k": 4}, {"compress_threshold": 0.8}]
REDUCTIONS += [{"top_k": 4, "compress_threshold": 0.8}]


@pytest.mark.parametrize("options", REDUCTIONS)
def test_batch_in_any_order_equals_each_alone(options):
    log_probs = posteriors((3, 30, 12), 5.0)
    lengths = torch.tensor([18, 30, 0])
    padded = log_probs.clone()
    padded[0, 18:] = math.nan
    padded[2] = math.nan
    batch = CTCPrefixScorer(padded, lengths, **options)
    # Hypotheses of the utterances alternate; some appear twice, one utterance once only.
    parents = torch.tensor([1, 0, 1, 2, 0, 0, 1])
    labels = batch.labels[parents, torch.tensor([1, 1, 2, 1, 2, 1, 1])]
    state = batch.extend(batch.initial_state(), parents, labels)
    scores = batch.next_log_probs(state)
    for row, (utterance, label) in enumerate(zip(parents.tolist(), labels.tolist())):
        frames = slice(0, int(lengths[utterance]))
        alone = CTCPrefixScorer(
            log_probs[utterance : utterance + 1, frames],
            lengths[utterance : utterance + 1],
            **options,
        )
        single = walk(alone, [label])
        assert alone.labels[0].tolist() == batch.labels[utterance].tolist()
        torch.testing.assert_close(single.log_prefix[0], state.log_prefix[row])
        torch.testing.assert_close(alone.next_log_probs(single)[0], scores[row])


@pytest.mark.parametrize("frames", [0, 4])
def test_no_frames_mean_the_empty_hypothesis(frames):
    scorer = CTCPrefixScorer(posteriors((1, frames, 5)), torch.tensor([0]))
    scores = scorer.next_log_probs(scorer.initial_state())
    assert scores[0].tolist() == [-math.inf] * 4 + [0.0]


def test_impossible_hypotheses():
    """Blank, eos, labels that are not kept or too many: -inf, and -inf ever after."""
    log_probs = posteriors((1, 3, 6))
    log_probs[:, :, 4] = -math.inf
    lengths = torch.tensor([3])
    scorer = CTCPrefixScorer(log_probs, lengths, top_k=2)
    dropped = next(label for label in range(1, 5) if label not in scorer.labels)
    kept = int(scorer.labels[0, 1])
    every = CTCPrefixScorer(log_probs, lengths)
    hypotheses = [(scorer, [label]) for label in (0, 5, dropped)]
    hypotheses += [(scorer, [kept] * 3), (every, [4]), (every, [1, 2, 3, 1])]
    for one, labels in hypotheses:
        state = walk(one, labels)
        assert state.log_prefix.item() == -math.inf
        assert (one.next_log_probs(state) == -math.inf).all()
        longer = one.extend(state, torch.tensor([0]), torch.tensor([kept]))
        assert longer.log_prefix.item() == -math.inf
    assert walk(scorer, [kept] * 2).log_prefix.item() > -math.inf
    assert every.next_log_probs(every.initial_state())[0, 4] == -math.inf


def test_extending_and_scoring_leave_a_state_as_it_was():
    scorer = CTCPrefixScorer(posteriors((2, 10, 6)), torch.tensor([10, 7]))
    state = scorer.extend(scorer.initial_state(), torch.tensor([0, 1]), torch.tensor([2, 3]))
    before = [tensor.clone() for tensor in vars(state).values()]
    first = scorer.next_log_probs(state)
    scorer.extend(state, torch.tensor([1, 0, 0]), torch.tensor([3, 2, 1]))
    scorer.log_probs_of(state, torch.tensor([[2], [5]]))
    for tensor, old in zip(vars(state).values(), before):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0)
    torch.testing.assert_close(scorer.next_log_probs(state), first, rtol=0, atol=0)


def test_a_long_utterance_keeps_its_precision():
    """Totals near -1e5 at 6,000 frames; single precision would leave steps of 0.01."""
    log_probs = posteriors((1, 6000, 10), 8.0)
    lengths = torch.tensor([6000])
    state32 = walk(CTCPrefixScorer(log_probs.float(), lengths), [3, 3, 5])
    state64 = walk(CTCPrefixScorer(log_probs.float().double(), lengths), [3, 3, 5])
    assert state64.forward[0, -1] < -4e4
    assert state32.log_prefix.item() == pytest.approx(state64.log_prefix.item(), abs=1e-6)
    scores32 = CTCPrefixScorer(log_probs.float(), lengths).next_log_probs(state32)
    scores64 = CTCPrefixScorer(log_probs.float().double(), lengths).next_log_probs(state64)
    torch.testing.assert_close(scores32.double(), scores64, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("options", REDUCTIONS)
def test_scores_of_whole_hypotheses_equal_the_ctc_loss(options):
    log_probs = posteriors((2, 25, 10))
    lengths = torch.tensor([25, 19])
    scorer = CTCPrefixScorer(log_probs, lengths, **options)
    utterances = torch.tensor([0, 1, 1, 0])
    columns = torch.tensor([[1, 2, 2, 1, 3], [3, 3, 3, 0, 0], [0, 0, 0, 0, 0], [2, 1, 0, 0, 0]])
    label_lengths = torch.tensor([5, 3, 0, 2])
    labels = scorer.labels[utterances].gather(1, columns)
    scores = ctc_prefix_score(scorer, utterances, labels, label_lengths)
    expected = -torch.nn.functional.ctc_loss(
        scorer.log_probs[utterances].transpose(0, 1),
        columns,
        scorer.lengths[utterances],
        label_lengths,
        reduction="none",
    )
    assert scores.shape == (4, 6)
    torch.testing.assert_close(scores.sum(1), expected)
    state = walk(scorer, labels[0, :2].tolist())
    third = scorer.log_probs_of(state, labels[:1, 2:3])[0, 0]
    torch.testing.assert_close(scores[0, 2], third)


def test_half_precision_posteriors():
    log_probs = posteriors((1, 20, 8), dtype=torch.bfloat16)
    half = CTCPrefixScorer(log_probs, torch.tensor([20]))
    full = CTCPrefixScorer(log_probs.float(), torch.tensor([20]))
    scores = half.next_log_probs(walk(half, [1, 2]))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full.next_log_probs(walk(full, [1, 2])))


class LargestTensor(TorchDispatchMode):
    """Entries of the largest new tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in returned if isinstance(returned, (tuple, list)) else [returned]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                storage = x.untyped_storage().nbytes() // x.element_size()
                self.entries = max(self.entries, storage)
        return returned


def test_memory_of_a_step_is_not_frames_times_hypotheses_times_labels():
    frames, hypotheses, num_labels = 40, 16, 300
    log_probs = posteriors((1, frames, num_labels), dtype=torch.float32)
    scorer = CTCPrefixScorer(log_probs, torch.tensor([frames]))
    state = scorer.initial_state().select(torch.zeros(hypotheses, dtype=torch.long))
    for label in (5, 5, 9):
        with LargestTensor() as largest:
            scorer.next_log_probs(state)
            rows = torch.arange(hypotheses)
            state = scorer.extend(state, rows, torch.full((hypotheses,), label))
        assert hypotheses * num_labels <= largest.entries
        assert largest.entries <= max(hypotheses * num_labels, hypotheses * (frames + 1))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"blank": 4}, "two different columns"),
        ({"eos": 5}, "two different columns"),
        ({"top_k": 0}, "top_k 0"),
        ({"compress_threshold": 1.5}, "compress_threshold 1.5"),
        ({"compress_threshold": -0.5}, "compress_threshold -0.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        CTCPrefixScorer(posteriors((1, 4, 5)), torch.tensor([4]), **options)
