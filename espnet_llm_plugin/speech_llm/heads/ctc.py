"""Auxiliary CTC on the encoder, the adapter, or the LLM's outputs at the audio.

B utterances, T frames, E width, U tokens, V tokens of the token list, C = labels and blank.

[LLMs and Speech, arXiv 2603.15045, table "auxiliary losses"]
"""

import torch
from espnet2.asr.ctc import CTC
from torch import Tensor

from espnet_llm_plugin.speech_llm.heads.abs_head import LabelHead, LabelLoss
from espnet_llm_plugin.speech_llm.heads.vocabulary import LabelVocabulary


class VocabularyCTC(CTC, LabelHead):
    """A CTC layer over a :class:`LabelVocabulary`, laid out as ESPnet's (``ctc_lo``).

    :meth:`log_softmax` is what ESPnet's scorers ask: the scores of the decoder's tokens.

    Args:
        vocabulary: The labels.
        width: E.
        dropout_rate: Of the input, in training.
    """

    def __init__(self, vocabulary: LabelVocabulary, width: int, dropout_rate: float = 0.0):
        super().__init__(odim=vocabulary.size, encoder_output_size=width, dropout_rate=dropout_rate)
        self.vocabulary = vocabulary

    def label_log_probs(self, hs_pad: Tensor) -> Tensor:
        """(B, T, E) -> log-probs (B, T, C) float32 of blank and labels."""
        hs_pad = torch.nn.functional.dropout(hs_pad, self.dropout_rate, self.training)
        # an LLM in half precision has such outputs; under autocast this changes nothing
        return self.ctc_lo(hs_pad.to(self.ctc_lo.weight.dtype)).float().log_softmax(dim=-1)

    def log_softmax(self, hs_pad: Tensor) -> Tensor:
        """(B, T, E) -> log-probs (B, T, V) of the decoder's tokens, blank in column 0."""
        return self.vocabulary.token_scores(self.label_log_probs(hs_pad))

    def loss(self, hs_pad: Tensor, hlens: Tensor, text: Tensor, lengths: Tensor) -> LabelLoss:
        labels, counts = self.vocabulary.targets(text, lengths)
        hlens = hlens.to(counts.device)
        # between two equal labels there must be a blank
        inside = torch.arange(labels.shape[1], device=labels.device)[1:] < counts[:, None]
        repeats = ((labels[:, 1:] == labels[:, :-1]) & inside).sum(dim=1)
        fits = counts + repeats <= hlens
        nll = torch.nn.functional.ctc_loss(
            self.label_log_probs(hs_pad).transpose(0, 1),
            labels,
            hlens,
            counts,
            reduction="none",
            zero_infinity=True,
        )
        return LabelLoss(nll, counts.masked_fill(~fits, 0), fits)

    @torch.no_grad()
    def greedy(self, hs_pad: Tensor, hlens: Tensor) -> list[list[int]]:
        best = self.label_log_probs(hs_pad).argmax(dim=-1).tolist()
        rows = []
        for row, length in zip(best, hlens.tolist()):
            row = row[:length]
            rows.append([now for now, last in zip(row, [0, *row]) if now not in (0, last)])
        return rows
