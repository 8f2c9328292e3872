"""The blank branch of the factorized transducer: its own stateless predictor and joiner.

B utterances, T frames, U labels, D encoder width, E embedding width, J joiner width.
"""

import torch
from torch import Tensor


class BlankBranch(torch.nn.Module):
    """``z[t,u] = w . tanh(W1 h[t] + W2 embed(y[u-1]) + b)``.

    [HAT, arXiv 2003.07705; MHAT, arXiv 2210.17049; factorized transducer, arXiv 2404.01716]

    The output layer ``w`` starts at zero, so that a model which adds a CTC output layer's blank
    logit begins exactly at the CTC model's blank probability.
    """

    def __init__(self, encoder_dim: int, num_labels: int, embed_dim: int, joint_dim: int):
        super().__init__()
        self.embed = torch.nn.Embedding(num_labels + 1, embed_dim)  # row 0: start of utterance
        self.predictor_linear = torch.nn.Linear(embed_dim, joint_dim, bias=False)
        self.encoder_linear = torch.nn.Linear(encoder_dim, joint_dim)
        self.output = torch.nn.Linear(joint_dim, 1)
        self.espnet_initialization_fn()

    def espnet_initialization_fn(self) -> None:
        """Start at zero; ESPnet calls this after the initialisation chosen by ``init:``."""
        torch.nn.init.zeros_(self.output.weight)
        torch.nn.init.zeros_(self.output.bias)

    def predict(self, history: Tensor) -> Tensor:
        """Last token ids (...), 0 = none -> predictor part of the joiner's input (..., J)."""
        return self.predictor_linear(self.embed(history))

    def project(self, encoder_out: Tensor) -> Tensor:
        """(..., D) -> encoder part of the joiner's input (..., J)."""
        return self.encoder_linear(encoder_out)

    def join(self, encoder_part: Tensor, predictor_part: Tensor) -> Tensor:
        """Two broadcastable parts (..., J) -> z (...)."""
        # tanh in place: the sum is the largest tensor of the model, (B,T,U+1,J)
        return self.output((encoder_part + predictor_part).tanh_()).squeeze(-1)
