"""What a transducer head knows of the labels before: its predictor, without the output layer.

B utterances, U labels, N rows (hypotheses), D predictor width.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError


class LabelHistory(torch.nn.Module, ABC):
    """Features of label sequences. Blank, 0, stands for the start.

    Args:
        num_labels: Labels and blank.
        dim: D.
    """

    def __init__(self, num_labels: int, dim: int):
        super().__init__()
        self.embed = torch.nn.Embedding(num_labels, dim)

    @abstractmethod
    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B, U) -> features (B, U+1, D); those at u have seen u labels."""

    @abstractmethod
    def start(self, rows: int) -> tuple[Tensor, Tensor]:
        """Features (N, D) and state (N, ...) of N empty sequences."""

    @abstractmethod
    def step(self, labels: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features and state of N sequences and one label (N,) more."""


class StatelessHistory(LabelHistory):
    """The last label alone [Ghodsi et al. 2020]: a weak predictor leaves the work to the audio."""

    def forward(self, labels: Tensor) -> Tensor:
        return self.embed(torch.nn.functional.pad(labels, (1, 0)))

    def start(self, rows: int) -> tuple[Tensor, Tensor]:
        begin = torch.zeros(rows, dtype=torch.long, device=self.embed.weight.device)
        return self.embed(begin), begin[:, None]

    def step(self, labels: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(labels), state


class LSTMHistory(LabelHistory):
    """All labels, by an LSTM of one layer."""

    def __init__(self, num_labels: int, dim: int):
        super().__init__(num_labels, dim)
        self.lstm = torch.nn.LSTM(dim, dim, batch_first=True)

    def forward(self, labels: Tensor) -> Tensor:
        return self.lstm(self.embed(torch.nn.functional.pad(labels, (1, 0))))[0]

    def start(self, rows: int) -> tuple[Tensor, Tensor]:
        weight = self.embed.weight
        begin = torch.zeros(rows, dtype=torch.long, device=weight.device)
        return self.step(begin, weight.new_zeros(rows, 2, weight.shape[1]))

    def step(self, labels: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        before = tuple(part[None].contiguous() for part in state.unbind(1))
        features, after = self.lstm(self.embed(labels)[:, None], before)
        return features[:, 0], torch.stack([part[0] for part in after], dim=1)


HISTORIES = {"stateless": StatelessHistory, "lstm": LSTMHistory}


def build_history(name: str, num_labels: int, dim: int) -> LabelHistory:
    """The predictor called ``name``: ``stateless`` or ``lstm``."""
    if name not in HISTORIES:
        raise UserError(f"predictor is {name!r}; expected one of {', '.join(HISTORIES)}")
    return HISTORIES[name](num_labels, dim)
