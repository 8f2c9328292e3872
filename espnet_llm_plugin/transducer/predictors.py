"""Non-blank predictors of the factorized transducer: language models over the labels.

B utterances, U labels, N prefixes, L labels in the vocabulary (token ids 1..L; a label is its
token id minus 1; ``<blank>`` and ``<sos/eos>`` are not labels), E embedding width, H units.
"""

from abc import ABC, abstractmethod
from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.options import refuse_unknown


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


class StatelessPredictor(AbsPredictor):
    """Embedding and linear layer on the last label: bigram-like, the *weak* LM.

    [Transducer-Llama, arXiv 2412.16464: the predictor used in training before the LM swap]
    """

    def __init__(self, num_labels: int, embed_dim: int = 512):
        super().__init__(num_labels)
        self.embed = torch.nn.Embedding(num_labels + 1, embed_dim)
        self.output = torch.nn.Linear(embed_dim, num_labels)

    def _log_probs(self, history: Tensor) -> Tensor:
        return self.output(self.embed(history)).float().log_softmax(dim=-1)

    def forward(self, labels: Tensor) -> Tensor:
        return self._log_probs(as_history(labels))

    def start(self, device: torch.device) -> tuple[Tensor, None]:
        return self._log_probs(torch.zeros((), dtype=torch.long, device=device)), None

    def extend(self, labels: Tensor, states: Sequence[None]) -> tuple[Tensor, list[None]]:
        return self._log_probs(labels + 1), [None] * len(states)


class LSTMPredictor(AbsPredictor):
    """LSTM language model.

    [Effective internal LM training and fusion for factorized transducer, arXiv 2404.01716: 3 x 512,
    or 2 x 2048 projected to 512]
    """

    def __init__(
        self,
        num_labels: int,
        embed_dim: int = 512,
        hidden_dim: int = 512,
        num_layers: int = 2,
        proj_dim: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(num_labels)
        self.embed = torch.nn.Embedding(num_labels + 1, embed_dim)
        self.dropout = torch.nn.Dropout(dropout)
        self.lstm = torch.nn.LSTM(
            embed_dim,
            hidden_dim,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            proj_size=proj_dim,
        )
        self.output = torch.nn.Linear(proj_dim or hidden_dim, num_labels)

    def _run(self, history: Tensor, state: Optional[tuple[Tensor, Tensor]]):
        """(B, S) inputs -> (B, S, L) log-probabilities and the LSTM's state (layers, B, H)."""
        hidden, state = self.lstm(self.dropout(self.embed(history)), state)
        log_probs = self.output(self.dropout(hidden)).float().log_softmax(dim=-1)
        return log_probs, state

    def forward(self, labels: Tensor) -> Tensor:
        return self._run(as_history(labels), None)[0]

    def start(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        begin = torch.zeros(1, 1, dtype=torch.long, device=device)
        log_probs, (hidden, cell) = self._run(begin, None)
        return log_probs[0, 0], (hidden[:, 0], cell[:, 0])

    def extend(self, labels: Tensor, states: Sequence[tuple[Tensor, Tensor]]):
        batch = (
            torch.stack([hidden for hidden, _ in states], dim=1),
            torch.stack([cell for _, cell in states], dim=1),
        )
        log_probs, (hidden, cell) = self._run(labels[:, None] + 1, batch)
        return log_probs[:, 0], list(zip(hidden.unbind(1), cell.unbind(1)))


def _predictor_classes() -> dict[str, type[AbsPredictor]]:
    # imported here: transformers takes seconds to import and only one predictor needs it
    from espnet_llm_plugin.transducer.llm_predictor import LLMPredictor

    return {"stateless": StatelessPredictor, "lstm": LSTMPredictor, "llm": LLMPredictor}


def build_predictor(name: str, num_labels: int, **conf: Any) -> AbsPredictor:
    """Build the predictor ``name``: ``stateless``, ``lstm`` or ``llm``.

    Args:
        name: the predictor's name.
        num_labels: L; the token list has L + 2 tokens.
        conf: the predictor's own options.

    Raises:
        UserError: unknown predictor or option; the message names the valid ones.
    """
    classes = _predictor_classes()
    if name not in classes:
        raise UserError(f"unknown predictor {name!r}; choose one of: {', '.join(classes)}")
    refuse_unknown(f"predictor_conf of {name!r}", conf, classes[name].__init__, _RESERVED)
    return classes[name](num_labels, **conf)


_RESERVED = ("self", "num_labels")
