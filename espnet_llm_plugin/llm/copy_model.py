"""Training of a language model that copies from its context (``--model copy`` of LMTask).

A speech LLM reads its words off a speech prefix, which is a skill of copying from the context that
pretrained LLMs of usual size have and LLaMAs of a few million parameters, trained on a little text,
have not. Here they learn it from text alone: the sequence is a noisy copy of a sentence
(:mod:`.copy_noise`), sos, the sentence, eos, with the loss on what follows sos.

B: sentences, U: tokens of the longest, V: vocabulary, with ``<sos/eos>`` V-1.
"""

from dataclasses import fields
from typing import Any

import torch
from espnet2.lm.espnet_model import ESPnetLanguageModel
from espnet2.torch_utils.device_funcs import force_gatherable

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.copy_accuracy import measure_copying
from espnet_llm_plugin.llm.copy_batch import copy_score
from espnet_llm_plugin.llm.copy_noise import CopyNoise, noisy_prefix, random_pieces


class CopyLanguageModel(ESPnetLanguageModel):
    """ESPnet's language model with copying tasks in its training loss.

    The noise is drawn anew in every epoch; it depends on ``--seed`` and the epoch only, so that a
    resumed run draws the same. ``nll`` and thus perplexities are those of the text alone.

    Args:
        lm: ``causal_llm``, trained.
        vocab_size: V.
        ignore_id: Of padding.
        plain_share: Share of the batches that are text without a prefix.
        random_share: Of the batches with a prefix, the share whose text is random pieces: then
            nothing but the prefix tells what follows.
        noise: Keys of :class:`~espnet_llm_plugin.llm.copy_noise.CopyNoise`.

    Raises:
        UserError: Another or a frozen LM, or values out of range.
    """

    def __init__(
        self,
        lm: Any,
        vocab_size: int,
        ignore_id: int = 0,
        plain_share: float = 0.25,
        random_share: float = 0.25,
        **noise: Any,
    ):
        super().__init__(lm, vocab_size, ignore_id)
        trained = isinstance(lm, CausalLLM) and any(p.requires_grad for p in lm.parameters())
        if not trained:
            raise UserError("the LM model `copy` trains a `causal_llm` that is not frozen.")
        for name, share in (("plain_share", plain_share), ("random_share", random_share)):
            if not 0 <= share <= 1:
                raise UserError(f"model_conf of `copy`: {name} is {share}; expected 0 to 1.")
        known = ["plain_share", "random_share", *(field.name for field in fields(CopyNoise))]
        unknown = sorted(set(noise) - set(known))
        if unknown:
            raise UserError(
                f"model_conf of `copy` has no {', '.join(unknown)}; expected some of "
                f"{', '.join(known)}."
            )
        self.plain_share = plain_share
        self.random_share = random_share
        self.vocab_size = vocab_size
        self.noise = CopyNoise(**noise)

    def forward(
        self, text: torch.Tensor, text_lengths: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Loss of a batch.

        In validation the loss mixes text without and with a prefix as training does, and the
        statistics are those of :func:`~espnet_llm_plugin.llm.copy_accuracy.measure_copying`, with
        the same noise in every epoch.

        Args:
            text: Token ids (B, U), padded on the right.
            text_lengths: (B,).

        Returns:
            Loss per token, statistics, number of tokens.
        """
        text = text[:, : int(text_lengths.max())]
        model = self.lm.model(text.device)
        if not self.training:
            stats, tokens = measure_copying(model, text, text_lengths, self.noise, self.vocab_size)
            loss = self.plain_share * stats["loss_plain"]
            loss = loss + (1 - self.plain_share) * stats["loss_copy"]
            return force_gatherable((loss, {"loss": loss, **stats}, tokens), loss.device)
        if bool(torch.rand(()) < self.plain_share):
            loss, stats, weight = super().forward(text, text_lengths)
            return loss, {**stats, "loss_plain": stats["loss"]}, weight
        if bool(torch.rand(()) < self.random_share):
            text = random_pieces(text.shape, self.vocab_size).to(text)
        prefix = noisy_prefix(text, text_lengths, self.noise, self.vocab_size)
        score = copy_score(model, prefix, text, text_lengths)
        stats = {"loss": score.nll.detach(), "loss_copy": score.nll.detach()}
        stats["acc_copy"] = score.accuracy
        return force_gatherable((score.nll, stats, score.tokens), score.nll.device)
