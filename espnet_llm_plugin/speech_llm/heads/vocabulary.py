"""Vocabularies of auxiliary losses, which need not be the decoder's.

B utterances, U tokens, V tokens of the token list, L labels, C = labels and blank of a vocabulary:
blank 0, labels from 1 on, never the LLM's row numbers as such.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.units import AdaptedUnits, LabelUnits
from espnet_llm_plugin.token_list import guess_token_type, read_token_list


class LabelVocabulary(ABC):
    """The labels of an auxiliary loss.

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


class TokenVocabulary(LabelVocabulary):
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


class PieceVocabulary(LabelVocabulary):
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
                f"the token list {token_list} has SentencePiece pieces; give their model as "
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


def label_vocabulary(
    where: str, conf: Union[None, str, Mapping[str, Any]], units: LabelUnits
) -> LabelVocabulary:
    """The vocabulary that a configuration describes.

    Args:
        where: Its key, for messages.
        conf: ``tokens`` or ``None`` for the decoder's tokens, or ``token_list`` and ``bpemodel``.
        units: The decoder's.
    """
    if conf is None or conf == "tokens":
        return TokenVocabulary(units)
    if not isinstance(conf, Mapping):
        raise UserError(
            f"{where} is {conf!r}; expected tokens (the decoder's), or token_list and bpemodel"
        )
    refuse_unknown(where, conf, PieceVocabulary.__init__, ("self", "units"))
    if "token_list" not in conf:
        raise UserError(f"{where} needs token_list, the file of the labels")
    return PieceVocabulary(units, **conf)
