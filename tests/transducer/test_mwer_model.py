"""MWER training of whole models: options, statistics, gradients, lists."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer import mwer as mwer_module
from espnet_llm_plugin.transducer.base_model import trim
from espnet_llm_plugin.transducer.mwer import MWER
from espnet_llm_plugin.transducer.nbest import evaluation_mode, nbest
from espnet_llm_plugin.transducer.nbest_scores import factorized_nbest_nll
from tests.transducer.tiny import DIM, batch, factorized, rnnt, save_llm

KINDS = ("stateless", "lstm", "rnnt")
CONF = {"nbest": 3, "beam_size": 5}


def make(kind="stateless", mwer_weight=1.0, ctc_weight=0.0, llm=None, **conf):
    """A model with MWER training; ``conf`` is mwer_conf."""
    model_conf = {"mwer_weight": mwer_weight, "mwer_conf": conf, "ctc_weight": ctc_weight}
    if kind == "rnnt":
        return rnnt(**model_conf)
    predictor_conf = {"predictor_conf": {"llm": llm}} if kind == "llm" else {}
    return factorized(predictor=kind, model_conf=model_conf, **predictor_conf)


@pytest.fixture
def searches(monkeypatch):
    """Every call of the search: (encoder output, lengths, beam size, nbest, max symbols)."""
    calls = []

    def search(model, *args):
        calls.append(args)
        return nbest(model, *args)

    monkeypatch.setattr(mwer_module, "nbest", search)
    return calls


def given(monkeypatch, *lists):
    """Let the search return these labels, whatever the model."""
    monkeypatch.setattr(
        mwer_module, "nbest", lambda model, encoder_out, *_: list(lists)[: len(encoder_out)]
    )


def gradients(model, loss):
    model.zero_grad()
    loss.sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


# --- loss and options ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_weights_of_its_parts(kind, searches):
    plain = make(kind, mwer_weight=0.0, ctc_weight=0.3)
    loss, stats, weight = plain(*batch())
    assert not [name for name in stats if "mwer" in name] and not searches
    model = make(kind, mwer_weight=0.7, ctc_weight=0.3, rnnt_weight=0.05, **CONF)
    with_mwer, mwer_stats, mwer_weight = model(*batch())
    assert len(searches) == 1 and weight == mwer_weight
    for name in ("loss_transducer", "loss_ctc", "nll_per_label"):
        torch.testing.assert_close(mwer_stats[name], stats[name])
    expected = 0.05 * stats["loss_transducer"] + 0.3 * stats["loss_ctc"]
    expected = expected + 0.7 * mwer_stats["loss_mwer"]
    torch.testing.assert_close(with_mwer.detach(), expected)
    torch.testing.assert_close(mwer_stats["loss"], expected)
    assert {"loss_mwer", *MWER.STATS} == {name for name in mwer_stats if "mwer" in name}


def test_ilm_loss_beside_mwer():
    conf = {"mwer_weight": 1.0, "mwer_conf": CONF, "ilm_weight": 0.2}
    loss, stats, _ = factorized(model_conf=conf)(*batch())
    expected = factorized(model_conf={"ilm_weight": 0.2})(*batch())[1]["loss_ilm"]
    torch.testing.assert_close(stats["loss_ilm"], expected)
    parts = 0.1 * stats["loss_transducer"] + stats["loss_mwer"] + 0.2 * stats["loss_ilm"]
    torch.testing.assert_close(loss.detach(), parts)


def test_options_of_the_search(searches):
    model = make(nbest=2, beam_size=6, max_symbols_per_frame=1)
    stats = model(*batch())[1]
    assert searches[0][2:] == (6, 2, 1) and stats["mwer_num_hyps"] == 2
    assert make(nbest=5, beam_size=5)(*batch())[1]["mwer_num_hyps"] == 5


def test_at_most_so_many_labels_a_frame():
    encoder_out = torch.zeros(1, 2, DIM)
    model = factorized(label_bonus=100.0)  # as many labels as are allowed
    for most in (1, 3):
        assert len(nbest(model, encoder_out, torch.tensor([2]), 4, 1, most)[0][0]) == 2 * most


def test_score_scale(searches):
    effective = [
        float(make(score_scale=scale, **CONF)(*batch())[1]["mwer_effective_hyps"])
        for scale in (0.01, 1.0, 100.0)
    ]
    assert effective[0] == pytest.approx(3, abs=0.01)
    assert effective[0] > effective[1] > effective[2] >= 1


@pytest.mark.parametrize("mwer_weight", [0.0, 1.0])
def test_validation_has_the_plain_loss_and_on_request_the_statistics(mwer_weight, searches):
    plain = make(mwer_weight=0.0).eval()(*batch())
    silent = make(mwer_weight=mwer_weight, **CONF).eval()(*batch())
    assert not searches and silent[1].keys() == plain[1].keys()
    asked = make(mwer_weight=mwer_weight, valid_stats=True, **CONF).eval()(*batch())
    assert len(searches) == 1 and set(asked[1]) == {*plain[1], "loss_mwer", *MWER.STATS}
    for loss in (silent[0], asked[0]):
        torch.testing.assert_close(loss, plain[0])


def test_wrong_options():
    with pytest.raises(UserError, match="mwer_weight must not be negative, got -1"):
        make(mwer_weight=-1)
    for kind in ("stateless", "rnnt"):
        with pytest.raises(UserError, match="model_conf.mwer_conf: unknown option 'beta'; valid o"):
            make(kind, beta=1.0)


# --- gradients ---


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_model_is_the_weighted_sum_of_the_hypotheses(kind, monkeypatch):
    lists = [(1, 2), (3,), ()], [(0,), (0, 0)], [(4, 4), (4,), (2, 4, 1)]
    given(monkeypatch, *lists)
    model = make(kind, rnnt_weight=0.0)
    errors = torch.tensor([[1.0, 2, 3], [1, 0, 0], [1, 0, 2]])  # to ((2,3,4), (1,1), (5,))
    loss, stats, _ = model(*batch())
    ours = gradients(model, loss)

    speech, frames, _, _ = batch()
    expected = dict.fromkeys(ours, 0.0)
    expected_errors = 0.0
    for b, hyps in enumerate(lists):
        one = speech[b : b + 1, : int(frames[b])]
        scores, parts = [], []
        for hyp in hyps:
            tokens = torch.tensor([label + 1 for label in hyp]).long()[None]
            length = torch.tensor([len(hyp)])
            encoded = model.encode_frames(one, frames[b : b + 1])
            keep = torch.tensor([True])
            lattice = trim(*encoded, tokens, length, keep)
            score = -model.lattice_nll(lattice)[0]
            parts.append(gradients(model, score))
            scores.append(score.detach())
        probs = torch.cat(scores).softmax(0)
        risk = errors[b, : len(hyps)]
        expected_errors += float((probs * risk).sum()) / 3
        for p, r, part in zip(probs, risk, parts):
            for name, gradient in part.items():
                expected[name] = expected[name] + p * (r - (probs * risk).sum()) * gradient / 3
    assert float(stats["mwer_expected_errors"]) == pytest.approx(expected_errors, abs=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in ours.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
def test_finite_differences_through_lattice_and_list(blank_norm):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()

    targets = torch.tensor([[[0, 1], [2, 0], [1, 0]]])
    errors = torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.double)
    sizes = torch.tensor([2]), torch.tensor([[2, 1, 0]])

    def loss(acoustic, lm, blank):
        nll = factorized_nbest_nll(
            acoustic, lm, blank, targets, *sizes, lm_scale=0.7, blank_norm=blank_norm
        )
        return mwer_module.mwer_loss(-nll, errors, score_scale=0.8)[0]

    assert torch.autograd.gradcheck(loss, (draw(1, 2, 3), draw(1, 3, 3, 3), draw(1, 2, 3, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_is_single(kind):
    model = make(kind, rnnt_weight=0.0, **CONF)
    together = gradients(model, model(*batch())[0])
    alone = dict.fromkeys(together, 0.0)
    speech, frames, text, lengths = batch()
    for b in range(3):
        row = slice(b, b + 1)
        loss = model(speech[row, : frames[b]], frames[row], text[row], lengths[row])[0]
        alone = {name: alone[name] + g / 3 for name, g in gradients(model, loss).items()}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-5, rtol=1e-4, msg=name)


# --- the lists ---


def test_utterances_without_variance_contribute_their_transcripts_alone(monkeypatch):
    given(monkeypatch, [(0,), (3,), (4,)], [(2, 2)], [(0,), (1,)])
    model = make(rnnt_weight=0.3)
    loss, stats, _ = model(*batch(labels=((2, 3), (1, 1), (5,))))
    assert stats["mwer_no_variance"] == 1 and abs(float(stats["loss_mwer"])) < 1e-6
    assert stats["mwer_expected_errors"] == stats["mwer_oracle_errors"]
    ours = gradients(model, loss)
    plain = make(mwer_weight=0.0)
    expected = gradients(plain, 0.3 * plain(*batch(labels=((2, 3), (1, 1), (5,))))[0])
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_statistics_of_given_lists(monkeypatch):
    # frames 6, 4, 5; one utterance with a duplicate, one without hypotheses
    given(monkeypatch, [(1, 2, 3), (1, 2), (1, 2, 3)], [], [(4,), ()])
    stats = make()(*batch())[1]
    assert stats["mwer_num_hyps"] == 2  # of two utterances; the third has none
    assert stats["mwer_oracle_errors"] == 0 and stats["mwer_no_variance"] == 0
    assert 0 < float(stats["mwer_expected_errors"]) < 1
    assert 1 < float(stats["mwer_effective_hyps"]) <= 2
    assert float(stats["mwer_onebest_errors"]) in (0.0, 0.5, 1.0)


def test_hypotheses_longer_than_transcripts_may_be_are_dropped(monkeypatch):
    given(monkeypatch, [(1,) * 7, (1,) * 6, (2,)], [(0,)], [(0,) * 9])
    stats = make()(*batch())[1]  # frames 6, 4, 5
    assert stats["mwer_num_hyps"] == 1.5  # two, one, and an utterance without any


def test_of_nothing_but_empty_sequences(monkeypatch):
    given(monkeypatch, [()], [()], [()])
    for kind in KINDS:
        model = make(kind)
        loss, stats, _ = model(*batch(labels=((), (), ())))
        assert stats["mwer_num_hyps"] == 1 and stats["mwer_expected_errors"] == 0
        assert all(g.isfinite().all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("refresh, expected", [(0, 4), (3, 2), (100, 1)])
def test_lists_are_reused(refresh, expected, searches):
    model = make(refresh=refresh, valid_stats=True, **CONF)
    losses = []
    for _ in range(4):
        losses.append(float(model(*batch(), utt_id=["a", "b", "c"])[1]["loss_mwer"]))
    assert len(searches) == expected
    assert losses == pytest.approx([losses[0]] * 4)
    # a validation set may have the same names: it is always searched, and replaces nothing
    with torch.no_grad():
        model.eval()(*batch(seed=1), utt_id=["a", "b", "c"])
    assert len(searches) == expected + 1
    again = model.train()(*batch(), utt_id=["a", "b", "c"])[1]
    assert float(again["loss_mwer"]) == pytest.approx(losses[0])


def test_lists_belong_to_the_utterances_that_are_left(searches):
    model = make(refresh=100, **CONF)
    names = ["too short", "b", "c"]
    given_batch = batch(frames=(1, 4, 5), labels=((1, 2, 3), (1, 1), (5,)))
    for _ in range(2):
        model(*given_batch, utt_id=names)
    assert len(searches) == 1 and set(model.mwer.cache._lists) == {"b", "c"}


def test_the_search_sees_what_the_loss_sees_and_leaves_training_modes_alone(monkeypatch):
    model = make("lstm", **CONF)
    model.decoder.predictor.dropout.p = 0.5
    model.decoder.blank.eval()  # somebody's choice, to be kept
    seen = []
    original = model.decoder.predictor.extend

    def extend(*args):
        seen.append((model.decoder.predictor.dropout.training, model.encoder.training))
        assert not torch.is_grad_enabled()
        return original(*args)

    monkeypatch.setattr(model.decoder.predictor, "extend", extend)
    encoded = []
    encode = model.encode_frames
    monkeypatch.setattr(
        model, "encode_frames", lambda *args: encoded.append(encode(*args)) or encoded[-1]
    )
    searched = []
    monkeypatch.setattr(
        mwer_module,
        "nbest",
        lambda model, *args: searched.append(args) or nbest(model, *args),
    )
    model(*batch())
    assert len(encoded) == 1 and torch.equal(searched[0][0], encoded[0][0])
    assert seen and set(seen) == {(False, True)}
    assert model.decoder.predictor.dropout.training and not model.decoder.blank.training
    with pytest.raises(ZeroDivisionError), evaluation_mode(model.decoder):
        raise ZeroDivisionError
    assert model.decoder.predictor.dropout.training and not model.decoder.blank.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_diverged_fails_like_without_mwer(kind):
    model = make(kind, **CONF)
    speech, *rest = batch()
    speech[1, 4:] = torch.nan  # beyond its four frames
    assert model(speech, *rest)[1]["mwer_num_hyps"] == 3
    speech[1] = torch.nan
    loss, stats, _ = model(speech, *rest)
    assert stats["mwer_num_hyps"] == 3  # of those that have any
    assert loss.isnan().all()  # ESPnet's trainer skips the update
    assert float(stats["mwer_expected_errors"]) > 0  # of the other utterances


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(kind):
    expected, stats, _ = make(kind, **CONF)(*batch())
    model = make(kind, **CONF)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, amp_stats, _ = model(*batch())
    assert loss.dtype == torch.float32 and amp_stats["loss_mwer"].dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


def test_a_frozen_llm(tmp_path):
    llm = save_llm(tmp_path)
    model = make("llm", llm=llm, **CONF)
    loss, stats, _ = model(*batch())
    found = gradients(model, loss)
    assert all(g.abs().sum() > 0 for g in found.values() if g.numel() > 10)
    network = model.decoder.predictor.llm.model(torch.device("cpu"))
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert stats["mwer_num_hyps"] == 3
    # and of the LM scale outside the softmax, which the LLM's scores get in list and probabilities
    model.decoder.beta = 2.0
    assert float(model(*batch())[1]["loss_mwer"]) != pytest.approx(float(stats["loss_mwer"]))


# --- training ---


@pytest.mark.parametrize("kind", KINDS)
def test_updates_lower_the_expected_word_errors(kind):
    """With nothing but the MWER loss, which only the word errors can guide."""
    model = make(kind, rnnt_weight=0.0, valid_stats=True, nbest=4, beam_size=6)
    data = batch(frames=(6, 4, 5, 7), labels=((2, 3, 4), (1, 1), (5,), (4, 2, 4)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def expected_errors():
        with torch.no_grad():
            return {k: float(v) for k, v in model.eval()(*data)[1].items()}

    before = expected_errors()
    for _ in range(40):
        model.train()
        optimizer.zero_grad()
        model(*data)[0].backward()
        optimizer.step()
    after = expected_errors()
    assert after["mwer_expected_errors"] < 0.8 * before["mwer_expected_errors"]
    assert after["mwer_onebest_errors"] < before["mwer_onebest_errors"]
