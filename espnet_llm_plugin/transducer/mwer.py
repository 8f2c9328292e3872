"""Minimum word error rate training of transducers on N-best lists.

[Guo et al. 2020, arXiv 2007.13802, for RNN-T; arXiv 2404.01716 eq. 6 for the factorized transducer;
Transducer-Llama, arXiv 2412.16464, after the LM swap]

B utterances, N hypotheses, U labels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.transducer.nbest import NBestCache, nbest
from espnet_llm_plugin.transducer.nbest_scores import NBest
from espnet_llm_plugin.transducer.word_errors import WordErrors

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.base_model import Lattice


@dataclass(frozen=True)
class MWERConf:
    """Options of MWER training, ``model_conf: {mwer_weight: ..., mwer_conf: {...}}``.

    Attributes:
        nbest: N, hypotheses of an utterance, at most.
        beam_size: of the search that finds them; at least N.
        max_symbols_per_frame: of that search.
        score_scale: inverse temperature; the hypotheses' probabilities are
            softmax(score_scale * score).
        rnnt_weight: gamma, weight of the transducer loss of the transcript beside the MWER loss.
        refresh: an N-best list is reused for so many training batches; 0: every batch is searched.
        valid_stats: search in validation too, and report the statistics; also without
            ``mwer_weight``, for a control.
    """

    nbest: int = 4
    beam_size: int = 4
    max_symbols_per_frame: int = 3
    score_scale: float = 1.0
    rnnt_weight: float = 0.1
    refresh: int = 0
    valid_stats: bool = False

    def __post_init__(self):
        bounds = {"nbest": 2, "beam_size": self.nbest, "max_symbols_per_frame": 1, "refresh": 0}
        for name, least in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                because = f" (nbest: {self.nbest})" if name == "beam_size" else ""
                raise UserError(
                    f"model_conf.mwer_conf: {name} must be an integer of at least {least}{because}"
                    f", got {value!r}"
                )
        if not self.score_scale > 0:
            raise UserError(
                f"model_conf.mwer_conf: score_scale must be positive, got {self.score_scale!r}"
            )
        if not self.rnnt_weight >= 0:
            raise UserError(
                f"model_conf.mwer_conf: rnnt_weight must not be negative, got {self.rnnt_weight!r}"
            )


def mwer_loss(
    scores: Tensor, errors: Tensor, exists: Optional[Tensor] = None, score_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Expected word errors over the N-best list, less the list's mean.

    ``L = sum_i P_i (R_i - mean R)`` with ``P = softmax(score_scale * scores)``. The mean changes
    nothing in the gradient ``dL/dscore_i = score_scale P_i (R_i - sum_j P_j R_j)``
    [arXiv 2007.13802 eq. 8], which vanishes where all hypotheses have the same number of errors.

    Args:
        scores: (B, N) log-probabilities, not normalised over the list. Hypotheses of a score that
            is not finite do not count.
        errors: (B, N) word errors R.
        exists: (B, N) which hypotheses there are; default: all.
        score_scale: inverse temperature.

    Returns:
        (B,) losses, in word errors, 0 where there is no hypothesis; and P (B, N).
    """
    counts = scores.isfinite() if exists is None else exists & scores.isfinite()
    scaled = (score_scale * scores).masked_fill(~counts, -torch.inf)
    # a list of nothing but -inf would be NaN
    probs = scaled.masked_fill(~counts.any(-1, keepdim=True), 0.0).softmax(-1)
    probs = probs.masked_fill(~counts, 0.0)
    errors = errors.to(scores.dtype).masked_fill(~counts, 0.0)
    mean = errors.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    return (probs * (errors - mean)).sum(-1), probs


class MWER:
    """N-best lists of training batches, and the MWER loss and statistics on them.

    The lists are searched on the encoder output that the loss sees, SpecAugment and dropout of the
    encoder included: the list then holds the competitors of the very distribution whose expected
    errors are lowered, and the encoder runs once. (Decoder and joint network search without
    dropout.)

    Statistics, means over the utterances that have hypotheses:

    * ``mwer_expected_errors``, ``mwer_onebest_errors``, ``mwer_oracle_errors``: word errors of an
      utterance, expected under P, of the most probable, and of the best hypothesis;
    * ``mwer_num_hyps``, ``mwer_effective_hyps``: N and exp of the entropy of P;
    * ``mwer_no_variance``: share of utterances whose hypotheses have all the same number of
      errors, so that they contribute nothing but ``rnnt_weight`` times their transducer loss.

    Args:
        conf: ``model_conf.mwer_conf``.
        token_list: V tokens.
        max_labels_per_frame: longer hypotheses are dropped, as longer transcripts are.
    """

    STATS = tuple(
        f"mwer_{name}"
        for name in (
            "expected_errors",
            "onebest_errors",
            "oracle_errors",
            "num_hyps",
            "effective_hyps",
            "no_variance",
        )
    )

    def __init__(
        self,
        conf: Optional[Mapping[str, Any]],
        token_list: Sequence[str],
        max_labels_per_frame: float,
    ):
        refuse_unknown("model_conf.mwer_conf", conf or {}, MWERConf)
        self.conf = MWERConf(**(conf or {}))
        self.max_labels_per_frame = max_labels_per_frame
        self.word_errors = WordErrors(token_list)
        self.cache = NBestCache(self.conf.refresh)

    def hypotheses(
        self, model: torch.nn.Module, batch: "Lattice", names: Optional[Sequence[str]]
    ) -> NBest:
        """The N-best lists of a batch. In training they may be earlier ones of the utterances.

        An utterance whose encoder output is not finite has no hypotheses, rather than none of the
        batch: the loss of its transcript is not finite either, and ESPnet skips such an update.
        """
        encoder_out = batch.encoder_out.detach()
        frames = torch.arange(encoder_out.shape[1], device=encoder_out.device)
        inside = frames < batch.frame_lengths.unsqueeze(-1)
        finite = (encoder_out.isfinite().all(-1) | ~inside).all(-1).tolist()

        def search(which: list[int]) -> list[list[tuple[int, ...]]]:
            usable = [i for i in which if finite[i]]
            if not usable:
                return [[] for _ in which]
            rows = torch.tensor(usable, device=encoder_out.device)
            lists = nbest(
                model,
                encoder_out[rows],
                batch.frame_lengths[rows],
                self.conf.beam_size,
                self.conf.nbest,
                self.conf.max_symbols_per_frame,
            )
            found = dict(zip(usable, lists))
            return [found.get(i, []) for i in which]

        if model.training:
            self.cache.next_batch()
            lists = self.cache.lists(names, len(encoder_out), search)
        else:
            lists = search(list(range(len(encoder_out))))
        return self._tensors(batch, lists)

    def _tensors(self, batch: "Lattice", lists: Sequence[Sequence[tuple[int, ...]]]) -> NBest:
        """Drop duplicates and hypotheses that are too long, count errors, pad."""
        longest = [int(self.max_labels_per_frame * n) for n in batch.frame_lengths.tolist()]
        tokens = [
            [[label + 1 for label in labels] for labels in dict.fromkeys(hyps) if len(labels) <= n]
            for hyps, n in zip(lists, longest)
        ]
        size = len(tokens), max(1, *map(len, tokens))
        width = max((len(hyp) for hyps in tokens for hyp in hyps), default=0)
        padded = torch.ones((*size, width), dtype=torch.long)
        lengths, errors = torch.zeros(size, dtype=torch.long), torch.zeros(size)
        exists = torch.zeros(size, dtype=torch.bool)
        references = zip(batch.text.tolist(), batch.text_lengths.tolist())
        for b, (hyps, (text, text_length)) in enumerate(zip(tokens, references)):
            counts = self.word_errors(text[:text_length], hyps)
            errors[b, : len(hyps)] = torch.tensor(counts, dtype=errors.dtype)
            exists[b, : len(hyps)] = True
            for i, hyp in enumerate(hyps):
                padded[b, i, : len(hyp)] = torch.tensor(hyp, dtype=torch.long)
                lengths[b, i] = len(hyp)
        device = batch.text.device
        return NBest(padded.to(device), lengths.to(device), exists.to(device), errors.to(device))

    def loss(self, nbest: NBest, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """MWER loss (B,) of the hypotheses' scores (B, N), and its statistics."""
        loss, probs = mwer_loss(scores, nbest.errors, nbest.exists, self.conf.score_scale)
        return loss, self._stats(nbest, scores.detach(), probs.detach())

    def _stats(self, nbest: NBest, scores: Tensor, probs: Tensor) -> dict[str, Tensor]:
        some = nbest.exists.any(-1)
        number = some.sum().clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return values.masked_fill(~some, 0.0).sum() / number

        errors = nbest.errors.to(probs.dtype)
        least = errors.masked_fill(~nbest.exists, torch.inf).amin(-1)
        most = errors.masked_fill(~nbest.exists, -torch.inf).amax(-1)
        first = scores.masked_fill(~nbest.exists, -torch.inf).argmax(-1, keepdim=True)
        entropy = torch.special.entr(probs).sum(-1)
        values = (
            mean((probs * errors).sum(-1)),
            mean(errors.gather(-1, first).squeeze(-1)),
            mean(least),
            mean(nbest.exists.sum(-1).to(probs.dtype)),
            mean(entropy.exp()),
            mean((least == most).to(probs.dtype)),
        )
        return dict(zip(self.STATS, values))
