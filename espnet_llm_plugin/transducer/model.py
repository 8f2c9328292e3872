"""ESPnet models ``transducer`` (RNN-T baseline) and ``factorized_transducer``.

B utterances, T frames, U labels, V tokens, L = V - 2 labels of the factorized transducer.
"""

from typing import Any, Optional, Sequence

import torch
from espnet2.asr.decoder.transducer_decoder import TransducerDecoder
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.base_model import AbsTransducerModel, Lattice
from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.joint import FactorizedJoint, ResidualJoint, joint_nll
from espnet_llm_plugin.transducer.loss import factorized_rnnt_loss
from espnet_llm_plugin.transducer.nbest_scores import (
    NBest,
    SequenceScores,
    factorized_scores,
    rnnt_scores,
)


class TransducerModel(AbsTransducerModel):
    """RNN-T with ESPnet's ``transducer`` decoder and joint network and an exact low-memory loss.

    Args (``model_conf``):
        ctc_weight: weight of an auxiliary CTC loss on the encoder.
        max_labels_per_frame: utterances with more labels per encoder frame are skipped.
        mwer_weight: weight of the MWER loss, with N-best lists from the beam search; 0: none.
        mwer_conf: its options, those of :class:`~espnet_llm_plugin.transducer.mwer.MWERConf`.
        acoustic_residual: add acoustic logits ``joint_network.acoustic_output`` to the joint
            network, whose own output then starts at zero; copying a CTC model's output layer
            there makes training start at the CTC model's posteriors.

    Statistics: ``loss`` = ``loss_transducer`` + ctc_weight * ``loss_ctc`` (nats per utterance),
    ``nll_per_label`` (nats per label), ``num_skipped`` (utterances).
    """

    def __init__(
        self,
        vocab_size: int,
        token_list: Sequence[str],
        decoder: torch.nn.Module,
        joint_network: Optional[torch.nn.Module],
        ctc_weight: float = 0.0,
        max_labels_per_frame: float = 1.0,
        mwer_weight: float = 0.0,
        mwer_conf: Optional[dict] = None,
        acoustic_residual: bool = False,
        **parts: Any,
    ):
        if not isinstance(decoder, TransducerDecoder) or joint_network is None:
            raise UserError(
                "model 'transducer' needs ESPnet's decoder 'transducer' (and joint_net_conf), "
                f"got {type(decoder).__name__}"
            )
        super().__init__(
            "transducer",
            vocab_size,
            token_list,
            {"decoder": decoder, **parts},
            ctc_weight=ctc_weight,
            max_labels_per_frame=max_labels_per_frame,
            mwer_weight=mwer_weight,
            mwer_conf=mwer_conf,
        )
        if acoustic_residual:
            joint_network = ResidualJoint(joint_network, joint_network.lin_enc.in_features)
        self.joint_network = joint_network

    def lattice_nll(self, batch: Lattice) -> tuple[Tensor, dict[str, Tensor]]:
        """-log P(text | speech) (B,)."""
        self.decoder.set_device(batch.encoder_out.device)
        history = torch.nn.functional.pad(batch.text, (1, 0), value=self.blank_id)
        nll = joint_nll(
            self.joint_network,
            batch.encoder_out,
            self.decoder(history),
            batch.text,
            batch.frame_lengths,
            batch.text_lengths,
            self.blank_id,
        )
        return nll, {}

    def nbest_scores(self, batch: Lattice, nbest: NBest) -> SequenceScores:
        """See the base class."""
        return rnnt_scores(self, batch, nbest)


class FactorizedTransducerModel(AbsTransducerModel):
    """Factorized transducer, trained with the exact low-memory loss.

    Args (``model_conf``):
        ctc_weight: weight of an auxiliary CTC loss on the encoder.
        ilm_weight: weight of the predictor's cross-entropy on the transcripts, -log P_ilm
            [MHAT uses 0.1]; needs a trainable predictor.
        max_labels_per_frame: utterances with more labels per encoder frame are skipped.
        mwer_weight: weight of the MWER loss, with N-best lists from the beam search; 0: none.
        mwer_conf: its options, those of :class:`~espnet_llm_plugin.transducer.mwer.MWERConf`.

    Statistics: ``loss`` = ``loss_transducer`` + ilm_weight * ``loss_ilm`` + ctc_weight *
    ``loss_ctc`` (nats per utterance), ``nll_per_label`` (nats per label), ``num_skipped``.
    """

    def __init__(
        self,
        vocab_size: int,
        token_list: Sequence[str],
        decoder: torch.nn.Module,
        joint_network: Optional[torch.nn.Module] = None,
        ctc_weight: float = 0.0,
        ilm_weight: float = 0.0,
        max_labels_per_frame: float = 1.0,
        mwer_weight: float = 0.0,
        mwer_conf: Optional[dict] = None,
        **parts: Any,
    ):
        if not isinstance(decoder, FactorizedTransducerDecoder):
            raise UserError(
                "model 'factorized_transducer' needs decoder 'factorized_transducer', got "
                f"{type(decoder).__name__}"
            )
        super().__init__(
            "factorized_transducer",
            vocab_size,
            token_list,
            {"decoder": decoder, **parts},
            ctc_weight=ctc_weight,
            max_labels_per_frame=max_labels_per_frame,
            mwer_weight=mwer_weight,
            mwer_conf=mwer_conf,
        )
        decoder.predictor.check_token_list(token_list)
        if ilm_weight < 0:
            raise UserError(f"model_conf: ilm_weight must not be negative, got {ilm_weight}")
        if ilm_weight and not any(True for _ in decoder.predictor.parameters()):
            raise UserError(
                f"model_conf: ilm_weight={ilm_weight} trains the predictor, but this predictor "
                "(llm) is frozen; set ilm_weight: 0"
            )
        self.ilm_weight = ilm_weight
        if ilm_weight:
            self.further_losses.append("ilm")

    @property
    def joint_network(self) -> FactorizedJoint:
        """The scores of one search step, for ESPnet's ``BeamSearchTransducer``."""
        return FactorizedJoint(self.decoder)

    def lattice_nll(self, batch: Lattice) -> tuple[Tensor, dict[str, Tensor]]:
        """-log P(text | speech) (B,); also the predictor's -log P(text) if it is trained."""
        self._check_text(batch.text)
        labels = batch.text - 1
        frames = batch.encoder_out.shape[1]
        shape = (len(labels), frames, self.vocab_size)
        self._report_size("acoustic logits B x T x V =", shape, 4)
        factors = self.decoder(batch.encoder_out, batch.frame_lengths, labels, batch.text_lengths)
        nll = factorized_rnnt_loss(
            factors.acoustic_logits,
            factors.lm_log_probs,
            factors.blank_logits,
            labels,
            batch.frame_lengths,
            batch.text_lengths,
            lm_scale=self.decoder.lm_scale,
            blank_norm=self.decoder.blank_norm,
            reduction="none",
        )
        if not self.ilm_weight:
            return nll, {}
        log_probs = factors.lm_log_probs[:, :-1].gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        inside = torch.arange(labels.shape[1], device=labels.device) < batch.text_lengths[:, None]
        return nll, {"ilm": -log_probs.masked_fill(~inside, 0.0).sum(dim=1)}

    def nbest_scores(self, batch: Lattice, nbest: NBest) -> SequenceScores:
        """See the base class; the hypotheses have the scores of decoding."""
        self._check_text(batch.text)
        scores = factorized_scores(self.decoder, batch, nbest)
        return scores if self.ilm_weight else scores._replace(further={})

    def _check_text(self, text: Tensor) -> None:
        if ((text < 1) | (text > self.decoder.num_labels)).any():
            raise UserError(
                "a transcript contains <blank> or <sos/eos> as a token; token ids must be in "
                f"1..{self.decoder.num_labels}"
            )
