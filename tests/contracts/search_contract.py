"""What every transducer search must show, and the slow reference it is compared with.

T frames, L labels, U labels of a sequence, S labels a frame at most.
"""

import itertools
import math
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np
import pytest
import torch

from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.prefix_tree import ROOT
from espnet_llm_plugin.transducer.search import TransducerSearch


class TableScorer:
    """A factorized transducer without networks: random scores looked up by label prefix.

    Every prefix that the predictor is run for is counted. It is a ``TransducerScorer``.
    """

    blank_needs_predictor = False

    def __init__(self, num_labels: int, seed: int, sharpness: float = 1.5, alpha: float = 1.0):
        self.num_labels = num_labels
        self.seed = seed
        self.sharpness = sharpness
        self.alpha = alpha
        self.extended: list[tuple[int, ...]] = []
        self.calls = 0

    def random(self, labels: Sequence[int], size: int) -> torch.Tensor:
        seed = hash((self.seed, *labels)) % 2**31
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * self.sharpness

    def lm(self, labels: Sequence[int]) -> torch.Tensor:
        return self.random(labels, self.num_labels + 1)[:-1].log_softmax(-1)

    def frames(self, encoder_out: torch.Tensor) -> torch.Tensor:
        return encoder_out

    def prefixes(self) -> "TablePool":
        return TablePool(self)

    def cells(self, frames, utterance, frame, pool, nodes, last, alpha) -> "TableCells":
        return TableCells(self, frames[utterance, frame], pool, nodes.tolist(), last, alpha)


class TablePool:
    bytes_per_prefix = 100

    def __init__(self, scorer: TableScorer):
        self.scorer = scorer
        self.labels: dict[int, tuple[int, ...]] = {ROOT: ()}

    def compute(self, nodes, parents, labels) -> None:
        assert len(nodes) == len(parents) == len(labels) > 0
        self.scorer.calls += 1
        for node, parent, label in zip(nodes.tolist(), parents.tolist(), labels.tolist()):
            self.labels[node] = (*self.labels[parent], label)
            self.scorer.extended.append(self.labels[node])

    def lm(self, nodes) -> torch.Tensor:
        return torch.stack([self.scorer.lm(self.labels[node]) for node in nodes.tolist()])

    def free(self, nodes) -> None:
        for node in nodes:
            self.labels.pop(node, None)


class TableCells:
    """The blank depends on the last label, the labels on the whole prefix."""

    def __init__(self, scorer, acoustic, pool, nodes, last, alpha):
        self.pool, self.nodes = pool, nodes
        self.acoustic, self.alpha = acoustic[:, :-1], alpha
        last = torch.stack([scorer.random((int(label),), 1)[0] for label in last])
        z = acoustic[:, -1] + 0.3 * last
        self.blank = torch.nn.functional.logsigmoid(z)
        self.ceiling = torch.nn.functional.logsigmoid(-z)

    def labels(self, which) -> torch.Tensor:
        lm = self.pool.lm(np.array(self.nodes)[which.numpy()])
        logits = self.acoustic[which] + self.alpha[which, None] * lm
        return logits.log_softmax(-1) + self.ceiling[which, None]


class OneByOne:
    """A scorer as simple as can be, for slow references: one utterance, prefixes as label tuples.

    Args:
        scorer: A ``TransducerScorer``.
        encoder_out: (T, D).
        alpha: LM scale inside the softmax, or the scorer's.
    """

    def __init__(self, scorer, encoder_out: torch.Tensor, alpha: Optional[float] = None):
        self.scorer = scorer
        self.alpha = scorer.alpha if alpha is None else alpha
        self.frames = scorer.frames(encoder_out[None])
        self.pool = scorer.prefixes()
        self.nodes: dict[tuple[int, ...], int] = {(): ROOT}

    def node(self, labels: Sequence[int]) -> int:
        labels = tuple(labels)
        if labels not in self.nodes:
            parent, new = self.node(labels[:-1]), len(self.nodes)
            self.pool.compute(np.array([new]), np.array([parent]), np.array([labels[-1]]))
            self.nodes[labels] = new
        return self.nodes[labels]

    def lm(self, labels: Sequence[int]) -> torch.Tensor:
        return self.pool.lm(np.array([self.node(labels)]))[0]

    def scores(self, t: int, labels: Sequence[int]) -> tuple[float, torch.Tensor]:
        """log P(blank), and of the labels (L,)."""
        cells = self.scorer.cells(
            self.frames,
            torch.tensor([0]),
            torch.tensor([t]),
            self.pool,
            np.array([self.node(labels)]),
            np.array([labels[-1] if labels else -1]),
            torch.tensor([self.alpha]),
        )
        return float(cells.blank[0]), cells.labels(torch.tensor([0]))[0]


def label_scores(one: OneByOne, case: "Case", scales: Scales, t: int, labels: Sequence[int]):
    """Score of the blank, and of each label (L,), with all scales."""
    blank, row = one.scores(t, labels)
    row = row.double() + scales.label_bonus
    if scales.beta:
        row = row + scales.beta * one.lm(labels)
    if case.external_lm and scales.lm_weight:
        row = row + scales.lm_weight * case.external_lm.row(labels)
    return scales.blank_scale * blank, row


class TableLM:
    """An external LM without a network: ``start`` and ``extend`` of ``ExternalLM``."""

    def __init__(self, num_labels: int, seed: int = 1000):
        self.table = TableScorer(num_labels, seed)
        self.extended: list[tuple[int, ...]] = []

    def row(self, labels: Sequence[int]) -> torch.Tensor:
        return self.table.random(labels, self.table.num_labels).log_softmax(-1)

    def start(self):
        return self.row(()), ()

    def extend(self, labels, states):
        new = [(*state, label) for state, label in zip(states, labels)]
        self.extended += new
        return torch.stack([self.row(labels) for labels in new]), new

    def end(self, labels: Sequence[int]) -> float:
        return float(self.table.random((-7, *labels), 1)) - 1.0

    def end_log_probs(self, states):
        return [self.end(labels) for labels in states]


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
    one = OneByOne(case.scorer, case.encoder_out, scales.alpha)
    frames = case.encoder_out.size(0)
    found = {}
    for length in range(max_labels + 1):
        for labels in itertools.product(range(case.scorer.num_labels), repeat=length):
            blank, label = [], []
            for t in range(frames):
                rows = [label_scores(one, case, scales, t, labels[:u]) for u in range(length + 1)]
                blank.append([b for b, _ in rows])
                label.append([float(row[y]) for (_, row), y in zip(rows, labels)])
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
    one, labels, score = OneByOne(case.scorer, case.encoder_out, scales.alpha), [], 0.0
    for t in range(case.encoder_out.size(0)):
        for symbols in range(max_symbols + 1):
            blank, row = label_scores(one, case, scales, t, labels)
            if symbols == max_symbols or float(row.max()) <= blank:
                score += blank
                break
            labels.append(int(row.argmax()))
            score += float(row.max())
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
        without = Scales(alpha=self.scales.alpha, blank_scale=self.scales.blank_scale)
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
                if hyp.blank is not None:
                    blank = self.blank_score(tiny, hyp.labels, hyp.frames)
                    assert hyp.blank == pytest.approx(blank, abs=self.tolerance)

    def alignment_score(self, case: Case, labels: Sequence[int], frames: Sequence[int]) -> float:
        one, score, u = OneByOne(case.scorer, case.encoder_out, self.scales.alpha), 0.0, 0
        for t in range(case.encoder_out.size(0)):
            while u < len(labels) and frames[u] == t:
                _, row = label_scores(one, case, self.scales, t, labels[:u])
                score += float(row[labels[u]])
                u += 1
            score += label_scores(one, case, self.scales, t, labels[:u])[0]
        return score

    def blank_score(self, case: Case, labels: Sequence[int], frames: Sequence[int]) -> float:
        """Of the blanks of an alignment alone."""
        one = OneByOne(case.scorer, case.encoder_out, self.scales.alpha)
        return sum(
            label_scores(one, case, self.scales, t, labels[: sum(f <= t for f in frames)])[0]
            for t in range(case.encoder_out.size(0))
        )

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
