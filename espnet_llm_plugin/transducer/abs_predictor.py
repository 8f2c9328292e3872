"""What every non-blank predictor of the factorized transducer offers.

B utterances, U labels, N prefixes, L labels in the vocabulary (token ids 1..L; a label is its
token id minus 1; ``<blank>`` and ``<sos/eos>`` are not labels).
"""

from abc import ABC, abstractmethod
from typing import Any, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError


class AbsPredictor(torch.nn.Module, ABC):
    """A language model over the labels, usable teacher-forced and prefix by prefix.

    Both ways give the same log-probabilities. Prefix states are opaque, belong to one prefix
    each, are never modified in place, and prefixes of different lengths may be extended in one
    call.
    """

    def __init__(self, num_labels: int):
        super().__init__()
        self.num_labels = num_labels

    @abstractmethod
    def forward(self, labels: Tensor) -> Tensor:
        """Teacher-forced log-probabilities.

        Args:
            labels: (B, U) in [0, L); rows are right-padded with any valid label.

        Returns:
            (B, U+1, L) log-softmax over the labels; position u has seen ``labels[:, :u]``.
        """

    @abstractmethod
    def start(self, device: torch.device) -> tuple[Tensor, Any]:
        """Log-probabilities (L,) of the first label, and the state of the empty prefix."""

    @abstractmethod
    def extend(self, labels: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Append one label to each of N prefixes.

        Args:
            labels: (N,) labels in [0, L).
            states: the states of the N prefixes, without these labels.

        Returns:
            (N, L) log-probabilities of the label after, and the N new states.
        """

    def check_token_list(self, token_list: Sequence[str]) -> None:
        """Raise :class:`UserError` if this predictor was made for another token list."""
        if len(token_list) != self.num_labels + 2:
            raise UserError(
                f"the predictor has {self.num_labels} labels, but the token list has "
                f"{len(token_list)} tokens: expected {self.num_labels + 2} (the labels, <blank> "
                "and <sos/eos>)"
            )

    def train(self, mode: bool = True) -> "AbsPredictor":
        """Set training mode, but keep a frozen predictor in evaluation mode (no dropout)."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))


def as_history(labels: Tensor) -> Tensor:
    """Labels (B, U) -> inputs (B, U+1) with 0 = start of utterance, label + 1 = token id."""
    return torch.nn.functional.pad(labels + 1, (1, 0))
