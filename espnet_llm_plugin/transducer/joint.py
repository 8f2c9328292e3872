"""From acoustic logits, LM log-probabilities and blank logits to the transducer's posterior.

B utterances, T frames, U labels, N prefixes, L labels, V = L + 2 tokens, D encoder width,
J joiner width. ``...`` are any broadcastable leading dimensions.
"""

from typing import Union

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.dense_loss import dense_rnnt_loss


def posterior(
    acoustic: Tensor,
    lm: Tensor,
    blank_logit: Tensor,
    alpha: Union[float, Tensor],
    blank_norm: str,
) -> tuple[Tensor, Tensor]:
    """Log-posteriors of blank and labels.

    ``sigmoid`` (HAT): ``P(blank) = sigmoid(z)``, ``P(v) = (1 - P(blank)) softmax_v(a + alpha l)``.
    ``softmax`` (FNT): one softmax over ``[z, a + alpha l]``.

    Args:
        acoustic: a (..., L), unnormalised.
        lm: l (..., L), log-probabilities.
        blank_logit: z (...).
        alpha: scale of the LM; a tensor (..., 1) needs a finite l.

    Returns:
        log P(blank) (...), log P(label) (..., L).
    """
    # alpha = 0 must not look at l at all: 0 times a masked label's -inf is NaN
    scaled = isinstance(alpha, Tensor) or alpha
    logits = acoustic + alpha * lm if scaled else torch.broadcast_tensors(acoustic, lm)[0]
    if blank_norm == "softmax":
        both = torch.cat([blank_logit.unsqueeze(-1), logits], dim=-1).log_softmax(dim=-1)
        return both[..., 0], both[..., 1:]
    # log(1 - sigmoid(z)) is logsigmoid(-z): no cancellation, no clamp
    not_blank = logsigmoid(-blank_logit).unsqueeze(-1)
    return logsigmoid(blank_logit), not_blank + logits.log_softmax(dim=-1)


class FinalScores(Tensor):
    """Search scores that ``log_softmax`` leaves as they are.

    ESPnet's ``BeamSearchTransducer`` applies ``torch.log_softmax`` to whatever the joint network
    returns. On normalised log-probabilities that is the identity, but it would cancel everything
    that is deliberately not normalised: the LM score added outside the softmax (beta) and the
    per-label bonus. Every other operation returns an ordinary tensor.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        scores = args[0] if args else kwargs.get("input")
        if func in _LOG_SOFTMAX:
            return scores.as_subclass(Tensor)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_LOG_SOFTMAX = (torch.log_softmax, Tensor.log_softmax, torch.nn.functional.log_softmax)


class FactorizedJoint:
    """What ESPnet calls the joint network: scores of all tokens from one frame and one prefix.

    Not a module and without parameters of its own: it looks at the decoder's, so that nothing
    appears twice in a checkpoint.
    """

    def __init__(self, decoder: FactorizedTransducerDecoder):
        self.decoder = decoder

    def __call__(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Scores of one search step.

        Args:
            encoder_out: (..., D) encoder output.
            decoder_out: (..., L + J) output of the decoder's ``score`` or ``batch_score``:
                the predictor's log-probabilities and the blank predictor's output.

        Returns:
            (..., V): ``log P(blank)``; for labels ``log P(v) + beta l[v] + label_bonus``, where
            ``P`` contains alpha; minus infinity for ``<sos/eos>``, which is never emitted.
        """
        decoder = self.decoder
        decoder.at_frame(encoder_out)
        lm, predictor_part = decoder_out.split([decoder.num_labels, decoder.joint_dim], dim=-1)
        acoustic, acoustic_blank = decoder.acoustic(encoder_out)
        blank_logit = acoustic_blank + decoder.blank.join(
            decoder.blank.project(encoder_out), predictor_part
        )
        blank, labels = posterior(
            acoustic, lm, blank_logit, decoder.decoding_alpha, decoder.blank_norm
        )
        labels = labels + decoder.beta * lm + decoder.label_bonus
        never = torch.full_like(blank, -torch.inf).unsqueeze(-1)
        scores = torch.cat([blank.unsqueeze(-1), labels, never], dim=-1)
        return scores.as_subclass(FinalScores)


class ResidualJoint(torch.nn.Module):
    """ESPnet's joint network plus acoustic logits: ``joint(h, g) + W h``.

    ``acoustic_output`` is laid out as ESPnet's CTC output layer, and the joint network's own
    output starts at zero: with a trained CTC output layer copied into it, the RNN-T begins at
    exactly the CTC model's posteriors. Parameter names are those of ESPnet's joint network.
    """

    def __init__(self, joint_network: torch.nn.Module, encoder_dim: int):
        super().__init__()
        self.lin_enc = joint_network.lin_enc
        self.lin_dec = joint_network.lin_dec
        self.lin_out = joint_network.lin_out
        self.joint_activation = joint_network.joint_activation
        self.acoustic_output = torch.nn.Linear(encoder_dim, self.lin_out.out_features)
        self.espnet_initialization_fn()

    def espnet_initialization_fn(self) -> None:
        """Start at zero; ESPnet calls this after the initialisation chosen by ``init:``."""
        torch.nn.init.zeros_(self.lin_out.weight)
        torch.nn.init.zeros_(self.lin_out.bias)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Encoder output (..., D) and decoder output (..., Dd) -> logits (..., V)."""
        hidden = self.joint_activation(self.lin_enc(encoder_out) + self.lin_dec(decoder_out))
        # in place: the result is the model's largest tensor, (B,T,U+1,V)
        return self.lin_out(hidden).add_(self.acoustic_output(encoder_out))


def joint_nll(
    joint: torch.nn.Module,
    encoder_out: Tensor,
    decoder_out: Tensor,
    tokens: Tensor,
    frame_lengths: Tensor,
    token_lengths: Tensor,
    blank: int,
) -> Tensor:
    """-log P(tokens | speech) of an RNN-T, (B,) in nats, without its (B, T, U+1, V) logits.

    Args:
        joint: ESPnet's joint network or :class:`ResidualJoint`.
        encoder_out: (B, T, D).
        decoder_out: (B, U+1, Dd).
        tokens: (B, U), with any padding.
        frame_lengths: (B,).
        token_lengths: (B,).
        blank: token id of the blank.
    """
    residual = isinstance(joint, ResidualJoint)
    return dense_rnnt_loss(
        joint.lin_enc(encoder_out),
        joint.lin_dec(decoder_out),
        joint.lin_out.weight,
        joint.lin_out.bias,
        tokens,
        frame_lengths,
        token_lengths,
        blank=blank,
        activation=joint.joint_activation,
        frame_logits=joint.acoustic_output(encoder_out) if residual else None,
        reduction="none",
    )
