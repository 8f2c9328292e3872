"""Draft and verify: an LM reads a greedy draft once and only what it doubts is decoded again.

A draft is a list of *slots*, each with competing label sequences (a label, another one, nothing)
and the recogniser's log-score of each; the draft takes the first of every slot. Slots come from
CTC posteriors or from a greedy transducer search (:mod:`espnet_llm_plugin.fusion.slots`). What is
maximised is, over one alternative for each slot,

    sum over slots of score(alternative)
      + lm_weight * log P_LM(all labels, end) + label_bonus * (number of labels).

1. **Verify.** One forward of the LM over the draft gives log P_LM of every alternative after the
   draft's labels before its slot. With ``local(a) = score(a) + lm_weight * log P_LM(a | draft
   before) + label_bonus * len(a)`` (log P_LM of nothing is 0), the disagreement of a slot is
   ``max over other alternatives of local(a) - local(draft's)``: above 0 where, all else as in the
   draft, another alternative would win.
2. **Decode again.** Slots whose disagreement exceeds ``threshold`` are opened: a beam search over
   their alternatives with exact LM scores of the whole prefixes. Slots in between are as in the
   draft. The hypotheses left at the end are compared by the full sum.

With ``threshold`` infinity the result is the draft; with minus infinity every slot that has
alternatives is open, which is full decoding over the slots. An utterance costs one forward of the
LM if no slot is opened, else one more for each open slot after the first, and one at the end; all
of these are batched over utterances and hypotheses.

B sequences, L tokens of the longest, V tokens of the list (sos/eos V-1), K hypotheses.
"""

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.sequence_scores import length_sorted_batches

Labels = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """A place of a draft.

    Attributes:
        alternatives: Token ids of each; the first are the draft's. None is longer than one label.
        scores: The recogniser's log-scores of these; comparable within a slot.
    """

    alternatives: tuple[Labels, ...]
    scores: tuple[float, ...]


class Verified(NamedTuple):
    """The result for an utterance.

    Attributes:
        labels: Token ids.
        total: The sum that is maximised.
        acoustic: The recogniser's part of it.
        lm: log P_LM, not weighed.
        opened: Slots that were opened.
    """

    labels: Labels
    total: float
    acoustic: float
    lm: float
    opened: int


class _Hypothesis(NamedTuple):
    labels: Labels
    acoustic: float


class DraftVerifier:
    """Verification of drafts with one LM.

    Args:
        forward: Token ids (B, L) beginning with sos to logits (B, L, V).
        vocab_size: V.
        device: Where the LM lives.
        threshold: See above.
        lm_weight: Of the LM.
        label_bonus: Added to every label.
        beam_size: Hypotheses kept after an open slot.
        score_end: Whether the LM's end symbol counts.
        batch_size: Sequences in one forward, at most.

    Attributes:
        lm_tokens: Tokens that the LM has read so far (padding included).
        lm_calls: Forwards so far.

    Raises:
        UserError: A beam below 1, or a threshold that is no number.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        vocab_size: int,
        device: torch.device,
        *,
        threshold: float = 0.0,
        lm_weight: float = 0.4,
        label_bonus: float = 0.0,
        beam_size: int = 4,
        score_end: bool = True,
        batch_size: int = 32,
    ):
        if beam_size < 1:
            raise UserError(f"beam size {beam_size}: at least 1 is needed")
        if math.isnan(threshold):
            raise UserError("the threshold is not a number")
        self._forward, self._vocab_size, self._device = forward, vocab_size, device
        self.threshold, self.lm_weight, self.label_bonus = threshold, lm_weight, label_bonus
        self.beam_size, self._score_end, self._batch_size = beam_size, score_end, batch_size
        self.lm_tokens = self.lm_calls = 0

    def __call__(self, drafts: Sequence[Sequence[Slot]]) -> list[Verified]:
        """Verify the drafts of some utterances together."""
        # 1. One forward over each draft; which slots to open.
        of_draft = [_draft(slots) for slots in drafts]
        asked = [_asked_of_draft(slots) for slots in drafts]
        rows = self._read([one.labels for one in of_draft], asked)
        of_slots = [_of_draft(row, slots) for slots, row in zip(drafts, rows)]
        opened = [self._opened(slots, lm) for slots, lm in zip(drafts, of_slots)]
        results = [
            self._result(one, row.prefix[-1] + row.end, 0) for one, row in zip(of_draft, rows)
        ]
        # 2. Open slots one after the other, the n-th of all utterances together.
        live = {i: [_Hypothesis((), 0.0)] for i, some in enumerate(opened) if some}
        done = dict.fromkeys(live, 0)  # slots before this one are decided
        for n in range(max((len(opened[i]) for i in live), default=0)):
            active = [i for i in live if n < len(opened[i])]
            for i in active:
                live[i] = _append(live[i], drafts[i][done[i] : opened[i][n]])
                done[i] = opened[i][n] + 1
            if n == 0:  # the prefixes are the drafts' own
                scored = {i: [of_slots[i][opened[i][0]]] for i in active}
            else:
                scored = self._prefixes(
                    {i: live[i] for i in active}, {i: drafts[i][opened[i][n]] for i in active}
                )
            for i in active:
                live[i] = self._branch(live[i], scored[i], drafts[i][opened[i][n]])
        # 3. The rest of the drafts, and the full sums.
        for i in live:
            live[i] = _append(live[i], drafts[i][done[i] :])
        flat = [(i, hyp) for i, hyps in live.items() for hyp in hyps]
        ends = self._read([hyp.labels for _, hyp in flat], [() for _ in flat])
        for i in live:
            found = [
                self._result(hyp, row.prefix[-1] + row.end, len(opened[i]))
                for (j, hyp), row in zip(flat, ends)
                if j == i
            ]
            results[i] = max(found, key=lambda one: one.total)
        return results

    def _opened(self, slots: Sequence[Slot], lm: Sequence[tuple[float, list[float]]]) -> list[int]:
        """Numbers of the slots whose disagreement is above the threshold."""
        if self.threshold == math.inf:
            return []
        return [
            n
            for n, slot in enumerate(slots)
            if len(slot.alternatives) > 1 and self.disagreement(slot, lm[n][1]) > self.threshold
        ]

    def disagreement(self, slot: Slot, lm: Sequence[float]) -> float:
        """How much better than the draft's the best other alternative looks at its place.

        Args:
            slot: With at least two alternatives.
            lm: log P_LM of its alternatives after the draft's labels before it.
        """
        local = [
            score + self.lm_weight * log_prob + self.label_bonus * len(alternative)
            for alternative, score, log_prob in zip(slot.alternatives, slot.scores, lm)
        ]
        return max(local[1:]) - local[0]

    def _branch(
        self,
        hyps: Sequence[_Hypothesis],
        scored: Sequence[tuple[float, Sequence[float]]],
        slot: Slot,
    ) -> list[_Hypothesis]:
        """The best extensions; of those with equal labels the one of the best score stays."""
        best: dict[Labels, tuple[float, _Hypothesis]] = {}
        for hyp, (prefix, lm) in zip(hyps, scored):
            for alternative, score, log_prob in zip(slot.alternatives, slot.scores, lm):
                new = _Hypothesis(hyp.labels + alternative, hyp.acoustic + score)
                total = self._total(new, prefix + log_prob)
                if new.labels not in best or total > best[new.labels][0]:
                    best[new.labels] = (total, new)
        ranked = sorted(best.values(), key=lambda pair: -pair[0])
        return [hyp for _, hyp in ranked[: self.beam_size]]

    def _total(self, hyp: _Hypothesis, lm: float) -> float:
        return hyp.acoustic + self.lm_weight * lm + self.label_bonus * len(hyp.labels)

    def _result(self, hyp: _Hypothesis, lm: float, opened: int) -> Verified:
        return Verified(hyp.labels, self._total(hyp, lm), hyp.acoustic, lm, opened)

    def _prefixes(
        self, hyps: dict[int, list[_Hypothesis]], slots: dict[int, Slot]
    ) -> dict[int, list[tuple[float, list[float]]]]:
        """log P_LM of each hypothesis, and of the alternatives of a slot after it."""
        flat = [(i, hyp) for i, some in hyps.items() for hyp in some]
        asked = [((len(hyp.labels), _labels_of(slots[i])),) for i, hyp in flat]
        found: dict[int, list[tuple[float, list[float]]]] = {i: [] for i in hyps}
        for (i, hyp), row in zip(flat, self._read([hyp.labels for _, hyp in flat], asked)):
            place = len(hyp.labels)
            found[i].append((row.prefix[-1], row.alternatives(place, slots[i])))
        return found

    @torch.no_grad()
    def _read(
        self,
        sequences: Sequence[Labels],
        asked: Sequence[Sequence[tuple[int, Labels]]],
    ) -> list["_Rows"]:
        """Run the LM over label sequences.

        Args:
            sequences: Without sos and end.
            asked: For each, places and labels whose log-probs are wanted there.
        """
        found: list[_Rows] = [_Rows([0.0], 0.0, {})] * len(sequences)
        sos = self._vocab_size - 1
        lengths = [len(labels) + 1 for labels in sequences]
        for batch in length_sorted_batches(lengths, self._vocab_size, self._batch_size):
            longest = max(lengths[i] for i in batch)
            ids = torch.tensor(
                [[sos, *sequences[i], *[0] * (longest - lengths[i])] for i in batch],
                device=self._device,
            )
            log_probs = self._forward(ids).float().log_softmax(dim=-1)
            self.lm_calls += 1
            self.lm_tokens += ids.numel()
            following = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double()
            cumulated = following.cumsum(dim=1).tolist()
            ends = log_probs[..., sos].double().tolist()
            for row, i in enumerate(batch):
                places = [place for place, labels in asked[i] for _ in labels]
                labels = [label for _, some in asked[i] for label in some]
                picked = log_probs[row, places, labels].double().tolist()
                size = lengths[i]
                found[i] = _Rows(
                    [0.0, *cumulated[row][: size - 1]],
                    ends[row][size - 1] if self._score_end else 0.0,
                    dict(zip(zip(places, labels), picked)),
                )
        return found


class _Rows(NamedTuple):
    """What the LM says of a label sequence."""

    prefix: list[float]  # log P of the first 0, 1, ... labels
    end: float  # log P of the end
    asked: dict[tuple[int, int], float]  # (place, label) -> log P

    def alternatives(self, place: int, slot: Slot) -> list[float]:
        return [self.asked[place, labels[0]] if labels else 0.0 for labels in slot.alternatives]


def _labels_of(slot: Slot) -> Labels:
    return tuple(label for labels in slot.alternatives for label in labels)


def _draft(slots: Sequence[Slot]) -> _Hypothesis:
    return _append([_Hypothesis((), 0.0)], slots)[0]


def _append(hyps: Sequence[_Hypothesis], slots: Sequence[Slot]) -> list[_Hypothesis]:
    """Hypotheses followed by the draft's alternatives."""
    labels = tuple(label for slot in slots for label in slot.alternatives[0])
    acoustic = math.fsum(slot.scores[0] for slot in slots)
    return [_Hypothesis(hyp.labels + labels, hyp.acoustic + acoustic) for hyp in hyps]


def _asked_of_draft(slots: Sequence[Slot]) -> list[tuple[int, Labels]]:
    asked, place = [], 0
    for slot in slots:
        if len(slot.alternatives) > 1:
            asked.append((place, _labels_of(slot)))
        place += len(slot.alternatives[0])
    return asked


def _of_draft(row: _Rows, slots: Sequence[Slot]) -> list[tuple[float, list[float]]]:
    """For every slot log P_LM of the draft's labels before it, and of its alternatives there."""
    found, place = [], 0
    for slot in slots:
        choice = len(slot.alternatives) > 1
        found.append((row.prefix[place], row.alternatives(place, slot) if choice else []))
        place += len(slot.alternatives[0])
    return found
