"""What every transducer search must show, and the slow reference it is compared with.

T frames, L labels, U labels of a sequence, S labels a frame at most.
"""

import itertools
import math
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np
import pytest
import torch

from espnet_llm_plugin.transducer.beam import Scales
from espnet_llm_plugin.transducer.search import TransducerSearch


class TableScorer:
    """A factorized transducer without networks: random scores looked up by label prefix.

    Prefix data are the label tuples themselves; every extension is counted.
    """

    def __init__(self, num_labels: int, seed: int, sharpness: float = 1.5, alpha: float = 1.0):
        self.num_labels = num_labels
        self.seed = seed
        self.sharpness = sharpness
        self.alpha = alpha
        self.extended: list[tuple[int, ...]] = []
        self.calls = 0

    def _random(self, labels: Sequence[int], size: int) -> torch.Tensor:
        seed = hash((self.seed, *labels)) % 2**31
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * self.sharpness

    def begin(self, encoder_out: torch.Tensor) -> None:
        self.acoustic = encoder_out[:, : self.num_labels]
        self.blank = encoder_out[:, self.num_labels]

    def root(self) -> tuple[int, ...]:
        return ()

    def extend(self, parents: Sequence[Any], labels: Sequence[int]) -> list[tuple[int, ...]]:
        assert len(parents) == len(labels) > 0
        self.calls += 1
        new = [(*parent, label) for parent, label in zip(parents, labels)]
        self.extended += new
        return new

    def scores(self, frame: int, prefixes: Sequence[Any]):
        rows = [self._random(prefix, self.num_labels + 1) for prefix in prefixes]
        lm = torch.stack([row[:-1] for row in rows]).log_softmax(-1)
        blank = self.blank[frame] + 0.3 * torch.stack([row[-1] for row in rows])
        labels = (self.acoustic[frame] + self.alpha * lm).log_softmax(-1)
        labels = labels + torch.nn.functional.logsigmoid(-blank)[:, None]
        return torch.nn.functional.logsigmoid(blank), labels, lm


class TableLM:
    """An external LM without a network: ``start`` and ``extend`` of ``ExternalLM``."""

    def __init__(self, num_labels: int, seed: int = 1000):
        self.table = TableScorer(num_labels, seed)
        self.extended: list[tuple[int, ...]] = []

    def row(self, labels: Sequence[int]) -> torch.Tensor:
        return self.table._random(labels, self.table.num_labels).log_softmax(-1)

    def start(self):
        return self.row(()), ()

    def extend(self, labels, states):
        new = [(*state, label) for state, label in zip(states, labels)]
        self.extended += new
        return torch.stack([self.row(labels) for labels in new]), new


class Case(NamedTuple):
    """A tiny model and an utterance for it."""

    scorer: Any
    encoder_out: torch.Tensor
    external_lm: Optional[Any] = None


def exact_scores(
    case: Case, scales: Scales, max_labels: int, max_symbols: Optional[int] = None
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Of every label sequence up to a length: log of the sum over alignments, best alignment.

    Slow on purpose: each sequence by itself, all ways to put its labels on frames.
    """
    scorer = case.scorer
    if scales.alpha is not None:
        scorer.alpha = scales.alpha
    scorer.begin(case.encoder_out)
    frames = case.encoder_out.size(0)
    data = {(): scorer.root()}
    state = {(): case.external_lm.start()} if case.external_lm else {}
    found = {}
    for length in range(max_labels + 1):
        for labels in itertools.product(range(scorer.num_labels), repeat=length):
            for end in range(1, length + 1):
                prefix = labels[:end]
                if prefix not in data:
                    data[prefix] = scorer.extend([data[prefix[:-1]]], [prefix[-1]])[0]
                    if case.external_lm:
                        rows, states = case.external_lm.extend(
                            [prefix[-1]], [state[prefix[:-1]][1]]
                        )
                        state[prefix] = (rows[0], states[0])
            prefixes = [data[labels[:u]] for u in range(length + 1)]
            blank, label = [], []
            for t in range(frames):
                b, v, lm = scorer.scores(t, prefixes)
                blank.append(b.tolist())
                row = []
                for u, y in enumerate(labels):
                    score = float(v[u, y]) + scales.label_bonus
                    if lm is not None and scales.beta:
                        score += scales.beta * float(lm[u, y])
                    if case.external_lm and scales.lm_weight:
                        score += scales.lm_weight * float(state[labels[:u]][0][y])
                    row.append(score)
                label.append(row)
            limit = length if max_symbols is None else max_symbols
            total, best = [0.0] + [-math.inf] * length, [0.0] + [-math.inf] * length
            for t in range(frames):
                new_total, new_best = [], []
                for u in range(length + 1):
                    ways = []
                    for emitted in range(min(u, limit) + 1):
                        score = sum(label[t][u - emitted : u]) + blank[t][u]
                        ways.append((u - emitted, score))
                    new_total.append(np.logaddexp.reduce([total[u0] + s for u0, s in ways]))
                    new_best.append(max(best[u0] + s for u0, s in ways))
                total, best = new_total, new_best
            found[labels] = (float(total[-1]), float(best[-1]))
    return found


def greedy_reference(case: Case, scales: Scales, max_symbols: int) -> tuple[tuple[int, ...], float]:
    """One hypothesis; at each step the best of the blank and all labels."""
    scorer = case.scorer
    if scales.alpha is not None:
        scorer.alpha = scales.alpha
    scorer.begin(case.encoder_out)
    prefix, labels, score = scorer.root(), [], 0.0
    external = case.external_lm.start() if case.external_lm else None
    for t in range(case.encoder_out.size(0)):
        for symbols in range(max_symbols + 1):
            blank, row, lm = scorer.scores(t, [prefix])
            row = row[0] + scales.label_bonus + (scales.beta * lm[0] if scales.beta else 0.0)
            if external:
                row = row + scales.lm_weight * external[0]
            if symbols == max_symbols or float(row.max()) <= float(blank[0]):
                score += float(blank[0])
                break
            label = int(row.argmax())
            score += float(row[label])
            labels.append(label)
            prefix = scorer.extend([prefix], [label])[0]
            if external:
                rows, states = case.external_lm.extend([label], [external[1]])
                external = (rows[0], states[0])
    return tuple(labels), score


class SearchContract:
    """Mixin: give ``case(seed)`` with 2-4 labels and about 3 frames.

    The references are those of transducers; a search over other alignments brings its own
    ``search``, ``exact``, ``greedy`` and ``alignment_score``, and sets tests without a meaning for
    it to None.
    """

    scales = Scales(beta=0.0, lm_weight=0.0, label_bonus=0.0)
    max_symbols = 2
    max_labels = 4
    tolerance = 1e-4

    def case(self, seed: int) -> Case:
        raise NotImplementedError

    def search(self, case: Case, beam_size: int, **kwargs) -> TransducerSearch:
        kwargs.setdefault("max_symbols_per_frame", self.max_symbols)
        return TransducerSearch(
            case.scorer, beam_size=beam_size, external_lm=case.external_lm, **kwargs
        )

    def exact(self, case: Case, scales: Scales) -> dict[tuple[int, ...], tuple[float, float]]:
        """Of label sequences: log of the sum over alignments, best alignment."""
        return exact_scores(case, scales, self.max_labels, self.max_symbols)

    def greedy(self, case: Case) -> tuple[tuple[int, ...], float]:
        """The only hypothesis of a beam of one, and its score."""
        return greedy_reference(case, self.scales, self.max_symbols)

    @pytest.fixture(params=range(4))
    def tiny(self, request) -> Case:
        return self.case(request.param)

    def test_wide_beam_sums_over_all_alignments(self, tiny):
        frames = tiny.encoder_out.size(0)
        exact = self.exact(tiny, self.scales)
        hyps = self.search(tiny, 2000)(tiny.encoder_out, self.scales, nbest=10**6)
        found = {h.labels: h.total for h in hyps}
        assert len(found) == len(hyps), "one label sequence twice"
        assert frames * self.max_symbols >= self.max_labels, "case too short for the test"
        for labels, (total, _) in exact.items():
            assert found[labels] == pytest.approx(total, abs=self.tolerance), labels

    def test_wide_beam_finds_the_best_sequence(self, tiny):
        exact = self.exact(tiny, self.scales)
        best = max(exact, key=lambda labels: exact[labels][0])
        hyp = self.search(tiny, 300)(tiny.encoder_out, self.scales)[0]
        assert hyp.total >= exact[best][0] - self.tolerance
        if len(hyp.labels) <= self.max_labels:
            assert hyp.labels == best

    def test_narrow_beam_never_exceeds_the_exact_score(self, tiny):
        exact = self.exact(tiny, self.scales)
        for beam in (1, 2, 4):
            for hyp in self.search(tiny, beam)(tiny.encoder_out, self.scales, nbest=beam):
                if hyp.labels in exact:
                    assert hyp.total <= exact[hyp.labels][0] + self.tolerance

    def test_wider_beams_are_not_worse(self):
        """In the mean over cases: a single case can lose by chance of pruning."""
        means = []
        for beam in (1, 2, 8, 64):
            scores = []
            for seed in range(12):
                case = self.case(100 + seed)
                scores.append(self.search(case, beam)(case.encoder_out, self.scales)[0].total)
            means.append(sum(scores) / len(scores))
        assert means == sorted(means)

    def test_beam_one_is_greedy(self, tiny):
        labels, score = self.greedy(tiny)
        hyp = self.search(tiny, 1)(tiny.encoder_out, self.scales)[0]
        assert hyp.labels == labels
        assert hyp.total == pytest.approx(score, abs=self.tolerance)

    def test_parts_add_up_and_frames_are_those_of_the_best_alignment(self, tiny):
        exact = self.exact(tiny, self.scales)
        without = Scales(alpha=self.scales.alpha)
        acoustic = self.exact(tiny, without)
        for hyp in self.search(tiny, 2000)(tiny.encoder_out, self.scales, nbest=40):
            parts = hyp.acoustic + hyp.lm + hyp.external_lm + hyp.bonus
            assert parts == pytest.approx(hyp.total, abs=self.tolerance)
            assert len(hyp.frames) == len(hyp.labels)
            assert list(hyp.frames) == sorted(hyp.frames)
            if hyp.labels in exact:
                assert hyp.acoustic == pytest.approx(acoustic[hyp.labels][0], abs=self.tolerance)
                aligned = self.alignment_score(tiny, hyp.labels, hyp.frames)
                assert aligned == pytest.approx(exact[hyp.labels][1], abs=self.tolerance)

    def alignment_score(self, case: Case, labels: Sequence[int], frames: Sequence[int]) -> float:
        scorer, scales = case.scorer, self.scales
        if scales.alpha is not None:
            scorer.alpha = scales.alpha
        scorer.begin(case.encoder_out)
        prefix, score, u = scorer.root(), 0.0, 0
        external = case.external_lm.start() if case.external_lm else None
        for t in range(case.encoder_out.size(0)):
            while u < len(labels) and frames[u] == t:
                _, row, lm = scorer.scores(t, [prefix])
                y = labels[u]
                score += float(row[0, y]) + scales.label_bonus
                if scales.beta:
                    score += scales.beta * float(lm[0, y])
                if external:
                    score += scales.lm_weight * float(external[0][y])
                    rows, states = case.external_lm.extend([y], [external[1]])
                    external = (rows[0], states[0])
                prefix = scorer.extend([prefix], [y])[0]
                u += 1
            score += float(scorer.scores(t, [prefix])[0][0])
        return score

    def test_at_most_so_many_labels_a_frame(self, tiny):
        for limit in (1, 2):
            search = self.search(tiny, 50, max_symbols_per_frame=limit)
            hyps = search(tiny.encoder_out, self.scales, nbest=50)
            counts = [max((h.frames.count(f) for f in h.frames), default=0) for h in hyps]
            assert max(counts) == limit

    def test_chunks_equal_the_whole(self, tiny):
        search = self.search(tiny, 6)
        whole = search(tiny.encoder_out, self.scales, nbest=6)
        state = search.start([self.scales])
        for frame in tiny.encoder_out:
            state = search.step(state, frame[None])
        chunked = state.nbest(6)[0]
        assert [(h.labels, h.frames) for h in chunked] == [(h.labels, h.frames) for h in whole]
        assert [h.total for h in chunked] == pytest.approx([h.total for h in whole], abs=1e-5)

    def test_settings_side_by_side_equal_each_alone(self, tiny):
        settings = [
            self.scales,
            Scales(alpha=self.scales.alpha, label_bonus=1.0),
            Scales(alpha=self.scales.alpha, beta=self.scales.beta / 2, label_bonus=-0.5),
        ]
        search = self.search(tiny, 5)
        state = search.step(search.start(settings), tiny.encoder_out)
        for scales, together in zip(settings, state.nbest(5)):
            alone = search(tiny.encoder_out, scales, nbest=5)
            assert [h.labels for h in together] == [h.labels for h in alone]
            assert [h.total for h in together] == pytest.approx(
                [h.total for h in alone], abs=self.tolerance
            )
