"""Delayed fusion: what it must equal, for CTC and transducers, with an LM of either vocabulary."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_search import CTCSearch
from espnet_llm_plugin.fusion.delayed import DelayedFusion, Fusion, LabelPrefixes, WordPrefixes
from espnet_llm_plugin.fusion.words import Spelling
from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.contracts.search_contract import TableLM, TableScorer
from tests.fusion.simple_ctc_search import simple_search
from tests.fusion.test_ctc_search import FixedPrior, Identity, peaky

TOKENS = ["<blank>", "<unk>", "\u2581a", "b", "\u2581c", "d", "e", "\u2581f", "<sos/eos>"]
LABELS = 7


def to_text(tokens):
    return "".join(tokens).replace("\u2581", " ").strip()


SPELLING = Spelling(TOKENS, "bpe", to_text)


class TableWordLM:
    """The interface of ``WordLM``: random scores of words by history, every word asked once."""

    nbytes = 0

    def __init__(self, seed=0):
        self.table = TableScorer(2, seed)
        self.calls = 0
        self.asked = []

    def start(self):
        return ""

    def extend(self, text, words):
        return f"{text} {words.strip()}".strip()

    def score(self, text):
        words = text.split()
        return -sum(self.number(*words[: i + 1]) for i in range(len(words)))

    def number(self, *history):
        return abs(float(self.table.random(history, 1)))

    def end(self, text):
        return self.score(text) - self.number(text, 1)

    def scores(self, texts):
        self.calls += 1
        self.asked += [text for text in texts if text not in self.asked]
        return np.array([self.score(text) for text in texts])

    def ends(self, texts):
        self.calls += 1
        self.asked += [text for text in texts if text not in self.asked]
        return np.array([self.end(text) for text in texts])


def foreign(lm, policy="every_n_frames", interval=1, prior=None):
    return DelayedFusion(lambda tree: WordPrefixes(tree, SPELLING, lm), policy, interval, prior)


def replacing(lm, policy="every_n_frames", interval=1, prior=None):
    """``foreign``, with the search's LM as stand-in."""
    return DelayedFusion(
        lambda tree: WordPrefixes(tree, SPELLING, lm), policy, interval, prior, stand_in=True
    )


def own(policy="every_n_frames", interval=1, prior=None, spelling=SPELLING):
    whole = policy == "every_word"
    return DelayedFusion(lambda tree: LabelPrefixes(tree, spelling, whole), policy, interval, prior)


class CTC(NamedTuple):
    """Of tiny posteriors."""

    frames: int = 30

    def utterance(self, seed):
        return peaky(seed, len(TOKENS), self.frames)

    def search(self, beam, fusion=None, lm=None):
        return CTCSearch(Identity(len(TOKENS)), beam_size=beam, external_lm=lm, fusion=fusion)


class Transducer(NamedTuple):
    """Of random scores."""

    frames: int = 8

    def utterance(self, seed):
        return torch.randn(self.frames, LABELS + 1, generator=torch.Generator().manual_seed(seed))

    def search(self, beam, fusion=None, lm=None):
        scorer = TableScorer(LABELS, 5)
        return TransducerSearch(scorer, beam_size=beam, external_lm=lm, fusion=fusion)


@pytest.fixture(params=[CTC(), Transducer()], ids=["ctc", "transducer"])
def model(request):
    return request.param


WEIGHTED = Scales(lm_weight=0.6, label_bonus=0.4)


def same(found, expected):
    assert [hyp.labels for hyp in found] == [hyp.labels for hyp in expected]
    assert [hyp.total for hyp in found] == pytest.approx([hyp.total for hyp in expected], abs=1e-6)
    assert [hyp.frames for hyp in found] == [hyp.frames for hyp in expected]


def same_beam(state, expected):
    """The beam has these prefixes with these scores."""
    scores = {
        tuple(state.tree.labels_of(int(node))): score
        for node, score in zip(state.beam.node[0], state.beam.score[0])
        if node >= 0
    }
    assert set(scores) == set(expected)
    for labels, score in expected.items():
        assert scores[labels] == pytest.approx(score, abs=1e-5)


# ------------------------------------------------------------------------------ equivalences


@pytest.mark.parametrize("vocabulary", ["foreign", "own"])
def test_never_is_rescoring_of_the_nbest_list(model, vocabulary):
    for seed in range(3):
        out = model.utterance(seed)
        plain = model.search(6)(out, Scales(), nbest=6)
        if vocabulary == "foreign":
            lm = TableWordLM()
            search = model.search(6, foreign(lm, "never"))
            # Words of the whole hypothesis, the last one included.
            lm_score = {h.labels: lm.end(to_text([TOKENS[y + 1] for y in h.labels])) for h in plain}
        else:
            lm = TableLM(LABELS)
            search = model.search(6, own("never"), lm)
            lm_score = {
                h.labels: sum(float(lm.row(h.labels[:u])[y]) for u, y in enumerate(h.labels))
                + lm.end(h.labels)
                for h in plain
            }
        found = search(out, WEIGHTED, nbest=6)
        expected = {
            h.labels: h.total + 0.6 * lm_score[h.labels] + 0.4 * len(h.labels) for h in plain
        }
        assert [h.labels for h in found] == sorted(expected, key=expected.get, reverse=True)
        for hyp in found:
            assert hyp.total == pytest.approx(expected[hyp.labels], abs=1e-5)
            assert hyp.external_lm == pytest.approx(0.6 * lm_score[hyp.labels], abs=1e-5)
            assert hyp.acoustic + hyp.external_lm + hyp.bonus == pytest.approx(hyp.total, abs=1e-5)


def test_every_label_in_one_vocabulary_is_label_wise_where_the_beam_holds_all():
    """The LM's score comes a frame late: only what is pruned in that frame can differ."""
    out = peaky(0, len(TOKENS), 4)
    late = CTC().search(5000, own(interval=1), TableLM(LABELS))
    label_wise = CTC().search(5000, None, TableLM(LABELS))
    same(late(out, WEIGHTED, nbest=200), label_wise(out, WEIGHTED, nbest=200))


def test_every_label_in_one_vocabulary_is_close_to_label_wise(model):
    def best(fusion, seed, beam):
        search = model.search(beam, fusion, TableLM(LABELS))
        return search(model.utterance(seed), WEIGHTED)[0]

    equal = {}
    for beam in (4, 128):
        pairs = [
            (best(own(interval=1), seed, beam), best(Fusion(end=True), seed, beam))
            for seed in range(8)
        ]
        equal[beam] = sum(late.labels == one.labels for late, one in pairs)
    assert equal[128] >= 7 and equal[128] >= equal[4]
    for late, one in pairs:
        if late.labels == one.labels:
            # Each beam has lost other alignments.
            assert late.total == pytest.approx(one.total, abs=0.3)


@pytest.mark.parametrize("policy", ["never", "every_n_frames", "shortest", "every_word"])
@pytest.mark.parametrize("vocabulary", ["foreign", "own"])
def test_beam_of_one_finds_the_words_without_lm(model, policy, vocabulary):
    for seed in range(3):
        out = model.utterance(seed)
        if vocabulary == "foreign":
            search = model.search(1, foreign(TableWordLM(), policy, 2))
        else:
            search = model.search(1, own(policy, 2), TableLM(LABELS))
        (plain,) = model.search(1)(out)
        (hyp,) = search(out, Scales(lm_weight=0.6))
        assert (hyp.labels, hyp.frames) == (plain.labels, plain.frames)
        assert hyp.acoustic == pytest.approx(plain.acoustic, abs=1e-6)


@pytest.mark.parametrize("policy", ["never", "every_n_frames", "shortest", "every_word"])
def test_weight_zero_is_no_lm(model, policy):
    lm, words = TableLM(LABELS), TableWordLM()
    for seed in range(3):
        out = model.utterance(seed)
        plain = model.search(6)(out, Scales(label_bonus=0.4), nbest=6)
        for search in (
            model.search(6, own(policy), lm),
            model.search(6, foreign(words, policy)),
        ):
            same(search(out, Scales(label_bonus=0.4), nbest=6), plain)
    assert not lm.extended and not words.calls


def test_every_word_of_an_own_vocabulary_is_every_frame(model):
    for seed in range(3):
        out = model.utterance(seed)
        by_word = model.search(6, foreign(TableWordLM(), "every_word"))
        by_frame = model.search(6, foreign(TableWordLM(), "every_n_frames", 1))
        same(by_word(out, WEIGHTED, nbest=6), by_frame(out, WEIGHTED, nbest=6))


@pytest.mark.parametrize("beam", [2, 8])
@pytest.mark.parametrize("interval", [1, 3, 10])
def test_equals_the_simple_search(beam, interval):
    """Words complete so far, asked every ``interval`` frames, after the pruning."""
    for seed in range(5):
        log_probs, lm = peaky(seed, len(TOKENS), 30), TableWordLM(seed)

        def late(t, prefix, inherited, lm=lm):
            if (t + 1) % interval:
                return inherited
            pieces = [TOKENS[label + 1] for label in prefix]
            begins = [i for i, piece in enumerate(pieces) if piece.startswith("\u2581")]
            complete = pieces[: begins[-1]] if begins else []
            return 0.6 * lm.score(to_text(complete)) + 0.4 * len(complete)

        expected = simple_search(log_probs.numpy(), beam, late=late)
        search = CTC().search(beam, foreign(lm, interval=interval))
        state = search.step(search.start([WEIGHTED]), log_probs)
        same_beam(state, expected)


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_stand_in_equals_the_simple_search(interval):
    """Labels are scored by the search's LM until the LLM has read them."""
    for seed in range(5):
        log_probs, lm, table = peaky(seed, len(TOKENS), 30), TableWordLM(seed), TableLM(LABELS)

        def late(t, prefix, inherited, lm=lm, table=table):
            if (t + 1) % interval:
                return inherited
            pieces = [TOKENS[label + 1] for label in prefix]
            begins = [i for i, piece in enumerate(pieces) if piece.startswith("\u2581")]
            known = prefix[: begins[-1]] if begins else ()
            stood_in = sum(float(table.row(known[:u])[y]) for u, y in enumerate(known))
            return 0.6 * (lm.score(to_text([TOKENS[y + 1] for y in known])) - stood_in)

        expected = simple_search(
            log_probs.numpy(), 4, lm=table, lm_weight=0.6, end=False, bonus=0.4, late=late
        )
        search = CTC().search(4, replacing(lm, interval=interval), TableLM(LABELS))
        state = search.step(search.start([WEIGHTED]), log_probs)
        same_beam(state, expected)


@pytest.mark.parametrize("policy", ["never", "every_n_frames"])
def test_nothing_of_the_stand_in_is_left_in_the_end(model, policy):
    """It decides which hypotheses live; their scores are the model's and the LLM's."""
    for seed in range(3):
        out, lm = model.utterance(seed), TableWordLM()
        found = model.search(6, replacing(lm, policy, 3), TableLM(LABELS))(out, WEIGHTED, nbest=6)
        for hyp in found:
            external = 0.6 * lm.end(to_text([TOKENS[y + 1] for y in hyp.labels]))
            assert hyp.external_lm == pytest.approx(external, abs=1e-6)
            assert hyp.bonus == pytest.approx(0.4 * len(hyp.labels))
            parts = hyp.acoustic + hyp.external_lm + hyp.bonus
            assert hyp.total == pytest.approx(parts, abs=1e-6)
        if policy == "never":  # the n-best list of the stand-in, ranked again
            fused = model.search(6, Fusion(end=False), TableLM(LABELS))(out, WEIGHTED, nbest=6)
            acoustic = {hyp.labels: hyp.acoustic for hyp in fused}
            assert {hyp.labels for hyp in found} == set(acoustic)
            for hyp in found:
                assert hyp.acoustic == pytest.approx(acoustic[hyp.labels], abs=1e-5)


# ---------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("policy", ["never", "every_n_frames", "shortest", "every_word"])
@pytest.mark.parametrize("vocabulary", ["foreign", "own", "replacing"])
def test_batches_and_chunks(model, policy, vocabulary):
    """Utterances of a batch and chunks of an utterance give what each whole one gives alone."""

    def search():
        if vocabulary == "foreign":
            return model.search(5, foreign(TableWordLM(), policy, 3))
        if vocabulary == "replacing":
            return model.search(5, replacing(TableWordLM(), policy, 3), TableLM(LABELS))
        return model.search(5, own(policy, 3), TableLM(LABELS))

    settings = [WEIGHTED, Scales(lm_weight=0.2)]
    lengths = [model.frames, model.frames - 3, 1]
    outs = [model.utterance(seed)[:length] for seed, length in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(outs, batch_first=True)
    alone = [[search()(out, scales, nbest=5) for scales in settings] for out in outs]
    one = search()
    state = one.step(one.start(settings, utterances=3), padded, torch.tensor(lengths))
    pieces = one.start(settings, utterances=3)
    for first in range(0, model.frames, 4):
        count = (torch.tensor(lengths) - first).clamp(0, 4)
        pieces = one.step(pieces, padded[:, first : first + 4], count)
    for found in (state.nbest(5), pieces.nbest(5)):
        for i in range(3):
            for g in range(2):
                same(found[2 * i + g], alone[i][g])


def test_asking_for_the_nbest_list_leaves_the_state_as_it_was(model):
    search = model.search(5, foreign(TableWordLM(), interval=3))
    out = model.utterance(0)
    state = search.step(search.start([WEIGHTED]), out[:4])
    first = state.nbest(5)
    after = search.step(state, out[4:]).nbest(5)
    assert state.nbest(5) == first
    assert search.step(state, out[4:]).nbest(5) == after


def test_only_live_hypotheses_are_scored(model):
    """What the search has pruned or merged before the LM is asked is never scored."""
    out, lm = model.utterance(0), TableWordLM()
    search = model.search(4, foreign(lm, "never"))
    state = search.step(search.start([WEIGHTED]), out)
    assert not lm.asked and not lm.calls
    live = {hyp.labels for hyp in state.nbest(4)[0]}
    texts = {to_text([TOKENS[label + 1] for label in labels]) for labels in live}
    assert set(lm.asked) == texts
    assert state.tree.num_created > len(live)


def test_longer_intervals_ask_less(model):
    counts = []
    for interval in (1, 4, 8):
        lm = TableWordLM()
        for seed in range(6):
            model.search(4, foreign(lm, interval=interval))(model.utterance(seed), WEIGHTED)
        counts.append(lm.calls)
    assert counts[0] > counts[1] > counts[2]


def test_shortest_asks_when_the_shortest_hypothesis_has_a_new_word():
    """At most once for each word of the final beam's shortest hypothesis, and at the end."""
    log_probs, lm = peaky(2, len(TOKENS), 60), TableWordLM()
    search = CTC().search(4, foreign(lm, "shortest"))
    state = search.step(search.start([WEIGHTED]), log_probs)
    words = [
        number_of_words(state.tree.labels_of(int(node))) for node in state.beam.node[0] if node >= 0
    ]
    assert 0 < lm.calls <= max(words)
    eager = TableWordLM()
    CTC().search(4, foreign(eager, "every_word"))(log_probs, WEIGHTED)
    assert lm.calls < eager.calls


def number_of_words(labels):
    return sum(TOKENS[label + 1].startswith("\u2581") for label in labels)


def test_prior_comes_with_the_lm():
    """Only for complete words, and for all labels at the end."""
    log_prior = torch.randn(len(TOKENS), generator=torch.Generator().manual_seed(1))
    prior = FixedPrior("label", log_prior)
    scales = Scales(lm_weight=0.6, prior_weight=0.5)
    for seed in range(3):
        log_probs, lm = peaky(seed, len(TOKENS), 30), TableWordLM(seed)
        search = CTC().search(6, foreign(lm, "never", prior=prior))
        plain = CTC().search(6)(log_probs, Scales(), nbest=6)
        for hyp in search(log_probs, scales, nbest=6):
            (one,) = [h for h in plain if h.labels == hyp.labels]
            minus = 0.5 * sum(float(log_prior[label + 1]) for label in hyp.labels)
            assert hyp.prior == pytest.approx(-minus, abs=1e-5)
            assert hyp.acoustic == pytest.approx(one.total, abs=1e-5)
        lm.score = lm.end = lambda text: 0.0

        def late(t, prefix, inherited):
            pieces = [TOKENS[label + 1] for label in prefix]
            begins = [i for i, piece in enumerate(pieces) if piece.startswith("\u2581")]
            complete = prefix[: begins[-1]] if begins else ()
            return -0.5 * sum(float(log_prior[label + 1]) for label in complete)

        state = (search := CTC().search(6, foreign(lm, interval=1, prior=prior))).start([scales])
        state = search.step(state, log_probs)
        expected = simple_search(log_probs.numpy(), 6, late=late)
        found = {tuple(state.tree.labels_of(int(n))) for n in state.beam.node[0] if n >= 0}
        assert found == set(expected)


def test_bonus_that_balances_a_predictors_lm_is_there_at_once():
    """The bonus comes with the LM that it is for."""
    model = Transducer()
    for seed in range(3):
        out = model.utterance(seed)
        for beta, at_once in ((0.4, 0.7), (0.0, 0.0), (-0.4, 0.0)):
            scales = Scales(beta=beta, lm_weight=0.6, label_bonus=0.7)
            late = model.search(6, foreign(TableWordLM(), "never"))(out, scales, nbest=6)
            plain = model.search(6)(out, Scales(beta=max(beta, 0.0), label_bonus=at_once), nbest=6)
            assert {h.labels for h in late} == {h.labels for h in plain}
            for hyp in late:
                assert hyp.bonus == pytest.approx(0.7 * len(hyp.labels))
                (one,) = [h for h in plain if h.labels == hyp.labels]
                assert hyp.acoustic == pytest.approx(one.acoustic, abs=1e-4)


def test_subtraction_of_the_internal_lm_comes_with_the_lm():
    """With ``never`` the search is the one without; the parts of the scores say the rest."""
    model = Transducer()
    for seed in range(3):
        out = model.utterance(seed)
        plain = model.search(6)(out, Scales(), nbest=6)
        subtracted = Scales(beta=-0.3, lm_weight=0.6)
        found = model.search(6, foreign(TableWordLM(), "never"))(out, subtracted, nbest=6)
        assert {h.labels for h in found} == {h.labels for h in plain}
        scorer = TableScorer(LABELS, 5)
        for hyp in found:
            (one,) = [h for h in plain if h.labels == hyp.labels]
            assert hyp.acoustic == pytest.approx(one.acoustic, abs=1e-4)
            lm = sum(float(scorer.lm(hyp.labels[:u])[y]) for u, y in enumerate(hyp.labels))
            assert hyp.lm == pytest.approx(-0.3 * lm, abs=1e-4)


def test_freed_prefixes_are_forgotten():
    """A bounded tree gives the results of an unbounded one."""
    log_probs, lm = torch.randn(150, len(TOKENS)).log_softmax(-1), TableWordLM()
    options = dict(beam_size=4, fusion=foreign(lm, interval=3))
    free = CTCSearch(Identity(len(TOKENS)), **options)
    small = CTCSearch(Identity(len(TOKENS)), max_bytes=100, **options)
    same(small(log_probs, WEIGHTED, nbest=4), free(log_probs, WEIGHTED, nbest=4))


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options", [dict(policy="sometimes"), dict(interval=0), dict(prior=FixedPrior("frame", None))]
)
def test_bad_options_are_refused(options):
    with pytest.raises(UserError):
        foreign(TableWordLM(), **options)


# ------------------------------------------------------------------------------------ spelling


@pytest.mark.parametrize(
    "token_type,tokens,labels,complete,text",
    [
        ("bpe", ["\u2581he", "llo", "\u2581you", "\u2581"], [0, 1, 2], [0, 1], "hello"),
        ("bpe", ["\u2581he", "llo", "\u2581you", "\u2581"], [1, 0], [1], "llo"),
        ("hugging_face", ["\u0120he", "llo", "\u0120you"], [0, 1, 2, 0], [0, 1, 2], "hello you"),
        ("char", ["a", "<space>", "b"], [0, 2, 1, 1, 2], [0, 2, 1, 1], "ab"),
        ("char", ["a", "<space>", "b"], [1, 0], [1], ""),
        ("word", ["yes", "no"], [1, 0], [1, 0], "no yes"),
    ],
)
def test_complete_words(token_type, tokens, labels, complete, text):
    from espnet_llm_plugin.fusion.words import WordEnds
    from espnet_llm_plugin.transducer.prefix_tree import PrefixTree

    def join(pieces):
        between = " " if token_type == "word" else ""
        return between.join(pieces).replace("\u2581", " ").replace("\u0120", " ").strip()

    spelling = Spelling(["<blank>", *tokens, "<sos/eos>"], token_type, join)
    tree = PrefixTree(None, len(tokens))
    ends, node = WordEnds(tree, spelling), 0
    for label in labels:
        node = int(tree.children(np.array([node]), np.array([label]))[0])
    found = int(ends.complete(np.array([node]))[0])
    assert tree.labels_of(found) == complete
    assert ends.number(np.array([node]))[0] == len(text.split())
    words, at = [], found
    while at:
        before = ends.before(at)
        words.append(ends.text(before, at))
        at = before
    assert " ".join(reversed(words)).split() == text.split()


def test_token_types_without_words_are_refused():
    with pytest.raises(UserError, match="token_type phn"):
        Spelling(TOKENS, "phn", to_text)
    with pytest.raises(UserError, match="<space>"):
        Spelling(["<blank>", "a", "<sos/eos>"], "char", to_text)
