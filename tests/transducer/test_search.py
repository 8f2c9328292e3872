"""Beam search: against exhaustive enumeration, its cost, and its options."""

import math

import numpy as np
import pytest
import torch
import torchaudio

from espnet_llm_plugin.transducer.hypothesis import Scales, SearchError
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


class TestTablesSubtractingAnLM(SearchContract):
    """Negative beta, scaled blanks: no bound on what a label can score."""

    scales = Scales(alpha=0.2, beta=-0.3, lm_weight=0.6, label_bonus=1.0, blank_scale=0.7)

    def case(self, seed):
        return Case(TableScorer(3, seed), encoder_out(3, 3, seed), TableLM(3, seed))


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


EVERYTHING = Scales(alpha=0.4, beta=0.7, lm_weight=0.5, label_bonus=0.8, blank_scale=0.9)
EVERYTHING_BUT_LM = Scales(alpha=0.4, beta=0.7, label_bonus=0.8)


def test_networks_run_once_per_prefix_and_once_per_step(long_case):
    scorer, lm = long_case.scorer, long_case.external_lm
    search = TransducerSearch(scorer, beam_size=8, max_symbols_per_frame=2, external_lm=lm)
    tree = search.step(search.start([EVERYTHING]), long_case.encoder_out).tree
    assert tree.num_created > 30
    counts = (tree.num_predictor, tree.num_external)
    for extended, count in zip((scorer.extended, lm.extended), counts):
        assert 10 < len(extended) == len(set(extended)) <= tree.num_created
        assert count in (len(extended), len(extended) + 1)  # the empty prefix
    # a batch for each level of a frame at most
    assert scorer.calls <= 2 * 30 and len(scorer.extended) > 1.5 * scorer.calls


def test_networks_do_not_run_for_prefixes_that_die_in_their_frame(long_case):
    scorer = long_case.scorer
    search = TransducerSearch(scorer, beam_size=8, max_symbols_per_frame=1)
    state = search.start([Scales()])
    lived = set()
    for frame in long_case.encoder_out:
        state = search.step(state, frame[None])
        lived |= {tuple(state.tree.labels_of(node)) for node in state.beam.node[0]}
    assert set(scorer.extended) <= lived
    assert len(scorer.extended) < 0.8 * state.tree.num_created


def test_a_batch_equals_each_utterance_alone():
    """Rows of different lengths, one of them empty, with networks shared."""
    lengths = torch.tensor([12, 5, 0, 9])
    out = torch.stack([encoder_out(12, 6, seed, blank=0.3) for seed in range(4)])
    for beam in (1, 5):
        for scales in (Scales(), EVERYTHING):
            scorer, lm = TableScorer(6, 7), TableLM(6, 7)
            search = TransducerSearch(scorer, beam_size=beam, external_lm=lm)
            together = search.batch(out, lengths, scales, nbest=beam)
            assert len(scorer.extended) == len(set(scorer.extended))
            assert len(together) == 4
            for hyps, row, length in zip(together, out, lengths):
                alone = search(row[:length], scales, nbest=beam)
                assert [h.labels for h in hyps] == [h.labels for h in alone]
                assert [h.frames for h in hyps] == [h.frames for h in alone]
                for name in ("total", "acoustic", "lm", "external_lm", "blank"):
                    assert [getattr(h, name) for h in hyps] == pytest.approx(
                        [getattr(h, name) for h in alone], abs=1e-4
                    )


def test_a_batch_in_ragged_chunks_equals_the_whole():
    lengths = torch.tensor([12, 5, 9])
    out = torch.stack([encoder_out(12, 6, seed, blank=0.3) for seed in range(3)])
    chunks = [(4, 4, 0), (0, 1, 5), (8, 0, 4)]
    for beam in (1, 5):
        search = TransducerSearch(TableScorer(6, 7), beam_size=beam)
        whole = search.batch(out, lengths, EVERYTHING_BUT_LM, nbest=beam)
        state, done = search.start([EVERYTHING_BUT_LM], utterances=3), [0, 0, 0]
        for counts in chunks:
            chunk = torch.zeros(3, max(counts), 7)
            for i, count in enumerate(counts):
                chunk[i, :count] = out[i, done[i] : done[i] + count]
                done[i] += count
            before = state.nbest(beam)
            after = search.step(state, chunk, torch.tensor(counts))
            assert state.nbest(beam) == before
            state = after
        for hyps, expected in zip(state.nbest(beam), whole):
            assert [(h.labels, h.frames) for h in hyps] == [(h.labels, h.frames) for h in expected]
            assert [h.total for h in hyps] == pytest.approx([h.total for h in expected], abs=1e-4)


def test_a_batch_with_several_settings_equals_each_alone():
    lengths = torch.tensor([10, 6])
    out = torch.stack([encoder_out(10, 6, seed) for seed in range(2)])
    settings = [EVERYTHING_BUT_LM, Scales(), Scales(alpha=0.9, label_bonus=-1.0, blank_scale=0.8)]
    for beam in (1, 4):
        search = TransducerSearch(TableScorer(6, 7), beam_size=beam)
        state = search.start(settings, utterances=2)
        lists = search.step(state, out, lengths).nbest(beam)
        for i, hyps in enumerate(lists):
            utterance, setting = divmod(i, 3)
            row = out[utterance, : lengths[utterance]]
            alone = search(row, settings[setting], nbest=beam)
            assert [h.labels for h in hyps] == [h.labels for h in alone]
            assert [h.total for h in hyps] == pytest.approx([h.total for h in alone], abs=1e-4)


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
    def run(max_bytes):
        search = TransducerSearch(
            long_case.scorer,
            beam_size=8,
            external_lm=long_case.external_lm,
            max_bytes=max_bytes,
        )
        scales = Scales(beta=0.3, lm_weight=0.3, label_bonus=2.0)
        return search.step(search.start([scales]), long_case.encoder_out)

    labels = long_case.scorer.num_labels
    each = 100 + 4 * labels  # the table's word for it, and the external LM's row
    everything, freed, some = run(None), run(20 * each), run(150 * each + 1)
    assert everything.tree.bytes_per_prefix == each
    assert len(everything.tree) > 200
    # what one frame makes comes on top
    assert 150 - 8 * labels < len(some.tree) <= 150 < 0.8 * len(everything.tree)
    needed = {n for node in freed.beam.node[0] for n in freed.tree.path(node)} | {ROOT}
    assert len(needed) <= len(freed.tree) <= 1.2 * len(needed) < 0.6 * len(everything.tree)
    assert freed.nbest(8) == some.nbest(8) == everything.nbest(8)


def test_forbidden_labels_are_never_emitted():
    case = Case(TableScorer(4, 1), encoder_out(6, 4, 1))
    hyps = TransducerSearch(case.scorer, beam_size=10, forbidden_labels=[3])(
        case.encoder_out, nbest=10
    )
    free = TransducerSearch(case.scorer, beam_size=10)(case.encoder_out, nbest=10)
    assert any(3 in h.labels for h in free)
    assert not any(3 in h.labels for h in hyps)


def test_masked_labels_are_never_emitted_with_any_scale():
    class Masked(TableScorer):
        def lm(self, labels):
            lm = super().lm(labels)
            lm[0] = -1e4  # as pools clamp it
            return lm

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


def test_tree_reads_back_labels_shares_prefixes_and_computes_on_demand():
    scorer = TableScorer(3, 0)
    tree = PrefixTree(scorer.prefixes(), 3, TableLM(3))
    a, b = tree.children(np.array([ROOT, ROOT]), np.array([1, 2]))
    (c,) = tree.children(np.array([b]), np.array([0]))
    assert tree.children(np.array([ROOT, b]), np.array([2, 0])).tolist() == [b, c]
    assert tree.labels_of(c) == [2, 0] and tree.labels_of(a) == [1]
    assert len(tree) == 4 and tree.num_created == 3
    assert scorer.extended == []
    tree.need_predictor(np.array([a]), together=np.array([ROOT, b]))
    assert scorer.extended == [(1,), (2,)] and scorer.calls == 1
    expected = scorer.lm([])[2] + scorer.lm([2])[0]
    assert tree.lm_sum(c) == pytest.approx(float(expected))
    assert scorer.calls == 1  # the last label's own row is not needed
    # a prefix whose beginnings are not computed either
    expected = tree.external_lm.row([])[2] + tree.external_lm.row([2])[0]
    assert tree.external_sum(c) == pytest.approx(float(expected))
    assert tree.external_lm.extended == [(2,)]
    torch.testing.assert_close(
        tree.external_rows(np.array([c, a])),
        torch.stack([tree.external_lm.row([2, 0]), tree.external_lm.row([1])]),
    )
