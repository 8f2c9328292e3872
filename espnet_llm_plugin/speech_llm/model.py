"""The speech LLM as an ESPnet model: losses, statistics, and what is left out of a batch.

B utterances, T encoder frames, E encoder width, P embeddings of the audio, U tokens, V tokens of
the token list.
"""

from typing import Any, Mapping, NamedTuple, Optional, Sequence, Union

import torch
from espnet2.asr.ctc import CTC
from espnet2.torch_utils.device_funcs import force_gatherable
from torch import Tensor

from espnet_llm_plugin.encoder.short import ShortUtterances
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.model_parts import (
    NO_WEIGHT,
    TASK_ARGUMENTS,
    SkipLog,
    builds_training_parts,
    refuse_incomplete,
    zero_loss,
)
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.decoder import Audio, SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.heads.abs_head import LabelHead
from espnet_llm_plugin.speech_llm.heads.auxiliary import AuxiliaryHeads, Tap, loss_stats, report
from espnet_llm_plugin.speech_llm.heads.ctc import VocabularyCTC
from espnet_llm_plugin.speech_llm.heads.error_rates import GreedyErrorRates
from espnet_llm_plugin.speech_llm.heads.vocabulary import LabelVocabulary, label_vocabulary
from espnet_llm_plugin.speech_llm.languages import train_only
from espnet_llm_plugin.speech_llm.masking import mask_text
from espnet_llm_plugin.speech_llm.prefix import PrefixInterface
from espnet_llm_plugin.speech_llm.text_loss import TextLoss, text_loss


class Batch(NamedTuple):
    """The utterances of a batch that are trained on, trimmed to their longest."""

    encoder_out: Tensor  # (B, T, E)
    frame_lengths: Tensor  # (B,)
    audio: Audio  # of the adapter
    text: Tensor  # (B, U) token ids, padded with EOS
    text_lengths: Tensor  # (B,)
    languages: Optional[Tensor] = None  # (B,) numbers
    names: Optional[list[str]] = None  # of the utterances

    def select(self, rows: Tensor) -> "Batch":
        """The utterances at ``rows`` (K,), in that order."""
        text_lengths = self.text_lengths[rows]
        frames = self.frame_lengths[rows]
        return Batch(
            self.encoder_out[rows, : int(frames.max())],
            frames,
            self.audio.select(rows),
            self.text[rows, : int(text_lengths.max())],
            text_lengths,
            None if self.languages is None else self.languages[rows],
            None if self.names is None else [self.names[row] for row in rows.tolist()],
        )


class SpeechLLMModel(ShortUtterances):
    """Encoder, adapter and LLM trained with the cross-entropy of the text and auxiliary losses.

    [Prompting Large Language Models with Speech Recognition Abilities, arXiv 2307.11795; LLMs and
    Speech: Integration vs. Combination, arXiv 2603.15045; Speech Prefix-Tuning with RNNT Loss,
    arXiv 2406.14701]

    Args (``model_conf``):
        ctc_weight: weight of the CTC loss on the encoder's output. The layer is ESPnet's ``ctc``:
            ``--init_param`` can take it from a CTC model. With 0 there is none, or, if the adapter
            needs it, one that stays as it was loaded.
        ctc_vocabulary: labels of that CTC; by default the decoder's tokens, or an ASR token list of
            its own: ``token_list`` and, for pieces, ``bpemodel``.
        auxiliary: further losses, CTC or transducer, on the encoder, the adapter or the LLM's
            outputs at the audio; see :mod:`~espnet_llm_plugin.speech_llm.heads.auxiliary`.
        lsm_weight: label smoothing of the cross-entropy.
        length_normalized_loss: losses per token and per label (true) or per utterance (false).
        text_mask: fraction F of the input tokens that are hidden in training.
        text_mask_token: what replaces them; by default the unknown token.
        shuffled_audio: in validation, score each transcript with another utterance's audio too.
        report_wer_utts: in validation, so many utterances are decoded greedily. A hash of their
            names chooses them, not their length; they are the same in every epoch.
        language_weight: weight of the cross-entropy of the predicted language, of a decoder with
            ``language_prediction`` (default: 0.1).
        train_languages: codes; the soft prompts of these languages (and their rows of the language
            prediction) are trained alone, all else stays bit by bit as it was loaded.
        extract_feats_in_collect_stats: as in ESPnet.

    Statistics: ``loss`` = ``loss_ce`` + ctc_weight * ``loss_ctc`` + the weighted ``loss_<name>`` of
    the auxiliary losses; ``ce_per_token`` (nats, no smoothing), ``acc`` (of tokens, given the ones
    before), ``num_skipped``; of each CTC and auxiliary loss ``<name>_per_label`` (nats) and
    ``num_<name>_skipped`` (utterances with more labels than CTC has frames, left out of that loss
    only); with soft prompts of languages ``num_no_language``, and if it is predicted
    ``loss_language`` (nats per utterance) and ``acc_language``, of those that have one; and in
    validation ``shuffled_gap``: nats per token by which another utterance's audio is worse than its
    own. Near 0 the LLM ignores the audio, however low the loss; above 2 it relies on it. With
    ``report_wer_utts`` ``wer_llm`` and ``cer_llm``, greedily and without any CTC, and the same of
    each CTC and auxiliary loss: ``wer_<name>``, ``cer_<name>``; their means over a validation are
    the error rates of the chosen utterances together, those of single batches mean nothing.
    """

    def __init__(
        self,
        vocab_size: int,
        token_list: Sequence[str],
        decoder: torch.nn.Module,
        ctc: CTC,
        joint_network: None = None,
        ctc_weight: float = 0.0,
        ctc_vocabulary: Optional[Mapping[str, Any]] = None,
        auxiliary: Optional[Sequence[Mapping[str, Any]]] = None,
        lsm_weight: float = 0.0,
        length_normalized_loss: bool = True,
        text_mask: float = 0.0,
        text_mask_token: Optional[str] = None,
        shuffled_audio: bool = True,
        report_wer_utts: int = 0,
        language_weight: Optional[float] = None,
        train_languages: Optional[Sequence[str]] = None,
        extract_feats_in_collect_stats: bool = True,
        **parts: Any,
    ):
        unknown = {key: value for key, value in parts.items() if key not in TASK_ARGUMENTS}
        refuse_unknown(
            "model_conf of 'speech_llm'", unknown, SpeechLLMModel.__init__, TASK_ARGUMENTS
        )
        if not isinstance(decoder, SpeechLLMDecoder):
            raise UserError(
                f"model 'speech_llm' needs decoder 'speech_llm', got {type(decoder).__name__}"
            )
        for name, value, upper in (
            ("ctc_weight", ctc_weight, None),
            ("lsm_weight", lsm_weight, 1.0),
            ("language_weight", language_weight or 0.0, None),
            ("text_mask", text_mask, 1.0),
            ("report_wer_utts", report_wer_utts, None),
        ):
            if value < 0 or (upper is not None and value >= upper):
                allowed = "0 or more" if upper is None else f"in [0, {upper:g})"
                raise UserError(f"model_conf: {name} must be {allowed}, got {value}")
        if text_mask_token is not None and not text_mask:
            raise UserError("model_conf: text_mask_token is given, but text_mask is 0")
        units = decoder.units
        units.check_token_list(token_list)
        encoder_width = ctc.ctc_lo.in_features
        with_ctc = ctc_weight > 0 or decoder.adapter.needs_ctc
        if with_ctc:
            vocabulary = label_vocabulary("model_conf: ctc_vocabulary", ctc_vocabulary, units)
            ctc = _vocabulary_ctc(ctc, vocabulary)
        elif ctc_vocabulary is not None:
            raise UserError("model_conf: ctc_vocabulary is of a CTC, but ctc_weight is 0")
        super().__init__(
            vocab_size=vocab_size,
            token_list=list(token_list),
            decoder=decoder,
            ctc=ctc,
            joint_network=None,
            # ESPnet would drop the decoder at ctc_weight 1, and drops the CTC at 0
            ctc_weight=0.5 if with_ctc else 0.0,
            report_cer=False,
            report_wer=False,
            extract_feats_in_collect_stats=extract_feats_in_collect_stats,
            **parts,
        )
        del self.criterion_att  # ours is text_loss
        self.blank_id = 0
        self.sos, self.eos = decoder.prompt.sos, units.eos
        self.ctc_weight = ctc_weight
        self.lsm_weight = lsm_weight
        self.length_normalized_loss = length_normalized_loss
        self.text_mask = text_mask
        self.mask_token = units.mask_token(text_mask_token) if text_mask else None
        self.shuffled_audio = shuffled_audio
        if decoder.language_head is None and language_weight is not None:
            raise UserError(
                "model_conf: language_weight is given, but decoder_conf has no language_prediction"
            )
        self.language_weight = 0.1 if language_weight is None else language_weight
        if with_ctc:
            decoder.use_ctc(self.ctc)
            self.ctc.requires_grad_(ctc_weight > 0)
        widths = {"encoder": encoder_width, "adapter": decoder.llm.hidden_size}
        if isinstance(decoder.interface, PrefixInterface):
            widths["llm_prefix"] = decoder.llm.hidden_size
        self.auxiliary = AuxiliaryHeads(
            auxiliary if builds_training_parts() else None, units, widths
        )
        self._error_rates = GreedyErrorRates(report_wer_utts)
        self.train_languages = train_languages
        if train_languages is not None:
            train_only(self, train_languages, decoder.soft_prompt, decoder.language_head)
        self._skips = SkipLog()
        self._last_audio: Optional[Audio] = None

    def train(self, mode: bool = True) -> "SpeechLLMModel":
        super().train(mode)
        if mode and self.train_languages is not None:
            for part in self.children():  # no dropout, and no running means that move
                part.eval()
            self.decoder.llm.train()  # which gradient checkpointing needs
        return self

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, statistics and weight of a batch, as ESPnet's trainer wants them.

        Utterances without an encoder frame, and those that with prompt and text do not fit the
        LLM's context, are left out, counted (``num_skipped``) and logged once each. The weight is
        the number of what the loss is normalised by, tokens or utterances, so that means over
        batches and processes are those of all of them; a batch of which nothing is left has a loss
        of zero and next to no weight.

        Args:
            speech: (B, samples, ...).
            speech_lengths: (B,).
            text: (B, U) token ids; what is beyond ``text_lengths`` does not matter.
            text_lengths: (B,).
            kwargs: ``utt_id``, the utterances' names; ``lang`` (B, n) and ``lang_lengths`` (B,),
                see :mod:`~espnet_llm_plugin.data.language_codes`.
        """
        languages = self.decoder.soft_prompt.languages_of(kwargs)
        encoder_out, frame_lengths = self.encode_frames(speech, speech_lengths)
        batch, skipped = self._usable(
            encoder_out, frame_lengths, text, text_lengths, kwargs.get("utt_id"), languages
        )
        if batch is None:
            loss = encoder_out.sum() * 0.0 + zero_loss(self)
            # the same statistics in the same order: distributed training sums them over processes
            stats = {**dict.fromkeys(self._stat_names(), 0.0), "num_skipped": skipped}
            return force_gatherable((loss, stats, NO_WEIGHT), loss.device)

        ce, audio_outputs = self._text_loss(batch, batch.audio)
        loss = ce.reduced(self.length_normalized_loss)
        taps = {
            "encoder": Tap(batch.encoder_out, batch.frame_lengths),
            "adapter": Tap(batch.audio.embeddings, batch.audio.lengths),
            "llm_prefix": Tap(audio_outputs, batch.audio.lengths),
        }
        stats = {
            "loss_ce": loss.detach(),
            "ce_per_token": ce.per_token().detach(),
            "acc": ce.accuracy(),
            "num_skipped": skipped,
        }
        if self.ctc_weight:
            ctc = self.ctc.loss(*taps["encoder"], batch.text, batch.text_lengths)
            mean = report("ctc", ctc, self.length_normalized_loss, stats)
            loss = loss + self.ctc_weight * mean
        loss = loss + self.auxiliary.loss(
            taps, batch.text, batch.text_lengths, self.length_normalized_loss, stats
        )
        if languages is not None:
            stats["num_no_language"] = float(self.decoder.soft_prompt.num_unknown(languages))
            loss = loss + self._language_loss(batch, stats)
        if self._scores_shuffled_audio():
            stats["shuffled_gap"] = self._shuffled_gap(batch, ce)
        weight = float(ce.normalizer(self.length_normalized_loss))
        if self.training:
            self._error_rates.restart()
        elif self._error_rates.utterances:
            stats |= self._error_rates(
                self.decoder,
                batch.audio,
                batch.text,
                batch.text_lengths,
                self._decoded_heads(taps),
                batch.names,
                weight,
            )
        stats["loss"] = loss.detach()
        return force_gatherable((loss, stats, weight), loss.device)

    def _stat_names(self) -> list[str]:
        names = ["loss_ce", "ce_per_token", "acc", "num_skipped"]
        names += [*(loss_stats("ctc") if self.ctc_weight else []), *self.auxiliary.stat_names()]
        if self.decoder.soft_prompt.languages is not None:
            head = self.decoder.language_head is not None
            names += ["num_no_language", *(["loss_language", "acc_language"] if head else [])]
        names += ["shuffled_gap"] if self._scores_shuffled_audio() else []
        if not self.training:
            names += self._error_rates.stat_names(list(self._decoded_heads({})))
        return [*names, "loss"]

    def _decoded_heads(self, taps: Mapping[str, Tap]) -> dict[str, tuple[LabelHead, Optional[Tap]]]:
        """What is decoded greedily beside the LLM, and where it listens."""
        heads = {"ctc": (self.ctc, taps.get("encoder"))} if self.ctc_weight else {}
        for entry in self.auxiliary.entries:
            heads[entry.name] = (self.auxiliary.head(entry), taps.get(entry.tap))
        return heads

    def _language_loss(self, batch: Batch, stats: dict[str, Any]) -> Union[Tensor, float]:
        """What the prediction of the language adds to the loss."""
        if self.decoder.language_head is None:
            return 0.0
        loss, accuracy = self.decoder.language_head.loss(
            batch.encoder_out, batch.frame_lengths, batch.languages
        )
        stats["loss_language"], stats["acc_language"] = loss.detach(), accuracy.detach()
        return self.language_weight * loss

    def _text_loss(self, batch: Batch, audio: Audio) -> tuple[TextLoss, Optional[Tensor]]:
        """Cross-entropy of text and EOS given ``audio``; the LLM's outputs at the audio."""
        tokens = torch.nn.functional.pad(batch.text, (1, 0), value=self.sos)
        lengths = batch.text_lengths + 1
        # the padding of the text is EOS already: one more column is that of the longest
        targets = torch.nn.functional.pad(batch.text, (0, 1), value=self.eos)
        if self.training and self.text_mask:
            tokens = mask_text(tokens, lengths, self.text_mask, self.mask_token)
        logits, audio_outputs = self.decoder.text_logits(audio, tokens, lengths)
        begin, end = self.decoder.units.scored_range
        loss = text_loss(logits[..., begin:end], targets - begin, lengths, self.lsm_weight)
        return loss, audio_outputs

    def _scores_shuffled_audio(self) -> bool:
        return self.shuffled_audio and not self.training

    @torch.no_grad()
    def _shuffled_gap(self, batch: Batch, own: TextLoss) -> Tensor:
        """Cross-entropy per token with the next utterance's audio, minus that with its own.

        A batch of one utterance takes the audio of the batch before; the first one has NaN, which
        ESPnet leaves out of its means.
        """
        other = self._last_audio
        if len(batch.text) > 1:
            other = batch.audio.select(torch.arange(len(batch.text)).roll(1))
        self._last_audio = batch.audio.select(torch.tensor([0]))
        if other is None:
            return own.nll.new_tensor(float("nan"))
        other = other.shorten(int(self.decoder.room(batch.text_lengths).min()))
        other = other._replace(soft=batch.audio.soft)
        return self._text_loss(batch, other)[0].per_token() - own.per_token()

    def _usable(
        self,
        encoder_out: Tensor,
        frame_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        utt_ids: Optional[Sequence[str]],
        languages: Optional[Tensor] = None,
    ) -> tuple[Optional[Batch], float]:
        """What can be trained on, and how many utterances cannot."""
        device = encoder_out.device
        frame_lengths, text_lengths = frame_lengths.to(device), text_lengths.to(device)
        audio = self.decoder.adapt(encoder_out, frame_lengths, languages)
        usable = (frame_lengths > 0) & (audio.lengths <= self.decoder.room(text_lengths))
        for i in (~usable).nonzero()[:, 0].tolist():
            name = utt_ids[i] if utt_ids is not None else "(unnamed utterance)"
            if int(frame_lengths[i]) == 0:
                why = "the encoder makes no frame of it; its audio is empty or too short"
            else:
                takes = self.decoder.interface.audio_takes_positions
                what = f"audio ({int(audio.lengths[i])} embeddings), " if takes else ""
                remedy = "stack more frames (adapter_conf), or " if takes else ""
                why = (
                    f"{what}prompt ({self.decoder.prompt_length} tokens) and text "
                    f"({int(text_lengths[i])}) exceed the {self.decoder.context} tokens that the "
                    f"LLM can see; {remedy}train on shorter utterances"
                )
            self._skips.warn(name, why)
        skipped = float((~usable).sum())
        rows = usable.nonzero()[:, 0]
        if len(rows) == 0:
            return None, skipped
        text = text.to(device)[:, : int(text_lengths.max())]
        inside = torch.arange(text.shape[1], device=device) < text_lengths[:, None]
        text = text.masked_fill(~inside, self.eos)
        names = None if utt_ids is None else list(utt_ids)
        whole = Batch(encoder_out, frame_lengths, audio, text, text_lengths, languages, names)
        batch = whole.select(rows)
        self._check_text(batch.text)
        return batch, skipped

    def _check_text(self, text: Tensor) -> None:
        wrong = ~self.decoder.scored[text.clamp(0, self.vocab_size - 1)]
        wrong |= (text < 0) | (text >= self.vocab_size)
        if wrong.any():
            raise UserError(
                f"a transcript contains token {int(text[wrong][0])}, which is no text of LLM "
                f"{self.decoder.units.llm}; was it tokenised for another LLM or token list?"
            )

    @torch.no_grad()
    def utterance_nll(
        self,
        speech: Tensor,
        speech_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        **language: Tensor,
    ) -> Tensor:
        """Exact -log P(text and EOS | speech) of each utterance (B,), in nats.

        ``language`` may have ``lang`` and ``lang_lengths``, see :meth:`forward`.

        Raises:
            UserError: An utterance cannot be scored, see :meth:`forward`.
        """
        encoder_out, frame_lengths = self.encode_frames(speech, speech_lengths)
        languages = self.decoder.soft_prompt.languages_of(language) if language else None
        batch, skipped = self._usable(
            encoder_out, frame_lengths, text, text_lengths, None, languages
        )
        if batch is None or skipped:
            raise UserError(f"{int(skipped)} utterances have no score; see the warnings above")
        return self._text_loss(batch, batch.audio)[0].nll

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any):
        """Load a checkpoint, refusing an incomplete or foreign one even if ``strict`` is False.

        Raises:
            UserError: tensors are missing or have another shape, or the checkpoint was trained
                with another LLM or prompt.
        """
        hint = "Are token list, vocabularies, adapter and LLM those of the checkpoint?"
        heads = self.auxiliary.state_dict(prefix="auxiliary.")
        if not strict and not heads.keys() & state_dict.keys():
            state_dict = {**heads, **state_dict}  # for decoding, which needs none of them
        refuse_incomplete(self, state_dict, hint)
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


def _vocabulary_ctc(ctc: CTC, vocabulary: LabelVocabulary) -> VocabularyCTC:
    """A CTC layer over ``vocabulary`` in place of the one that ESPnet made over the token list."""
    if ctc.ctc_type != "builtin":
        raise UserError(
            f"ctc_conf: ctc_type {ctc.ctc_type}; model 'speech_llm' has builtin CTC only"
        )
    return VocabularyCTC(vocabulary, ctc.ctc_lo.in_features, ctc.dropout_rate)
