"""The label-synchronous search on models without networks."""

import math

import pytest
import torch
from espnet.nets.e2e_asr_common import end_detect

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm import search as search_module
from espnet_llm_plugin.speech_llm.beam import Beam, Finished
from espnet_llm_plugin.speech_llm.guards import RepetitionGuard
from espnet_llm_plugin.speech_llm.hypothesis import LabelHypothesis, SearchWeights
from espnet_llm_plugin.speech_llm.search import LabelSearch
from espnet_llm_plugin.transducer.hypothesis import SearchError
from tests.speech_llm.table_lm import TableCTC, TableLM, all_sequences

V, LONGEST = 5, 4
EVERYTHING = 200  # beam that holds all sequences of LONGEST tokens


def search_of(**options) -> LabelSearch:
    return LabelSearch(sos=V - 1, eos=V - 1, vocab_size=V, **options)


def posteriors(number: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = [2 * torch.randn(2 + i % 3, V, generator=generator) for i in range(number)]
    for one in frames:
        one[:, -1] = -torch.inf  # the end symbol is never in the audio
    return [one.log_softmax(-1) for one in frames]


def run(search, utterances, seed=0, ctc=None, longest=LONGEST, **more):
    scorers = {
        "decoder": TableLM(V, seed).begin(utterances),
        "textlm": TableLM(V, 100, sharpness=1.0).begin([0] * len(utterances)),
        "lm": TableLM(V, 200, sharpness=1.0).begin([0] * len(utterances)),
    }
    return search(scorers, [longest] * len(utterances), ctc=ctc, **more)


def rescored(hyp, utterance, weights, ctc=None, seed=0) -> dict[str, float]:
    """Scores of a hypothesis, each from its model and the whole sequence."""
    text, lm = TableLM(V, 100, sharpness=1.0), TableLM(V, 200, sharpness=1.0)
    scores = {
        "decoder": TableLM(V, seed).score(utterance, hyp.tokens, hyp.ended),
        "textlm": text.score(0, hyp.tokens, hyp.ended),
        "lm": lm.score(0, hyp.tokens, hyp.ended),
    }
    if ctc is not None:
        scores["ctc"] = ctc.tables[utterance]((hyp.tokens, hyp.ended))
    return {name: scores[name] for name in weights.by_scorer()}


def exhaustive(utterance, weights, ctc=None, seed=0, longest=LONGEST) -> list[tuple]:
    """(ranking, tokens) of all sequences, best first."""
    found = []
    for tokens in all_sequences(V, longest):
        hyp = LabelHypothesis(tokens, 0.0, 0.0, ended=len(tokens) < longest)
        scores = rescored(hyp, utterance, weights, ctc, seed)
        steps = len(tokens) + hyp.ended
        total = sum(weights.by_scorer()[name] * score for name, score in scores.items())
        total += weights.penalty * steps
        if total > -math.inf:
            found.append((total / steps**weights.length_norm, tokens))
    return sorted(found, reverse=True)


WEIGHTS = [
    SearchWeights(),
    SearchWeights(length_norm=1.0),
    SearchWeights(penalty=0.7),
    SearchWeights(ctc_weight=0.4),
    SearchWeights(ctc_weight=0.4, textlm_weight=0.3, lm_weight=0.2, penalty=0.5, length_norm=0.5),
    SearchWeights(ctc_weight=1.0, textlm_weight=0.3),
    SearchWeights(ctc_weight=0.3, textlm_weight=-0.2),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_wide_beam_equals_exhaustive_search(weights):
    utterances = [0, 1, 2]
    ctc = TableCTC(posteriors(3), V - 1)
    # no end detection but the limit: length normalisation can favour any length
    search = search_of(beam_size=EVERYTHING, nbest=3, weights=weights, forbidden=(0,))
    for utterance, hyps in zip(utterances, run(search, utterances, ctc=ctc, longest=3)):
        expected = exhaustive(utterance, weights, ctc, longest=3)[:3]
        assert [hyp.tokens for hyp in hyps] == [tokens for _, tokens in expected]
        for hyp, (ranking, _) in zip(hyps, expected):
            assert hyp.ranking == pytest.approx(ranking, abs=1e-4)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("beam", [1, 2, 4])
def test_reported_scores_are_the_rescored_ones(weights, beam):
    utterances = [3, 1, 0, 2]
    ctc = TableCTC(posteriors(4), V - 1)
    search = search_of(beam_size=beam, nbest=beam, weights=weights, forbidden=(0,))
    lists = run(search, [0, 1, 2, 3], ctc=ctc)
    assert len(lists) == len(utterances)
    for utterance, hyps in enumerate(lists):
        assert hyps == sorted(hyps, key=lambda hyp: -hyp.ranking)
        assert len({hyp.tokens for hyp in hyps}) == len(hyps)
        for hyp in hyps:
            scores = rescored(hyp, utterance, weights, ctc)
            assert dict(hyp.scores) == pytest.approx(scores, abs=1e-4)
            steps = len(hyp.tokens) + hyp.ended
            assert hyp.bonus == pytest.approx(weights.penalty * steps)
            total = sum(weights.by_scorer()[name] * score for name, score in scores.items())
            assert hyp.total == pytest.approx(total + hyp.bonus, abs=1e-4)
            assert hyp.ranking == pytest.approx(hyp.total / steps**weights.length_norm, abs=1e-4)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("end_detection", ["espnet", "generate"])
def test_batch_equals_one_by_one(weights, beam, end_detection):
    options = dict(beam_size=beam, nbest=beam, weights=weights, forbidden=(0,))
    search = search_of(end_detection=end_detection, **options)
    frames = posteriors(5)
    together = run(search, range(5), ctc=TableCTC(frames, V - 1), longest=12)
    for utterance in range(5):
        alone = run(search, [utterance], ctc=TableCTC([frames[utterance]], V - 1), longest=12)[0]
        assert [hyp.tokens for hyp in together[utterance]] == [hyp.tokens for hyp in alone]
        for a, b in zip(together[utterance], alone):
            assert a.total == pytest.approx(b.total, abs=1e-5)


def test_wider_beams_score_no_worse_on_average():
    totals = []
    for beam in (1, 2, 4, 16):
        search = search_of(beam_size=beam, weights=SearchWeights(ctc_weight=0.3), forbidden=(0,))
        lists = run(search, range(12), ctc=TableCTC(posteriors(12), V - 1))
        totals.append(sum(hyps[0].total for hyps in lists))
    assert totals == sorted(totals)


def test_ended_utterances_leave_the_batch():
    class EndsAfter(TableLM):
        """Utterance u ends after u tokens."""

        def log_probs(self, utterance, prefix):
            row = super().log_probs(utterance, prefix)
            row[-1] = 50.0 if len(prefix) == utterance else -50.0
            return row.log_softmax(-1)

    lm = EndsAfter(V, 0).begin([0, 3, 1, 7])
    found = search_of(beam_size=1)({"decoder": lm}, [10] * 4)
    assert [len(hyps[0].tokens) for hyps in found] == [0, 3, 1, 7]
    # rows of the steps 0 ... 7: those that have not ended yet
    assert lm.batch_sizes == [4, 3, 2, 2, 1, 1, 1, 1]


def test_greedy_takes_the_best_token_until_the_end():
    lm = TableLM(V, 7)
    for utterance in range(6):
        prefix: tuple[int, ...] = ()
        while len(prefix) < 15:
            best = int(lm.log_probs(utterance, prefix).argmax())
            if best == V - 1:
                break
            prefix = (*prefix, best)
        hyps = search_of(beam_size=1)({"decoder": lm.begin([utterance])}, [15])[0]
        assert hyps[0].tokens == prefix
        assert hyps[0].ended == (len(prefix) < 15)


def test_end_detection_is_espnets():
    generator = torch.Generator().manual_seed(0)
    decisions = set()
    for _ in range(60):
        steps = 9
        totals = -30 * torch.rand(steps, 2, generator=generator)
        ends = torch.rand(steps, 2, generator=generator) < 0.8
        finished = Finished.empty(1, 3, 1, steps, torch.device("cpu"))
        ended = []
        for i in range(steps):
            found = Beam(
                torch.tensor([0]),
                totals[i : i + 1],
                torch.ones(1, 2, dtype=torch.long),
                torch.zeros(1, 2, dtype=torch.long),
                torch.zeros(1, 2, 1),
            )
            finished.add(found, ends[i : i + 1], i + 1, 0.0)
            for score in totals[i][ends[i]].tolist():
                ended.append({"score": score, "yseq": [0] * (i + 2)})
            expected = end_detect(ended, i)
            assert bool(finished.is_over(torch.tensor([0]), i)[0]) == expected
            decisions.add(expected)
    assert decisions == {True, False}


def test_end_detection_of_espnet_loses_nothing_and_saves_steps():
    # ends early, and what goes on gets ever worse
    lm = TableLM(V, 3, sharpness=2.0, end=3.0)
    full = search_of(beam_size=3, end_detection="generate", weights=SearchWeights(penalty=0.1))
    saves = search_of(beam_size=3, weights=SearchWeights(penalty=0.1))
    best = full({"decoder": lm.begin(range(5))}, [60] * 5)
    lists = saves({"decoder": lm.begin(range(5))}, [60] * 5)
    assert len(lm.batch_sizes) < 60
    for a, b in zip(best, lists):
        assert b[0].total >= a[0].total - 1e-5


def test_length_limits_of_each_utterance():
    never = TableLM(V, 0, end=-100.0).begin([0, 1, 2])
    lists = search_of(beam_size=2)({"decoder": never}, [3, 1, 6])
    assert [len(hyps[0].tokens) for hyps in lists] == [3, 1, 6]
    assert not any(hyps[0].ended for hyps in lists)
    always = TableLM(V, 0, end=100.0).begin([0, 1, 2])
    lists = search_of(beam_size=2)({"decoder": always}, [5, 5, 5], min_tokens=[0, 2, 4])
    assert [len(hyps[0].tokens) for hyps in lists] == [0, 2, 4]
    assert all(hyps[0].ended for hyps in lists)


def test_min_tokens_with_ctc_candidates():
    ctc = TableCTC(posteriors(2), V - 1, candidates=[[1, 3], [2, 3]])
    weights = SearchWeights(ctc_weight=0.5)
    lists = run(
        search_of(beam_size=4, nbest=4, weights=weights), [0, 1], ctc=ctc, min_tokens=[1, 2]
    )
    for hyps, least, allowed in zip(lists, (1, 2), ({1, 3}, {2, 3})):
        assert all(len(hyp.tokens) >= least for hyp in hyps if hyp.ended)
        assert {token for hyp in hyps for token in hyp.tokens} <= allowed


class Looping(TableLM):
    """Repeats an n-gram for ever, with a small probability of anything else."""

    def __init__(self, ngram):
        super().__init__(8, 0)
        self.ngram = ngram

    def log_probs(self, utterance, prefix):
        row = torch.zeros(self.vocab_size)
        row[0] = -torch.inf
        row[-1] = -1.0
        row[self.ngram[len(prefix) % len(self.ngram)]] = 6.0
        return row.log_softmax(-1)


def copies(tokens, n) -> int:
    """How often at most an n-gram occurs in a row."""
    best = run_length = 0
    for i in range(n, len(tokens)):
        run_length = run_length + 1 if tokens[i] == tokens[i - n] else 0
        best = max(best, run_length)
    return 1 + best // n


@pytest.mark.parametrize("ngram", [(2,), (2, 3), (2, 2, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_repetition_guard(ngram, beam, repeats):
    def hyps(guard):
        search = LabelSearch(sos=7, eos=7, vocab_size=8, beam_size=beam, guard=guard)
        return search({"decoder": Looping(ngram).begin([0, 0])}, [40, 40])

    free = hyps(RepetitionGuard(0))[0][0].tokens
    assert copies(free, len(ngram)) >= 8 or beam > 1  # the model does loop
    for guarded in hyps(RepetitionGuard(repeats, 4)):
        for n in range(1, 5):
            assert copies(guarded[0].tokens, n) <= repeats


def test_repetition_guard_changes_nothing_without_loops():
    weights = SearchWeights(ctc_weight=0.4)
    ctc = TableCTC(posteriors(4), V - 1)
    free = run(search_of(beam_size=3, weights=weights), range(4), ctc=ctc)
    ctc = TableCTC(posteriors(4), V - 1)
    guarded = run(
        search_of(beam_size=3, weights=weights, guard=RepetitionGuard(4)), range(4), ctc=ctc
    )
    assert free == guarded


@pytest.mark.parametrize("columns", [64, 1000, 1003, 20000, 20011])
@pytest.mark.parametrize("number", [1, 8, 64])
def test_best_of_is_topk(monkeypatch, columns, number):
    monkeypatch.setattr(search_module, "SMALL", 64)
    scores = torch.randn(3, columns)
    scores[1, columns // 2 :] = -torch.inf
    values, indices = search_module.best_of(scores, number)
    assert torch.equal(values, scores.topk(number, dim=1).values)
    assert torch.equal(values, scores.gather(1, indices))
    assert all(len(set(row)) == number for row in indices.tolist())


def test_broken_scores_are_an_error():
    class Broken(TableLM):
        def log_probs(self, utterance, prefix):
            row = super().log_probs(utterance, prefix)
            return row * math.nan if utterance == 1 and prefix else row

    with pytest.raises(SearchError, match="utterance 1"):
        search_of(beam_size=2)({"decoder": Broken(V, 0).begin([0, 1])}, [5, 5])


def test_bad_options():
    for options in (dict(beam_size=0), dict(nbest=0), dict(end_detection="never")):
        with pytest.raises(UserError):
            search_of(**options)
    for bad in (dict(ctc_weight=1.2), dict(ctc_weight=-0.1), dict(length_norm=-1.0)):
        with pytest.raises(UserError):
            SearchWeights(**bad)
    with pytest.raises(UserError):
        RepetitionGuard(-1)
    with pytest.raises(ValueError, match="lm"):
        search_of(weights=SearchWeights(lm_weight=0.5))({"decoder": TableLM(V, 0).begin([0])}, [3])
