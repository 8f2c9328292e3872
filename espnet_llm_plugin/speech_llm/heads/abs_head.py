"""What every auxiliary loss of a speech LLM offers.

B utterances, T frames, E width, U tokens.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from espnet_llm_plugin.speech_llm.heads.vocabulary import LabelVocabulary


class LabelLoss(NamedTuple):
    """Losses of utterances.

    Attributes:
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


class LabelHead(ABC):
    """A layer, or a few, that writes labels from frames; nothing of it is needed in decoding.

    Attributes:
        vocabulary: The labels.
    """

    vocabulary: LabelVocabulary

    @abstractmethod
    def loss(self, hs_pad: Tensor, hlens: Tensor, text: Tensor, lengths: Tensor) -> LabelLoss:
        """Loss of each utterance.

        Args:
            hs_pad: (B, T, E), in any precision.
            hlens: (B,) frames.
            text: (B, U) token ids.
            lengths: (B,) their numbers.
        """

    @abstractmethod
    def greedy(self, hs_pad: Tensor, hlens: Tensor) -> list[list[int]]:
        """The labels of each utterance that greedy decoding writes, without blanks.

        Args:
            hs_pad: (B, T, E).
            hlens: (B,) frames.
        """
