"""Draft and verify: the two ends of the threshold, against enumeration of all alternatives."""

import itertools
import math
import random

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.verify import DraftVerifier, Slot

VOCAB = 7  # labels 1..5


class TableLM:
    """Log-probs that depend on the whole prefix, by a hash of it."""

    def __init__(self, seed):
        self.seed = seed

    def row(self, prefix):
        generator = torch.Generator().manual_seed(hash((self.seed, *prefix)) % 2**31)
        return 2 * torch.randn(VOCAB, generator=generator)

    def __call__(self, ids):
        return torch.stack(
            [
                torch.stack([self.row(row[:n]) for n in range(1, len(row) + 1)])
                for row in ids.tolist()
            ]
        )

    def log_prob(self, labels, end=True):
        total = 0.0
        sequence = [VOCAB - 1, *labels, *[VOCAB - 1] * end]
        for n in range(1, len(sequence)):
            total += float(self.row(sequence[:n]).double().log_softmax(-1)[sequence[n]])
        return total


def make_slots(seed, number=4):
    rng = random.Random(seed)
    slots = []
    for _ in range(number):
        choices = rng.sample([(), (1,), (2,), (3,), (4,), (5,)], rng.randint(1, 3))
        slots.append(Slot(tuple(choices), tuple(-3 * rng.random() for _ in choices)))
    return slots


def verifier(seed, **options):
    options = {"lm_weight": 0.6, "label_bonus": 0.5, "beam_size": 1000, **options}
    return DraftVerifier(TableLM(seed), VOCAB, torch.device("cpu"), **options)


def total(lm, labels, acoustic, end=True):
    return acoustic + 0.6 * lm.log_prob(labels, end) + 0.5 * len(labels)


def exhaustive(seed, slots, allowed=None, end=True):
    """(total, labels) of the best choice; slots not ``allowed`` keep the draft's alternative."""
    lm, best = TableLM(seed), (-math.inf, ())
    choices = [
        range(len(slot.alternatives)) if allowed is None or n in allowed else [0]
        for n, slot in enumerate(slots)
    ]
    for chosen in itertools.product(*choices):
        labels = tuple(x for slot, c in zip(slots, chosen) for x in slot.alternatives[c])
        acoustic = sum(slot.scores[c] for slot, c in zip(slots, chosen))
        best = max(best, (total(lm, labels, acoustic, end), labels))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("end", [True, False])
def test_minus_infinity_is_full_decoding(seed, end):
    slots = make_slots(seed)
    (found,) = verifier(seed, threshold=-math.inf, score_end=end)([slots])
    best, labels = exhaustive(seed, slots, end=end)
    assert found.labels == labels
    assert found.total == pytest.approx(best, abs=1e-4)
    assert found.opened == sum(len(slot.alternatives) > 1 for slot in slots)


@pytest.mark.parametrize("seed", range(3))
def test_infinity_is_the_draft_for_one_forward(seed):
    drafts = [make_slots(seed), make_slots(seed + 10)]
    verify = verifier(seed, threshold=math.inf)
    for slots, found in zip(drafts, verify(drafts)):
        labels = tuple(x for slot in slots for x in slot.alternatives[0])
        acoustic = sum(slot.scores[0] for slot in slots)
        assert found.labels == labels and found.opened == 0
        assert found.acoustic == pytest.approx(acoustic)
        assert found.total == pytest.approx(total(TableLM(seed), labels, acoustic), abs=1e-4)
    assert verify.lm_calls == 1


def disagreements(seed, slots):
    """By the definition, with an LM score for every single question."""
    lm, found, before = TableLM(seed), [], []
    for slot in slots:
        local = [
            score
            + 0.6 * (lm.log_prob([*before, *a], False) - lm.log_prob(before, False))
            + 0.5 * len(a)
            for a, score in zip(slot.alternatives, slot.scores)
        ]
        found.append(max(local[1:]) - local[0] if len(local) > 1 else -math.inf)
        before += slot.alternatives[0]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_only_slots_above_the_threshold_change(seed):
    slots = make_slots(seed, 5)
    values = disagreements(seed, slots)
    for threshold in (-1.0, 0.0, 1.0):
        allowed = {n for n, value in enumerate(values) if value > threshold}
        (found,) = verifier(seed, threshold=threshold)([slots])
        best, labels = exhaustive(seed, slots, allowed)
        assert found.labels == labels and found.opened == len(allowed)
        assert found.total == pytest.approx(best, abs=1e-4)


def test_batch_is_each_alone_and_calls_are_shared():
    drafts = [make_slots(seed, number) for seed, number in ((1, 4), (2, 0), (3, 6), (4, 1))]
    together = verifier(7, threshold=-0.5, beam_size=2)
    found = together(drafts)
    alone = verifier(7, threshold=-0.5, beam_size=2)
    for slots, one in zip(drafts, found):
        (single,) = alone([slots])
        assert one.labels == single.labels and one.total == pytest.approx(single.total, abs=1e-5)
    assert together.lm_calls < alone.lm_calls
    assert together.lm_calls <= 1 + max(one.opened for one in found)
    assert found[1].labels == ()


def test_a_wider_beam_is_no_worse():
    for seed in range(5):
        slots = make_slots(seed, 6)
        totals = [
            verifier(seed, threshold=-math.inf, beam_size=size)([slots])[0].total
            for size in (1, 1000)
        ]
        assert totals[0] <= totals[1] + 1e-6


def test_what_is_refused():
    with pytest.raises(UserError, match="beam size 0"):
        verifier(0, beam_size=0)
    with pytest.raises(UserError, match="threshold is not a number"):
        verifier(0, threshold=math.nan)
