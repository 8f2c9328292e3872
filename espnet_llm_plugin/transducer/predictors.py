"""Non-blank predictors of the factorized transducer, by name; here those that it trains itself.

B utterances, U labels, N prefixes, L labels in the vocabulary, E embedding width, H units.
"""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.transducer.abs_predictor import AbsPredictor, as_history
from espnet_llm_plugin.transducer.llm_predictor import LLMPredictor


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


PREDICTORS = {"stateless": StatelessPredictor, "lstm": LSTMPredictor, "llm": LLMPredictor}
_RESERVED = ("self", "num_labels")


def build_predictor(name: str, num_labels: int, **conf: Any) -> AbsPredictor:
    """Build the predictor ``name``: ``stateless``, ``lstm`` or ``llm``.

    Args:
        name: the predictor's name.
        num_labels: L; the token list has L + 2 tokens.
        conf: the predictor's own options.

    Raises:
        UserError: unknown predictor or option; the message names the valid ones.
    """
    if name not in PREDICTORS:
        raise UserError(f"unknown predictor {name!r}; choose one of: {', '.join(PREDICTORS)}")
    cls = PREDICTORS[name]
    refuse_unknown(f"predictor_conf of {name!r}", conf, cls.__init__, _RESERVED)
    return cls(num_labels, **conf)
