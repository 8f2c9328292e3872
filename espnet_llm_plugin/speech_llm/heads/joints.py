"""Joints of a transducer head: from frames and label histories to its loss and its scores.

B utterances, T frames, U labels, N rows, E width of the frames, D predictor width, J joint width,
C = labels and blank.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.dense_loss import dense_rnnt_loss
from espnet_llm_plugin.transducer.loss import factorized_rnnt_loss

# Width of the factorized joint's blank branch, whose (B, T, U+1, width) is stored.
_BLANK_WIDTH = 64
# Logits of frames and histories that the factorized joint holds at a time.
_ENTRIES = 1 << 25


class AbsJoint(torch.nn.Module, ABC):
    """Args of every joint:
    num_labels: C.
    width: E.
    predictor_dim: D.
    joint_dim: J.
    """

    @abstractmethod
    def nll(
        self, frames: Tensor, frame_lengths: Tensor, history: Tensor, labels: Tensor, counts: Tensor
    ) -> Tensor:
        """-log P(labels) of each utterance (B,), nats.

        Args:
            frames: (B, T, E).
            frame_lengths: (B,), at least 1.
            history: (B, U+1, D).
            labels: (B, U), from 1 on; anything beyond the counts.
            counts: (B,).
        """

    @abstractmethod
    def scores(self, frames: Tensor, history: Tensor) -> Tensor:
        """Logits (N, C) of blank and labels after frames (N, E) and histories (N, D)."""


class DenseJoint(AbsJoint):
    """``W tanh(A h + B g) + b`` [Graves et al. 2013], for vocabularies of some thousands."""

    def __init__(self, num_labels: int, width: int, predictor_dim: int, joint_dim: int):
        super().__init__()
        self.frame_linear = torch.nn.Linear(width, joint_dim)
        self.history_linear = torch.nn.Linear(predictor_dim, joint_dim, bias=False)
        self.output = torch.nn.Linear(joint_dim, num_labels)
        self.espnet_initialization_fn()

    def espnet_initialization_fn(self) -> None:
        """As much blank as labels, or a fresh head spends its first epochs on learning blank.

        ESPnet calls this after the initialisation chosen by ``init:``.
        """
        torch.nn.init.zeros_(self.output.bias)
        with torch.no_grad():
            self.output.bias[0] = math.log(len(self.output.bias) - 1)

    def nll(self, frames, frame_lengths, history, labels, counts):
        return dense_rnnt_loss(
            self.frame_linear(frames),
            self.history_linear(history),
            self.output.weight,
            self.output.bias,
            labels,
            frame_lengths,
            counts,
            reduction="none",
        )

    def scores(self, frames, history):
        hidden = torch.tanh(self.frame_linear(frames) + self.history_linear(history))
        return self.output(hidden).float()


class FactorizedJoint(AbsJoint):
    """``softmax [z; a[t] + l[u]]``: acoustic logits plus a label LM's log-probabilities, and blank.

    Its loss has no tensor of T * U * C entries, so that an LLM's vocabulary fits. What depends on
    blank goes through a small joint of its own, ``z = a_blank[t] + w tanh(A h + B g)`` [factorized
    neural transducer, arXiv 2110.01500].
    """

    def __init__(self, num_labels: int, width: int, predictor_dim: int, joint_dim: int):
        super().__init__()
        # through J: an LLM's width times its vocabulary would be too many parameters
        self.frame_linear = torch.nn.Linear(width, joint_dim)
        self.acoustic_output = torch.nn.Linear(joint_dim, num_labels)
        self.lm_output = torch.nn.Linear(predictor_dim, num_labels - 1)
        self.blank_frame = torch.nn.Linear(width, _BLANK_WIDTH)
        self.blank_history = torch.nn.Linear(predictor_dim, _BLANK_WIDTH, bias=False)
        self.blank_output = torch.nn.Linear(_BLANK_WIDTH, 1, bias=False)

    def nll(self, frames, frame_lengths, history, labels, counts):
        # a few utterances at a time; their logits are computed again in the backward pass
        logits = (frames.shape[1] + history.shape[1]) * len(self.acoustic_output.weight)
        size = max(1, _ENTRIES // logits)
        if size >= len(frames):
            return self._nll(frames, frame_lengths, history, labels, counts)
        parts = []
        for start in range(0, len(frames), size):
            rows = slice(start, start + size)
            longest, most = int(frame_lengths[rows].max()), int(counts[rows].max())
            parts.append(
                checkpoint(
                    self._nll,
                    frames[rows, :longest],
                    frame_lengths[rows],
                    history[rows, : most + 1],
                    labels[rows, :most],
                    counts[rows],
                    use_reentrant=False,
                )
            )
        return torch.cat(parts)

    def _nll(self, frames, frame_lengths, history, labels, counts):
        acoustic, acoustic_blank = self._acoustic(frames)
        blank = self._blank(
            self.blank_frame(frames)[:, :, None], self.blank_history(history)[:, None]
        )
        return factorized_rnnt_loss(
            acoustic,
            self._lm(history),
            blank.float() + acoustic_blank[:, :, None],
            labels - 1,
            frame_lengths,
            counts,
            blank_norm="softmax",
            reduction="none",
        )

    def scores(self, frames, history):
        acoustic, acoustic_blank = self._acoustic(frames)
        blank = self._blank(self.blank_frame(frames), self.blank_history(history)) + acoustic_blank
        return torch.cat([blank[:, None].float(), acoustic.float() + self._lm(history)], dim=1)

    def _acoustic(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., C-1) of the labels and (...) of blank."""
        hidden = torch.tanh(self.frame_linear(frames))
        weight, bias = self.acoustic_output.weight, self.acoustic_output.bias
        # rows of the layer, not columns of its output: no second (B, T, C) for their gradient
        return (
            linear(hidden, weight[1:], bias[1:]),
            linear(hidden, weight[:1], bias[:1]).squeeze(-1),
        )

    def _lm(self, history: Tensor) -> Tensor:
        return self.lm_output(history).float().log_softmax(dim=-1)

    def _blank(self, frame_part: Tensor, history_part: Tensor) -> Tensor:
        return self.blank_output(torch.tanh(frame_part + history_part)).squeeze(-1)


JOINTS = {"dense": DenseJoint, "factorized": FactorizedJoint}


def build_joint(name: str, *sizes: int) -> AbsJoint:
    """The joint called ``name``: ``dense`` or ``factorized``."""
    if name not in JOINTS:
        raise UserError(f"joint is {name!r}; expected one of {', '.join(JOINTS)}")
    return JOINTS[name](*sizes)
