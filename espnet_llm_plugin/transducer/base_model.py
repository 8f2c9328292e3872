"""What the RNN-T and the factorized transducer have in common as ESPnet models.

B utterances, T frames, U labels, D encoder width, V tokens (``<blank>`` 0, ``<sos/eos>`` V - 1).
"""

import logging
import math
from abc import abstractmethod
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from espnet2.torch_utils.device_funcs import force_gatherable
from torch import Tensor

from espnet_llm_plugin.encoder.latency import log_latency
from espnet_llm_plugin.encoder.short import ShortUtterances
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.model_parts import (
    NO_WEIGHT,
    TASK_ARGUMENTS,
    SkipLog,
    refuse_incomplete,
    zero_loss,
)
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.token_list import BLANK, SOS_EOS
from espnet_llm_plugin.transducer.mwer import MWER
from espnet_llm_plugin.transducer.nbest_scores import NBest, SequenceScores


class Lattice(NamedTuple):
    """The utterances of a batch that are trained on, trimmed to their longest."""

    encoder_out: Tensor  # (B, T, D)
    frame_lengths: Tensor  # (B,)
    text: Tensor  # (B, U) token ids, padded with 1
    text_lengths: Tensor  # (B,)


class AbsTransducerModel(ShortUtterances):
    """An ESPnet model with transducer, auxiliary CTC and MWER losses and checks of its inputs.

    Subclasses implement :meth:`lattice_nll` and :meth:`nbest_scores`. ``parts`` are the modules
    that ESPnet's ``ASRTask.build_model`` passes, and any misspelt options.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        token_list: Sequence[str],
        parts: Mapping[str, Any],
        *,
        ctc_weight: float,
        max_labels_per_frame: float,
        mwer_weight: float,
        mwer_conf: Optional[Mapping[str, Any]],
    ):
        unknown = {key: value for key, value in parts.items() if key not in TASK_ARGUMENTS}
        refuse_unknown(f"model_conf of {name!r}", unknown, type(self).__init__, TASK_ARGUMENTS)
        check_layout(token_list, vocab_size)
        if ctc_weight < 0:
            raise UserError(f"model_conf: ctc_weight must not be negative, got {ctc_weight}")
        if max_labels_per_frame <= 0:
            raise UserError(
                f"model_conf: max_labels_per_frame must be positive, got {max_labels_per_frame}"
            )
        if mwer_weight < 0:
            raise UserError(f"model_conf: mwer_weight must not be negative, got {mwer_weight}")
        mwer = MWER(mwer_conf, token_list, max_labels_per_frame)
        super().__init__(
            vocab_size=vocab_size,
            token_list=list(token_list),
            # ESPnet would import warprnnt_pytorch, which cannot be installed today, if it saw a
            # joint network; and would drop the decoder at ctc_weight 1.
            joint_network=None,
            ctc_weight=0.5 if ctc_weight else 0.0,
            report_cer=False,
            report_wer=False,
            **parts,
        )
        log_latency(self.frontend, self.encoder)
        del self.criterion_att  # of the attention model that the base class believes this to be
        self.use_transducer_decoder = True
        self.ctc_weight = ctc_weight
        self.max_labels_per_frame = max_labels_per_frame
        self.mwer_weight = mwer_weight
        self.mwer = mwer
        self.further_losses = ["ctc"] if ctc_weight else []
        self._skips = SkipLog()
        self._reported_size = False

    @abstractmethod
    def lattice_nll(self, batch: Lattice) -> tuple[Tensor, dict[str, Tensor]]:
        """-log P(text | speech) of each utterance (B,), in nats, and further losses by name.

        A further loss (B,) is named in ``further_losses``, weighted by the attribute
        ``<name>_weight`` and reported as ``loss_<name>``.
        """

    @abstractmethod
    def nbest_scores(self, batch: Lattice, nbest: NBest) -> SequenceScores:
        """The transcripts' losses, as those of :meth:`lattice_nll`, and the hypotheses' scores."""

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, statistics and weight of a batch, as ESPnet's trainer wants them.

        Utterances whose labels outnumber ``max_labels_per_frame`` times their encoder frames are
        left out, counted (``num_skipped``) and logged once each. The weight is the number of
        those left; a batch of which nothing is left has a loss of zero and next to no weight, and
        so appears in no mean that ESPnet reports (not even in that of ``num_skipped``).

        With ``mwer_weight`` the loss of training has the transducer loss times ``rnnt_weight`` of
        ``mwer_conf``, and the MWER loss. Validation's is the same with and without.

        Args:
            speech: (B, samples, ...).
            speech_lengths: (B,).
            text: (B, U) token ids; what is beyond ``text_lengths`` does not matter.
            text_lengths: (B,).
            kwargs: ``utt_id``, the utterances' names.
        """
        encoder_out, frame_lengths = self.encode_frames(speech, speech_lengths)
        keep = self._fits(frame_lengths, text_lengths, kwargs.get("utt_id"))
        kept = int(keep.sum())
        with_nbest = self.mwer_weight > 0 if self.training else self.mwer.conf.valid_stats
        skipped = float(keep.numel() - kept)
        if kept == 0:
            loss = encoder_out.sum() * 0.0 + zero_loss(self)
            # the same statistics in the same order: distributed training sums them over processes
            names = ["loss_transducer", "nll_per_label", "num_skipped"]
            names += ["loss_mwer", *MWER.STATS] if with_nbest else []
            names += [f"loss_{name}" for name in self.further_losses]
            stats = dict.fromkeys([*names, "loss"], 0.0) | {"num_skipped": skipped}
            return force_gatherable((loss, stats, NO_WEIGHT), loss.device)

        batch = trim(encoder_out, frame_lengths, text, text_lengths, keep)
        if with_nbest:
            names = kwargs.get("utt_id")
            if names is not None:
                names = [name for name, kept_one in zip(names, keep.tolist()) if kept_one]
            nbest = self.mwer.hypotheses(self, batch, names)
            scores = self.nbest_scores(batch, nbest)
            nll, further = scores.nll, scores.further
            mwer, mwer_stats = self.mwer.loss(nbest, scores.hypotheses)
        else:
            nll, further = self.lattice_nll(batch)
        loss = nll.mean()
        stats = {
            "loss_transducer": loss.detach(),
            "nll_per_label": (nll.sum() / batch.text_lengths.sum().clamp(min=1)).detach(),
            "num_skipped": skipped,
        }
        if with_nbest:
            mwer = mwer.mean()
            stats |= {"loss_mwer": mwer.detach(), **mwer_stats}
            if self.training:
                loss = self.mwer.conf.rnnt_weight * loss + self.mwer_weight * mwer
        if self.ctc_weight:
            further["ctc"] = self._ctc_nll(batch)
        for name in self.further_losses:
            mean = further[name].mean()
            stats[f"loss_{name}"] = mean.detach()
            loss = loss + getattr(self, f"{name}_weight") * mean
        stats["loss"] = loss.detach()
        return force_gatherable((loss, stats, float(kept)), loss.device)

    @torch.no_grad()
    def utterance_nll(
        self, speech: Tensor, speech_lengths: Tensor, text: Tensor, text_lengths: Tensor
    ) -> Tensor:
        """Exact -log P(text | speech) of each utterance (B,), in nats; nothing is skipped."""
        encoder_out, frame_lengths = self.encode_frames(speech, speech_lengths)
        keep = torch.ones_like(frame_lengths, dtype=torch.bool)
        return self.lattice_nll(trim(encoder_out, frame_lengths, text, text_lengths, keep))[0]

    def _ctc_nll(self, batch: Lattice) -> Tensor:
        log_probs = self.ctc.log_softmax(batch.encoder_out).float().transpose(0, 1)
        return torch.nn.functional.ctc_loss(
            log_probs,
            batch.text,
            batch.frame_lengths,
            batch.text_lengths,
            blank=self.blank_id,
            reduction="none",
            zero_infinity=True,  # repeated labels need more frames than labels
        )

    def _fits(
        self, frame_lengths: Tensor, text_lengths: Tensor, utt_ids: Optional[Sequence[str]]
    ) -> Tensor:
        """(B,) whether the lattice is wide enough for the labels; logs those that are not."""
        frame_lengths = frame_lengths.to(text_lengths.device)
        fits = (frame_lengths > 0) & (text_lengths <= self.max_labels_per_frame * frame_lengths)
        for i in (~fits).nonzero()[:, 0].tolist():
            name = utt_ids[i] if utt_ids is not None else "(unnamed utterance)"
            self._skips.warn(
                name,
                f"{int(text_lengths[i])} labels but only {int(frame_lengths[i])} encoder frames "
                f"(model_conf max_labels_per_frame: {self.max_labels_per_frame}); is its "
                "transcript right?",
            )
        return fits

    def _report_size(self, what: str, shape: Sequence[int], bytes_per_value: int) -> None:
        """Log once, before it is built, how large the largest tensor of the loss is."""
        if self.training and not self._reported_size:
            self._reported_size = True
            gib = math.prod(shape) * bytes_per_value / 2**30
            logging.info(
                f"first batch: {what} {' x '.join(map(str, shape))}, {gib:.3g} GiB in float32 "
                "(several times that with gradients); lower batch_bins if this does not fit"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any):
        """Load a checkpoint, refusing an incomplete or foreign one even if ``strict`` is False.

        Raises:
            UserError: tensors are missing or have another shape, or the checkpoint was trained
                with another LLM.
        """
        hint = (
            f"Are configuration and token list ({self.vocab_size} tokens) those of the checkpoint?"
        )
        refuse_incomplete(self, state_dict, hint)
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


def check_layout(token_list: Sequence[str], vocab_size: int) -> None:
    """Raise :class:`UserError` unless blank is first, sos/eos last, and the size right."""
    if len(token_list) != vocab_size:
        raise UserError(
            f"the token list has {len(token_list)} tokens, but the model was built for {vocab_size}"
        )
    if token_list[0] != BLANK or token_list[-1] != SOS_EOS:
        raise UserError(
            f"the token list must begin with {BLANK} and end with {SOS_EOS}, but begins with "
            f"{token_list[0]!r} and ends with {token_list[-1]!r}"
        )


def trim(
    encoder_out: Tensor, frame_lengths: Tensor, text: Tensor, text_lengths: Tensor, keep: Tensor
) -> Lattice:
    """Keep the chosen utterances (B,), cut padding, and make padded token ids valid."""
    device = encoder_out.device
    keep = keep.to(device).nonzero()[:, 0]
    frame_lengths = frame_lengths.to(device)[keep]
    text_lengths = text_lengths.to(device)[keep]
    text = text.to(device)[keep, : int(text_lengths.max())]
    inside = torch.arange(text.shape[1], device=device) < text_lengths[:, None]
    return Lattice(
        encoder_out=encoder_out[keep, : int(frame_lengths.max())],
        frame_lengths=frame_lengths,
        text=text.masked_fill(~inside, 1),
        text_lengths=text_lengths,
    )
