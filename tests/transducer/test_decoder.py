import pytest
import torch
from espnet2.torch_utils.initialize import initialize

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.joint import FactorizedJoint, FinalScores, posterior
from tests.transducer.tiny import DIM, LABELS, PREDICTOR_CONF, VOCAB, batch, decoder, factorized

NORMS = ("sigmoid", "softmax")


def slow_posterior(model, frame, prefix, alpha):
    """P(blank), P(labels) of one cell, straight from the definition with probabilities."""
    made = model.decoder
    tokens = made.acoustic_output(frame)
    last = torch.tensor(prefix[-1] + 1 if prefix else 0)
    hidden = torch.tanh(
        made.blank.encoder_linear(frame) + made.blank.predictor_linear(made.blank.embed(last))
    )
    z = made.blank.output(hidden)[0]
    lm = made.predictor(torch.tensor([prefix], dtype=torch.long).reshape(1, -1))[0, -1]
    weights = tokens[1:-1].exp() * lm.exp() ** alpha
    if made.blank_norm == "softmax":
        if made.acoustic_blank:
            z = z + tokens[0]
        both = torch.cat([z.exp()[None], weights])
        return both[0] / both.sum(), both[1:] / both.sum()
    odds = z.exp()
    if made.acoustic_blank:
        odds = odds * tokens[0].exp() / tokens[1:-1].exp().sum()
    blank = odds / (1 + odds)
    return blank, (1 - blank) * weights / weights.sum()


@pytest.mark.parametrize("acoustic_blank", [True, False])
@pytest.mark.parametrize("blank_norm", NORMS)
@pytest.mark.parametrize("predictor", list(PREDICTOR_CONF))
def test_joint_and_lattice_are_the_definition(predictor, blank_norm, acoustic_blank):
    model = factorized(
        predictor=predictor, blank_norm=blank_norm, acoustic_blank=acoustic_blank, lm_scale=0.7
    )
    encoder_out = torch.randn(1, 4, DIM)
    labels = torch.tensor([[2, 0, 4]])
    factors = model.decoder(encoder_out, torch.tensor([4]), labels, torch.tensor([3]))
    assert factors.acoustic_logits.shape == (1, 4, LABELS)
    assert factors.lm_log_probs.shape == (1, 4, LABELS)
    assert factors.blank_logits.shape == (1, 4, 4)
    for t in range(4):
        for u in range(4):
            blank, probs = slow_posterior(model, encoder_out[0, t], labels[0, :u].tolist(), 0.7)
            actual = posterior(
                factors.acoustic_logits[0, t],
                factors.lm_log_probs[0, u],
                factors.blank_logits[0, t, u],
                0.7,
                blank_norm,
            )
            torch.testing.assert_close(actual[0], blank.log(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(actual[1], probs.log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blank_norm", NORMS)
def test_search_scores_are_normalised_without_beta_and_bonus(blank_norm):
    made = decoder(blank_norm=blank_norm, alpha=0.3)
    scores = FactorizedJoint(made)(torch.randn(5, DIM), torch.randn(5, made.dunits))
    assert type(scores) is FinalScores and scores.shape == (5, VOCAB)
    plain = scores.as_subclass(torch.Tensor)
    assert (plain[:, -1] == -torch.inf).all()
    # the predictor's part is not log-probabilities here, but the labels' sum is normalised anyway
    torch.testing.assert_close(plain.logsumexp(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.log_softmax(-1), plain, atol=1e-5, rtol=1e-5)


def test_search_scores_have_beta_and_bonus_outside_the_softmax():
    made = decoder(alpha=0.3)
    joint = FactorizedJoint(made)
    frames, lm = torch.randn(5, DIM), torch.randn(5, LABELS).log_softmax(-1)
    outputs = torch.cat([lm, torch.randn(5, made.joint_dim)], dim=-1)
    before = joint(frames, outputs).as_subclass(torch.Tensor)
    made.beta, made.label_bonus = 0.4, 2.5
    after = joint(frames, outputs).as_subclass(torch.Tensor)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1:-1], before[:, 1:-1] + 0.4 * lm + 2.5)


def test_alpha_is_the_training_scale_unless_given():
    assert decoder(lm_scale=0.6).decoding_alpha == 0.6
    assert decoder(lm_scale=0.6, alpha=0.0).decoding_alpha == 0.0


def test_joint_broadcasts_as_espnets_does():
    """(D,) with (Dd,), (1, D) with (N, Dd), (N, D) with (N, Dd), and the training form."""
    made = decoder(beta=0.2)
    joint = FactorizedJoint(made)
    frames, outputs = torch.randn(3, DIM), torch.randn(4, made.dunits)
    full = joint(frames[None, :, None], outputs[None, None])
    assert full.shape == (1, 3, 4, VOCAB)
    for t in range(3):
        torch.testing.assert_close(joint(frames[t : t + 1], outputs), full[0, t])
        torch.testing.assert_close(joint(frames[t], outputs[1]), full[0, t, 1])
    torch.testing.assert_close(joint(frames, outputs[:3]), full[0].diagonal(dim1=0, dim2=1).T)


def test_final_scores_ignore_log_softmax_and_nothing_else():
    plain = torch.randn(2, 3)
    scores = plain.as_subclass(FinalScores)
    for same in (
        torch.log_softmax(scores, dim=-1),
        torch.log_softmax(input=scores, dim=-1),
        scores.log_softmax(-1),
        torch.nn.functional.log_softmax(scores, dim=-1),
    ):
        assert type(same) is torch.Tensor
        torch.testing.assert_close(same, plain, atol=0, rtol=0)
    for changed, expected in (
        (scores + 1, plain + 1),
        (scores[0], plain[0]),
        (torch.softmax(scores, -1), torch.softmax(plain, -1)),
        (scores.topk(2)[0], plain.topk(2)[0]),
    ):
        assert type(changed) is torch.Tensor
        torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("blank_norm", NORMS)
def test_posterior_with_extreme_logits(alpha, blank_norm):
    acoustic = torch.tensor([[100.0, -100.0, 0.0]])
    lm = torch.tensor([[-100.0, 0.0, -100.0]])
    for z in (-200.0, 200.0):
        blank, labels = posterior(acoustic, lm, torch.tensor([z]), alpha, blank_norm)
        assert torch.isfinite(blank).all() and torch.isfinite(labels).all()
        total = torch.logaddexp(blank, labels.logsumexp(-1))
        torch.testing.assert_close(total, torch.zeros(1))


def test_posterior_with_masked_labels():
    lm = torch.tensor([[-torch.inf, -0.5, -0.9]])
    blank, labels = posterior(torch.randn(1, 3), lm, torch.zeros(1), 0.0, "sigmoid")
    assert torch.isfinite(labels).all()  # alpha 0: the LM does not exist
    blank, labels = posterior(torch.randn(1, 3), lm, torch.zeros(1), 0.5, "sigmoid")
    assert labels[0, 0] == -torch.inf and torch.isfinite(labels[0, 1:]).all()


def test_blank_joiner_starts_at_zero_whatever_espnet_initialises():
    for init in (None, "chainer", "xavier_uniform"):
        made = FactorizedTransducerDecoder(VOCAB, DIM, joint_dim=5, blank_embed_dim=3)
        if init is not None:
            initialize(made, init)
        joined = made.blank.join(torch.randn(4, 5), torch.randn(4, 5))
        torch.testing.assert_close(joined, torch.zeros(4), atol=0, rtol=0)


def test_widths_are_options():
    made = decoder(joint_dim=9, blank_embed_dim=8)
    assert made.dunits == LABELS + 9
    assert made.blank.embed.weight.shape == (LABELS + 1, 8)
    assert made.blank.output.weight.shape == (1, 9)


def test_every_parameter_gets_a_gradient():
    model = factorized(predictor="lstm")
    speech, lengths, text, text_lengths = batch()
    encoder_out, lengths = model.encode(speech, lengths)
    factors = model.decoder(encoder_out, lengths, text.clamp(min=1) - 1, text_lengths)
    sum(factor.square().sum() for factor in factors).backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "conf, message",
    [
        (dict(predictor="gru"), "unknown predictor 'gru'; choose one of: stateless, lstm, llm"),
        (dict(blank_norm="tanh"), "blank_norm is 'tanh'; use one of sigmoid, softmax"),
        (dict(lm_scal=1), "decoder_conf of 'factorized_transducer': unknown option 'lm_scal'; "),
        (dict(a=1, b=2), "unknown options 'a', 'b'; valid options: predictor, predictor_conf, jo"),
        (dict(predictor_conf={"dim": 1}), "predictor_conf of 'stateless': unknown option 'dim'"),
    ],
)
def test_wrong_options(conf, message):
    with pytest.raises(UserError, match=message):
        FactorizedTransducerDecoder(VOCAB, DIM, **conf)


def test_too_few_tokens():
    with pytest.raises(UserError, match="2 tokens; a factorized transducer needs <blank>"):
        FactorizedTransducerDecoder(2, DIM)
