"""The ESPnet models: losses, statistics, starts from CTC, and bad input."""

import logging
import math

import pytest
import torch
import torchaudio
from espnet2.asr.decoder.rnn_decoder import RNNDecoder
from espnet2.torch_utils.initialize import initialize
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from espnet2.train.reporter import Reporter

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.joint import posterior
from espnet_llm_plugin.transducer.model import FactorizedTransducerModel, TransducerModel
from tests.contracts.checkpoint_contract import CheckpointContract
from tests.transducer.tiny import (
    DIM,
    LABELS,
    TOKENS,
    VOCAB,
    batch,
    decoder,
    factorized,
    parts,
    rnnt,
    save_llm,
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def other_llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("other"), seed=1)


def both(**model_conf):
    yield rnnt(**model_conf)
    yield rnnt(acoustic_residual=True, **model_conf)
    yield factorized(predictor="lstm", model_conf=model_conf)


def full_tensor_nll(model, speech, lengths, text, text_lengths):
    """torchaudio's loss on the full (B, T, U+1, V) tensor of log-posteriors."""
    encoder_out, frames = model.encode(speech, lengths)
    text = text.clamp(min=1)
    if isinstance(model, FactorizedTransducerModel):
        factors = model.decoder(encoder_out, frames, text - 1, text_lengths)
        blank, labels = posterior(
            factors.acoustic_logits[:, :, None],
            factors.lm_log_probs[:, None],
            factors.blank_logits,
            model.decoder.lm_scale,
            model.decoder.blank_norm,
        )
        log_probs = torch.cat([blank[..., None], labels], dim=-1)
    else:
        history = torch.cat([torch.zeros_like(text[:, :1]), text], dim=1)
        out = model.decoder(history)
        logits = model.joint_network(encoder_out[:, :, None], out[:, None])
        log_probs = logits.log_softmax(-1)
    return torchaudio.functional.rnnt_loss(
        log_probs,
        text.int(),
        frames.int(),
        text_lengths.int(),
        blank=0,
        reduction="none",
        fused_log_softmax=False,
    )


@pytest.mark.parametrize("lm_scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
def test_factorized_loss_is_that_of_the_full_tensor(blank_norm, lm_scale):
    model = factorized(predictor="lstm", blank_norm=blank_norm, lm_scale=lm_scale)
    data = batch()
    expected = full_tensor_nll(model, *data).mean()
    loss, stats, weight = model(*data)
    torch.testing.assert_close(loss[0], expected, atol=1e-4, rtol=1e-5)
    gradient = torch.autograd.grad(expected, model.decoder.parameters(), allow_unused=True)
    loss.backward()
    for (name, parameter), other in zip(model.decoder.named_parameters(), gradient):
        if other is None:  # lm_scale 0: the predictor is not trained
            assert lm_scale == 0 and name.startswith("predictor")
            assert parameter.grad is None or parameter.grad.abs().max() == 0
        else:
            torch.testing.assert_close(parameter.grad, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_rnnt_loss_is_that_of_the_full_tensor(residual):
    model = rnnt(acoustic_residual=residual)
    data = batch()
    loss, _, _ = model(*data)
    torch.testing.assert_close(loss[0], full_tensor_nll(model, *data).mean())


def test_ragged_batch_is_each_utterance_alone():
    speech, lengths, text, text_lengths = batch(frames=(6, 3, 5), labels=((2, 3, 4), (1,), ()))
    for model in both():
        together = model.utterance_nll(speech, lengths, text, text_lengths)
        for i in range(3):
            alone = model.utterance_nll(
                speech[i : i + 1, : lengths[i]],
                lengths[i : i + 1],
                text[i : i + 1, : text_lengths[i]],
                text_lengths[i : i + 1],
            )
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_padding_has_no_effect():
    speech, lengths, text, text_lengths = batch()
    inside = torch.arange(speech.shape[1]) < lengths[:, None]
    other_speech = torch.where(inside[..., None], speech, torch.randn_like(speech))
    other_speech = torch.nn.functional.pad(other_speech, (0, 0, 0, 4), value=3.0)
    other_text = torch.nn.functional.pad(text.masked_fill(text < 0, 5), (0, 2), value=0)
    for model in both(ctc_weight=0.3):
        loss, stats, _ = model(speech, lengths, text, text_lengths)
        other, other_stats, _ = model(other_speech, lengths, other_text, text_lengths)
        torch.testing.assert_close(other, loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other_stats, stats, atol=1e-5, rtol=1e-5)


def test_empty_transcripts():
    """A batch of silence is legal: the likelihood of blanks alone."""
    speech, lengths, text, text_lengths = batch(frames=(4, 2), labels=((), ()))
    for model in both(ctc_weight=0.3):
        loss, stats, _ = model(speech, lengths, text, text_lengths)
        assert torch.isfinite(loss).all() and stats["num_skipped"] == 0
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_losses_add_up_with_their_weights():
    data = batch()
    conf = dict(ctc_weight=0.3, ilm_weight=0.2)
    model = factorized(predictor="lstm", model_conf=conf)
    loss, stats, weight = model(*data)
    nll = full_tensor_nll(model, *data)
    labels = int(data[3].sum())
    text = data[2].clamp(min=1) - 1
    log_probs = model.decoder.predictor(text)[:, :-1].gather(-1, text[..., None])[..., 0]
    ilm = -sum(log_probs[i, : data[3][i]].sum() for i in range(3)) / 3
    encoder_out, frames = model.encode(*data[:2])
    ctc = torch.stack(
        [
            torch.nn.functional.ctc_loss(
                model.ctc.log_softmax(encoder_out[i : i + 1]).transpose(0, 1),
                data[2][i : i + 1, : data[3][i]],
                frames[i : i + 1],
                data[3][i : i + 1],
                reduction="sum",
            )
            for i in range(3)
        ]
    ).mean()
    expected = {
        "loss_transducer": nll.mean(),
        "nll_per_label": nll.sum() / labels,
        "num_skipped": torch.tensor(0.0),
        "loss_ctc": ctc,
        "loss_ilm": ilm,
        "loss": nll.mean() + 0.3 * ctc + 0.2 * ilm,
    }
    assert list(stats) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(stats[name][0], value.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss, stats["loss"])
    assert weight == 3


def test_ctc_weight_one_keeps_the_decoder():
    """ESPnet drops the decoder at ctc_weight 1; here CTC is auxiliary at any weight."""
    model = rnnt(ctc_weight=1.0)
    _, stats, _ = model(*batch())
    torch.testing.assert_close(stats["loss"], stats["loss_transducer"] + stats["loss_ctc"])
    assert rnnt().ctc is None


def test_utterances_with_too_many_labels_are_left_out(caplog):
    speech, lengths, text, text_lengths = batch(
        frames=(6, 2, 5), labels=((2, 3, 4), (1, 2, 3), (5,))
    )
    kept = torch.tensor([0, 2])
    for model in both(ctc_weight=0.3):
        caplog.clear()
        expected, expected_stats, _ = model(
            speech[kept], lengths[kept], text[kept], text_lengths[kept]
        )
        for _ in range(2):
            loss, stats, weight = model(
                speech, lengths, text, text_lengths, utt_id=["one", "two", "three"]
            )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(stats["nll_per_label"], expected_stats["nll_per_label"])
        assert stats["num_skipped"] == 1 and weight == 2
        messages = [record.message for record in caplog.records if "skipped" in record.message]
        assert len(messages) == 1  # once, although seen twice
        assert "skipped two: 3 labels but only 2 encoder frames" in messages[0]


def test_labels_per_frame_is_an_option():
    speech, lengths, text, text_lengths = batch(frames=(2,), labels=((1, 2, 3),))
    for ratio, skipped in ((1.0, 1), (1.5, 0), (2.0, 0)):
        for model in both(max_labels_per_frame=ratio):
            _, stats, _ = model(speech, lengths, text, text_lengths)
            assert stats["num_skipped"] == skipped


def test_a_batch_of_which_nothing_is_left():
    """A zero with a zero gradient for every parameter, and the same statistics as ever."""
    data = batch(frames=(2, 1), labels=((1, 2, 3), (2, 3)))
    for model in both(ctc_weight=0.3):
        loss, stats, weight = model(*data, utt_id=["one", "two"])
        assert loss == 0 and stats["num_skipped"] == 2 and 0 < weight < 1e-9
        _, other, _ = model(*batch())
        assert list(other) == list(stats)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1,)])
def test_a_batch_of_which_nothing_is_left_changes_no_reported_mean(order):
    """By ESPnet's reporter, as in the training and in the validation of one process."""
    batches = [batch(), batch(frames=(2, 1), labels=((1, 2, 3), (2, 3)))]
    model = rnnt(ctc_weight=0.3)
    reporter = Reporter()
    with reporter.observe("valid", epoch=1) as epoch:
        for index in order:
            _, stats, weight = model(*batches[index], utt_id=["one", "two", "three"])
            epoch.register(stats, weight)
            epoch.next()
    expected = model(*batches[0])[1]
    for name, value in expected.items():
        reported = reporter.get_value("valid", name, 1)
        if 0 in order:
            assert reported == pytest.approx(value.item(), rel=1e-6), name
        else:
            assert math.isfinite(reported)


def test_only_frozen_parameters_are_left_out_of_an_empty_batch():
    model = factorized(predictor="lstm")
    model.decoder.predictor.requires_grad_(False)
    model(*batch(frames=(1,), labels=((1, 2),)))[0].backward()
    assert all(p.grad is None for p in model.decoder.predictor.parameters())


def test_blank_and_eos_in_a_transcript():
    for token in (0, VOCAB - 1):
        with pytest.raises(UserError, match="token ids must be in 1..5"):
            factorized()(*batch(frames=(4,), labels=((1, token),)))


def test_size_of_the_acoustic_logits_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    model = factorized()
    for _ in range(2):
        model(*batch())
    assert caplog.text.count("acoustic logits B x T x V = 3 x 6 x 7") == 1


def test_rnnt_never_builds_the_full_tensor(monkeypatch):
    model = rnnt()
    monkeypatch.setattr(model.joint_network, "forward", lambda *args: 1 / 0)
    model(*batch())[0].backward()


def test_half_precision_autocast():
    data = batch()
    for model in both(ctc_weight=0.3):
        exact, _, _ = model(*data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _, _ = model(*data)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.03)
        loss.backward()


# --- starts from a CTC model ---


@pytest.fixture
def ctc_checkpoint(tmp_path):
    """An ESPnet checkpoint with a trained CTC output layer, and that layer."""
    layer = torch.nn.Linear(DIM, VOCAB)
    torch.nn.init.normal_(layer.weight, std=2)
    torch.save({f"ctc.ctc_lo.{k}": v for k, v in layer.state_dict().items()}, tmp_path / "ctc.pth")
    return f"{tmp_path}/ctc.pth", layer


@pytest.mark.parametrize("init", [None, "xavier_uniform"])
@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
def test_factorized_starts_at_the_ctc_posterior(ctc_checkpoint, blank_norm, init):
    path, layer = ctc_checkpoint
    made = decoder(blank_norm=blank_norm)
    made.blank.espnet_initialization_fn()
    model = FactorizedTransducerModel(**parts(), decoder=made, joint_network=None)
    if init:
        initialize(model, init)
    load_pretrained_model(f"{path}:ctc.ctc_lo:decoder.acoustic_output", model, False)
    encoder_out = torch.randn(2, 5, DIM)
    labels = torch.randint(LABELS, (2, 3))
    factors = made(encoder_out, torch.tensor([5, 5]), labels, torch.tensor([3, 3]))
    blank, scores = posterior(
        factors.acoustic_logits[:, :, None],
        factors.lm_log_probs[:, None],
        factors.blank_logits,
        0.0,
        blank_norm,
    )
    probs = layer(encoder_out).softmax(-1)[..., :-1]  # without <sos/eos>
    probs = (probs / probs.sum(-1, keepdim=True))[:, :, None].expand(2, 5, 4, VOCAB - 1)
    torch.testing.assert_close(blank.exp(), probs[..., 0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.exp(), probs[..., 1:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("init", [None, "chainer"])
def test_rnnt_starts_at_the_ctc_posterior(ctc_checkpoint, init):
    path, layer = ctc_checkpoint
    model = rnnt(acoustic_residual=True)
    if init:
        initialize(model, init)
    load_pretrained_model(f"{path}:ctc.ctc_lo:joint_network.acoustic_output", model, False)
    encoder_out = torch.randn(2, 5, 1, DIM)
    out = model.joint_network(encoder_out, model.decoder(torch.tensor([[0, 1], [0, 5]]))[:, None])
    expected = layer(encoder_out).softmax(-1).expand(2, 5, 2, VOCAB)
    torch.testing.assert_close(out.softmax(-1), expected)


def test_residual_keeps_espnets_joint_network():
    """Same parameter names, same output plus the acoustic logits."""
    plain, residual = rnnt(seed=3), rnnt(seed=3, acoustic_residual=True)
    new = set(residual.state_dict()) - set(plain.state_dict())
    assert new == {"joint_network.acoustic_output.weight", "joint_network.acoustic_output.bias"}
    assert set(plain.state_dict()) <= set(residual.state_dict())
    residual.load_state_dict({**residual.state_dict(), **plain.state_dict()})
    h, g = torch.randn(2, 3, 1, DIM), torch.randn(2, 1, 4, 5)
    expected = plain.joint_network(h, g) + residual.joint_network.acoustic_output(h)
    torch.testing.assert_close(residual.joint_network(h, g), expected)


# --- checkpoints ---


class ModelCheckpoint(CheckpointContract):
    def run(self, model):
        data = batch()
        with torch.no_grad():
            return model.eval()(*data)[0]


class TestRNNTCheckpoint(ModelCheckpoint):
    def make(self):
        return rnnt(acoustic_residual=True, ctc_weight=0.3)


class TestPlainRNNTCheckpoint(ModelCheckpoint):
    def make(self):
        return rnnt()


class TestStatelessCheckpoint(ModelCheckpoint):
    def make(self):
        return factorized(predictor="stateless", model_conf={"ctc_weight": 0.3, "ilm_weight": 0.1})


class TestFactorizedCheckpoint(ModelCheckpoint):
    def make(self):
        return factorized(predictor="lstm", blank_norm="softmax")


class TestLLMCheckpoint(ModelCheckpoint):
    @pytest.fixture(autouse=True)
    def directories(self, llm, other_llm):
        self.llm, self.other = llm, other_llm

    def make(self):
        return factorized(predictor="llm", predictor_conf={"llm": self.llm})

    def frozen_tensors(self, model):
        return list(model.decoder.predictor.llm.model().state_dict().values())

    def make_with_other_llm(self):
        return factorized(predictor="llm", predictor_conf={"llm": self.other})


def test_missing_buffers_are_an_error_too():
    model = rnnt()
    model.encoder.register_buffer("running_mean", torch.zeros(3))
    state = rnnt().state_dict()
    with pytest.raises(UserError, match="lacks 1 of the model's .*: encoder.running_mean"):
        model.load_state_dict(state, strict=False)


def test_weak_checkpoint_in_an_llm_model(llm):
    model = factorized(predictor="llm", predictor_conf={"llm": llm})
    with pytest.raises(UserError, match=r"lacks 1 .* decoder.predictor.identity.fingerprint"):
        model.load_state_dict(factorized().state_dict(), strict=False)


def test_checkpoint_of_another_token_list():
    bigger = factorized(tokens=[*TOKENS[:-1], "e", "<sos/eos>"])
    with pytest.raises(
        UserError,
        match=r"decoder.acoustic_output.weight \(checkpoint \(8, 4\), model \(7, 4\)\).*7 tokens",
    ):
        factorized().load_state_dict(bigger.state_dict(), strict=False)


# --- construction ---


def test_parameters_are_in_the_state_once():
    model = factorized(predictor="lstm", model_conf={"ctc_weight": 0.1})
    assert model.joint_network.decoder is model.decoder
    assert not [name for name in model.state_dict() if name.startswith("joint_network")]


@pytest.mark.parametrize(
    "tokens, message",
    [
        (["<unk>", *TOKENS[2:-1], "<blank>", "<sos/eos>"], "begins with '<unk>'"),
        ([*TOKENS[:-1], "e"], "ends with 'e'"),
        (TOKENS[:-1], "has 6 tokens, but the model was built for 7"),
    ],
)
def test_wrong_token_lists(tokens, message):
    made = {**parts(), "decoder": decoder(), "joint_network": None, "token_list": tokens}
    with pytest.raises(UserError, match=message):
        FactorizedTransducerModel(**made)


def test_token_list_of_another_llm(tmp_path):
    directory = save_llm(tmp_path, tokens=[*TOKENS[:2], "A", *TOKENS[3:]])
    with pytest.raises(UserError, match=f"{tmp_path}.*token 2 is 'A' against 'a'"):
        factorized(predictor="llm", predictor_conf={"llm": directory})


def test_unknown_and_wrong_model_options(llm):
    common = "max_labels_per_frame, mwer_weight, mwer_conf"
    valid = f"valid options: ctc_weight, {common}, acoustic_residual$"
    with pytest.raises(UserError, match=f"model_conf of 'transducer': .* 'lsm_weight'; {valid}"):
        rnnt(lsm_weight=0.1)
    valid = f"valid options: ctc_weight, ilm_weight, {common}$"
    with pytest.raises(UserError, match=f"of 'factorized_transducer': .* 'ilm'; {valid}"):
        factorized(model_conf={"ilm": 0.1})
    for conf, message in (
        ({"ctc_weight": -0.1}, "ctc_weight must not be negative, got -0.1"),
        ({"max_labels_per_frame": 0}, "max_labels_per_frame must be positive, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            rnnt(**conf)
    with pytest.raises(UserError, match="ilm_weight must not be negative"):
        factorized(model_conf={"ilm_weight": -1.0})
    with pytest.raises(UserError, match="predictor .llm. is frozen; set ilm_weight: 0"):
        factorized(predictor="llm", predictor_conf={"llm": llm}, model_conf={"ilm_weight": 0.1})


def test_wrong_decoders():
    made = {**parts(), "joint_network": None}
    rnn = RNNDecoder(VOCAB, DIM)
    with pytest.raises(UserError, match="needs ESPnet's decoder 'transducer'.*got RNNDecoder"):
        TransducerModel(**made, decoder=rnn)
    with pytest.raises(UserError, match="needs decoder 'factorized_transducer', got RNNDecoder"):
        FactorizedTransducerModel(**made, decoder=rnn)


def test_collecting_statistics_does_not_load_the_llm(llm):
    model = factorized(predictor="llm", predictor_conf={"llm": llm})
    feats = model.collect_feats(*batch())
    assert feats["feats"].shape == (3, 6, 3)
    assert not model.decoder.predictor.llm.is_loaded
    model(*batch())
    assert model.decoder.predictor.llm.is_loaded
