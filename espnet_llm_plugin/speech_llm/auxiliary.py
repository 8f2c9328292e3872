"""Auxiliary CTC on the encoder and on the LLM's outputs at the audio, each with its own vocabulary.

B utterances, T frames, E width, U tokens, V tokens of the token list, C = labels and blank of a CTC
vocabulary: blank 0, labels from 1 on, never the LLM's row numbers as such.

[LLMs and Speech, arXiv 2603.15045, table "auxiliary losses"]
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from espnet2.asr.ctc import CTC
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.units import AdaptedUnits, LabelUnits
from espnet_llm_plugin.token_list import guess_token_type, read_token_list


class CTCVocabulary(ABC):
    """The labels of a CTC layer.

    Attributes:
        size: C.
    """

    size: int

    @abstractmethod
    def targets(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, L), padded with 1, and their numbers (B,), of token ids (B, U) and (B,)."""

    @abstractmethod
    def token_scores(self, log_probs: Tensor) -> Tensor:
        """Log-probs (..., C) of labels as those (..., V) of tokens, blank in column 0.

        Raises:
            UserError: The labels are not the tokens.
        """

    @abstractmethod
    def label_tokens(self, blank: int) -> Tensor:
        """(C,) ids of the tokens that the labels are, ``blank`` for blank.

        Raises:
            UserError: The labels are not the tokens.
        """

    @abstractmethod
    def text(self, labels: Sequence[int]) -> str:
        """Text of labels, blank not among them."""


class TokenVocabulary(CTCVocabulary):
    """The tokens of the token list: label = id for an ASR token list, id + 1 for an LLM's own.

    An LLM's own token 0 has a label, but no column among :meth:`token_scores`, where ESPnet's
    scorers expect blank.
    """

    def __init__(self, units: LabelUnits):
        self._units = units
        self.shift = 0 if isinstance(units, AdaptedUnits) else 1
        self.size = units.vocab_size + self.shift

    def targets(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        return (text + self.shift).masked_fill(~inside, 1), lengths

    def token_scores(self, log_probs: Tensor) -> Tensor:
        if not self.shift:
            return log_probs
        return torch.cat([log_probs[..., :1], log_probs[..., 2:]], dim=-1)

    def label_tokens(self, blank: int) -> Tensor:
        tokens = torch.arange(self.size) - self.shift
        tokens[0] = blank
        return tokens

    def text(self, labels: Sequence[int]) -> str:
        return self._units.decode([label - self.shift for label in labels])


class PieceVocabulary(CTCVocabulary):
    """An ASR token list of its own, such as SentencePiece pieces beside an LLM's own tokens.

    Transcripts are turned into text and tokenised again.

    Args:
        units: Of the transcripts.
        token_list: File; ``<blank>`` first.
        bpemodel: SentencePiece model, if the tokens are pieces.
    """

    def __init__(self, units: LabelUnits, token_list: str, bpemodel: Optional[str] = None):
        from espnet2.text.build_tokenizer import build_tokenizer
        from espnet2.text.token_id_converter import TokenIDConverter

        tokens = read_token_list(token_list)
        kind = guess_token_type(tokens)
        if kind == "bpe" and (bpemodel is None or not Path(bpemodel).is_file()):
            raise UserError(
                f"the CTC vocabulary {token_list} has SentencePiece pieces; give their model as "
                f"bpemodel, got {bpemodel}"
            )
        self.name = token_list
        self.size = len(tokens)
        self._units = units
        self._tokenizer = build_tokenizer(kind, bpemodel=bpemodel)
        self._converter = TokenIDConverter(tokens)

    def targets(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for row, length in zip(text.tolist(), lengths.tolist()):
            pieces = self._tokenizer.text2tokens(self._units.decode(row[:length]))
            rows.append(self._converter.tokens2ids(pieces))
        longest = max(map(len, rows), default=0)
        labels = [[*row, *[1] * (longest - len(row))] for row in rows]
        counts = torch.tensor([len(row) for row in rows], device=lengths.device)
        targets = torch.tensor(labels, dtype=torch.long, device=text.device)
        return targets.reshape(len(rows), longest), counts

    def token_scores(self, log_probs: Tensor) -> Tensor:
        raise UserError(
            f"the CTC layer has other labels ({self.name}) than the decoder has tokens, and cannot "
            "score its hypotheses one by one: decode with ctc_weight 0"
        )

    def label_tokens(self, blank: int) -> Tensor:
        raise UserError(
            f"adapter ctc_embedding needs a CTC with the decoder's tokens, not {self.name}: leave "
            "out model_conf ctc_vocabulary"
        )

    def text(self, labels: Sequence[int]) -> str:
        return self._tokenizer.tokens2text(self._converter.ids2tokens(list(labels)))


def ctc_vocabulary(key: str, conf: Optional[Mapping[str, Any]], units: LabelUnits) -> CTCVocabulary:
    """The vocabulary that ``key`` of ``model_conf`` describes.

    Args:
        key: Its name.
        conf: ``None`` for the decoder's tokens, or ``token_list`` and ``bpemodel``.
        units: The decoder's.
    """
    if conf is None:
        return TokenVocabulary(units)
    refuse_unknown(f"model_conf: {key}", conf, PieceVocabulary.__init__, ("self", "units"))
    if "token_list" not in conf:
        raise UserError(f"model_conf: {key} needs token_list, the file of the labels")
    return PieceVocabulary(units, **conf)


class VocabularyCTC(CTC):
    """A CTC layer over a :class:`CTCVocabulary`, laid out as ESPnet's (``ctc_lo``).

    :meth:`log_softmax` is what ESPnet's scorers ask: the scores of the decoder's tokens.

    Args:
        vocabulary: The labels.
        width: E.
        dropout_rate: Of the input, in training.
    """

    def __init__(self, vocabulary: CTCVocabulary, width: int, dropout_rate: float = 0.0):
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

    def loss(self, hs_pad: Tensor, hlens: Tensor, text: Tensor, lengths: Tensor) -> "CTCLoss":
        """Loss of each utterance.

        Args:
            hs_pad: (B, T, E).
            hlens: (B,) frames.
            text: (B, U) token ids.
            lengths: (B,) their numbers.
        """
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
        return CTCLoss(nll, counts.masked_fill(~fits, 0), fits)


class CTCLoss(NamedTuple):
    """Attributes:
    nll: (B,) nats; zero where the labels do not fit.
    counts: (B,) labels; zero where they do not fit.
    fits: (B,) whether the frames are enough for the labels.
    """

    nll: Tensor
    counts: Tensor
    fits: Tensor

    def reduced(self, by_length: bool) -> Tensor:
        """Mean per label or per utterance, over those that fit."""
        weight = self.counts.sum() if by_length else self.fits.sum()
        return self.nll.sum() / weight.clamp(min=1)

    @property
    def num_skipped(self) -> float:
        """Utterances that do not fit."""
        return float((~self.fits).sum())
