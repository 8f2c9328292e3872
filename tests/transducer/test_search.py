"""Beam search: against exhaustive enumeration, its cost, and its options."""

import math

import pytest
import torch
import torchaudio

from espnet_llm_plugin.transducer.beam import Scales, SearchError
from espnet_llm_plugin.transducer.loss import factorized_rnnt_loss
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.contracts.search_contract import Case, SearchContract, TableLM, TableScorer
from tests.transducer import tiny


def encoder_out(frames: int, num_labels: int, seed: int, blank: float = 0.0) -> torch.Tensor:
    """Random label logits and, in the last column, blank logits around ``blank``."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(frames, num_labels + 1, generator=generator) * 1.5
    out[:, -1] += blank
    return out


class TestTables(SearchContract):
    def case(self, seed):
        return Case(TableScorer(3, seed), encoder_out(3, 3, seed))


class TestTablesWithEverything(SearchContract):
    scales = Scales(alpha=0.4, beta=0.7, lm_weight=0.5, label_bonus=0.8)

    def case(self, seed):
        return Case(TableScorer(3, seed), encoder_out(3, 3, seed), TableLM(3, seed))


class TestTablesBetaOnly(SearchContract):
    scales = Scales(alpha=0.2, beta=0.5, label_bonus=1.0)

    def case(self, seed):
        return Case(TableScorer(3, seed), encoder_out(3, 3, seed))


class ModelContract(SearchContract):
    """Real networks: two frames, so that a beam of 2000 holds every sequence."""

    max_labels = 3

    def frames(self, seed):
        return torch.randn(2, tiny.DIM, generator=torch.Generator().manual_seed(seed)) * 2


class TestFactorizedStateless(ModelContract):
    scales = Scales(alpha=0.6, beta=0.4, label_bonus=1.0)

    def case(self, seed):
        model = tiny.factorized(seed, tokens=tiny.TOKENS[:3] + ["<sos/eos>"]).eval()
        return Case(build_scorer(model), self.frames(seed))


class TestFactorizedLSTMSoftmax(ModelContract):
    scales = Scales(alpha=0.6, beta=0.4, lm_weight=0.3, label_bonus=1.0)

    def case(self, seed):
        tokens = tiny.TOKENS[:4] + ["<sos/eos>"]
        model = tiny.factorized(seed, tokens=tokens, predictor="lstm", blank_norm="softmax")
        return Case(build_scorer(model.eval()), self.frames(seed), TableLM(3, seed))


class TestFactorizedLLM(ModelContract):
    scales = Scales(alpha=0.6, beta=0.4, label_bonus=1.0)
    tokens = tiny.TOKENS[:3] + ["<sos/eos>"]

    @pytest.fixture(autouse=True, scope="class")
    def directory(self, request, tmp_path_factory):
        made = tiny.save_llm(tmp_path_factory.mktemp("llm"), tokens=self.tokens)
        request.cls.llm = made

    def case(self, seed):
        conf = {"predictor": "llm", "predictor_conf": {"llm": self.llm}}
        model = tiny.factorized(seed, tokens=self.tokens, **conf).eval()
        return Case(build_scorer(model), self.frames(seed))


class TestRNNT(ModelContract):
    scales = Scales(lm_weight=0.3, label_bonus=0.5)

    def case(self, seed):
        model = tiny.rnnt(seed).eval()
        return Case(build_scorer(model), self.frames(seed), TableLM(tiny.VOCAB - 1, seed))


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
def test_wide_beam_equals_the_factorized_loss(predictor, blank_norm):
    model = tiny.factorized(1, predictor=predictor, blank_norm=blank_norm).eval()
    encoded = torch.randn(4, tiny.DIM)
    hyps = TransducerSearch(build_scorer(model, alpha=0.7), beam_size=2000)(encoded, nbest=12)
    assert max(len(hyp.labels) for hyp in hyps) > 1
    for hyp in hyps:
        labels = torch.tensor([hyp.labels], dtype=torch.long)
        frames, lengths = torch.tensor([len(encoded)]), torch.tensor([labels.size(1)])
        with torch.no_grad():
            factors = model.decoder(encoded[None], frames, labels, lengths)
        loss = factorized_rnnt_loss(
            *factors, labels, frames, lengths, lm_scale=0.7, blank_norm=blank_norm
        )
        # at most three labels a frame lose a little
        assert hyp.total == pytest.approx(-float(loss), abs=5e-3)


def test_wide_beam_equals_torchaudios_loss():
    model = tiny.rnnt(1).eval()
    encoded = torch.randn(3, tiny.DIM)
    search = TransducerSearch(build_scorer(model), beam_size=3000, max_symbols_per_frame=4)
    hyps = [hyp for hyp in search(encoded, nbest=12) if hyp.labels]
    assert len(hyps) > 8
    for hyp in hyps:
        tokens = torch.tensor([hyp.labels]) + 1
        with torch.no_grad():
            history = torch.nn.functional.pad(tokens, (1, 0))
            joint = model.joint_network(encoded[None, :, None], model.decoder(history)[:, None])
            loss = torchaudio.functional.rnnt_loss(
                joint,
                tokens.int(),
                torch.tensor([len(encoded)], dtype=torch.int32),
                torch.tensor([tokens.size(1)], dtype=torch.int32),
                blank=0,
            )
        assert hyp.total == pytest.approx(-float(loss), abs=5e-3)


@pytest.fixture
def long_case() -> Case:
    return Case(TableScorer(6, 7), encoder_out(30, 6, 7, blank=-0.5), TableLM(6, 7))


EVERYTHING = Scales(alpha=0.4, beta=0.7, lm_weight=0.5, label_bonus=0.8)


def test_networks_run_once_per_prefix_and_once_per_step(long_case):
    scorer, lm = long_case.scorer, long_case.external_lm
    search = TransducerSearch(
        scorer, beam_size=8, max_symbols_per_frame=2, external_lm=lm, max_prefixes=None
    )
    search(long_case.encoder_out, EVERYTHING)
    assert len(scorer.extended) == len(set(scorer.extended)) > 30
    assert lm.extended == scorer.extended
    # a batch for each level of a frame at most, eight prefixes at most in it
    assert scorer.calls <= 2 * 30
    assert len(scorer.extended) <= 8 * scorer.calls


def test_only_survivors_reach_the_predictor():
    """One frame, beam 2: the blank of the empty prefix and the best label fill the beam."""
    scorer = TableScorer(5, 3)
    TransducerSearch(scorer, beam_size=2, max_symbols_per_frame=1)(encoder_out(1, 5, 3))
    assert len(scorer.extended) in (1, 2)


def test_a_kept_tree_saves_all_predictor_calls(long_case):
    search = TransducerSearch(long_case.scorer, beam_size=4, external_lm=long_case.external_lm)
    first = search.step(search.start([EVERYTHING]), long_case.encoder_out)
    calls = long_case.scorer.calls
    again = search.step(search.start([EVERYTHING], first.tree), long_case.encoder_out)
    assert long_case.scorer.calls == calls
    assert again.nbest(4) == first.nbest(4)
    # other scales with the kept tree give what a fresh search gives
    other = Scales(alpha=0.1, beta=0.2, lm_weight=0.1, label_bonus=0.3)
    kept = search.step(search.start([other], first.tree), long_case.encoder_out).nbest(4)
    assert kept[0] == search(long_case.encoder_out, other, nbest=4)


def test_freeing_prefixes_changes_nothing_but_memory(long_case):
    def run(max_prefixes):
        search = TransducerSearch(
            long_case.scorer,
            beam_size=8,
            external_lm=long_case.external_lm,
            max_prefixes=max_prefixes,
        )
        scales = Scales(beta=0.3, lm_weight=0.3, label_bonus=2.0)
        return search.step(search.start([scales]), long_case.encoder_out)

    everything, freed = run(None), run(20)
    assert len(everything.tree) > 200
    assert len(freed.tree) < 80
    assert freed.nbest(8) == everything.nbest(8)


def test_forbidden_labels_are_never_emitted():
    case = Case(TableScorer(4, 1), encoder_out(6, 4, 1))
    hyps = TransducerSearch(case.scorer, beam_size=10, forbidden_labels=[3])(
        case.encoder_out, nbest=10
    )
    free = TransducerSearch(case.scorer, beam_size=10)(case.encoder_out, nbest=10)
    assert any(3 in h.labels for h in free)
    assert not any(3 in h.labels for h in hyps)


def test_masked_labels_are_legal_with_any_scale():
    class Masked(TableScorer):
        def scores(self, frame, prefixes):
            blank, labels, lm = super().scores(frame, prefixes)
            labels[:, 0] = lm[:, 0] = -torch.inf
            return blank, labels, lm

    case = Case(Masked(3, 2), encoder_out(4, 3, 2))
    for beta in (0.0, 0.5):
        hyps = TransducerSearch(case.scorer, beam_size=20)(
            case.encoder_out, Scales(beta=beta), nbest=20
        )
        assert len(hyps) == 20
        for hyp in hyps:
            assert 0 not in hyp.labels
            assert math.isfinite(hyp.total) and math.isfinite(hyp.lm)


def test_length_normalization_ranks_by_score_per_symbol(long_case):
    search = TransducerSearch(long_case.scorer, beam_size=16)
    plain = search(long_case.encoder_out, nbest=16)
    normalized = search(long_case.encoder_out, nbest=16, normalize_length=True)
    assert set(plain) == set(normalized)
    assert [h.total for h in plain] == sorted((h.total for h in plain), reverse=True)
    per_symbol = [h.total / (len(h.labels) + 1) for h in normalized]
    assert per_symbol == sorted(per_symbol, reverse=True)
    assert normalized != plain


def test_label_bonus_makes_hypotheses_longer(long_case):
    search = TransducerSearch(long_case.scorer, beam_size=8)
    lengths = [
        len(search(long_case.encoder_out, Scales(label_bonus=bonus))[0].labels)
        for bonus in (-3.0, 0.0, 3.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


def test_scores_that_are_not_numbers_are_an_error():
    for column in (0, -1):
        out = encoder_out(5, 3, 0)
        out[3, column] = float("nan")
        with pytest.raises(SearchError, match="frame 3"):
            TransducerSearch(TableScorer(3, 0), beam_size=4)(out)


def test_no_frames_give_the_empty_hypothesis():
    (hyp,) = TransducerSearch(TableScorer(3, 0), beam_size=4)(torch.zeros(0, 4))
    assert hyp.labels == () and hyp.total == 0.0 and hyp.frames == ()


def test_tree_reads_back_labels_and_shares_prefixes():
    scorer = TableScorer(3, 0)
    tree = PrefixTree(scorer)
    a, b = tree.children([ROOT, ROOT], [1, 2], [-0.5, -1.0])
    (c,) = tree.children([b], [0], [-0.25])
    assert tree.children([ROOT, b], [2, 0], [0.0, 0.0]) == [b, c]
    assert tree.labels_of(c) == [2, 0] and tree.labels_of(a) == [1]
    assert tree.lm_sum[c] == -1.25
    assert scorer.extended == [(1,), (2,), (2, 0)]
    assert len(tree) == 4
