"""Scores of an RNN-T (ESPnet's decoder and joint network) for a search.

B utterances, T frames, M cells (a cell is a frame of an utterance and a prefix), P of them,
L labels (label = token id - 1), V = L + 1, N layers of H units, D encoder width, J joiner width.
"""

from typing import NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from espnet_llm_plugin.transducer.joint import ResidualJoint
from espnet_llm_plugin.transducer.model import TransducerModel
from espnet_llm_plugin.transducer.prefix_tree import ROOT, RowStore


class RNNTFrames(NamedTuple):
    """Encoder side of an RNN-T."""

    part: Tensor  # (B, T, J) of the joint network's input
    residual: Optional[Tensor]  # (B, T, V) acoustic logits


class RNNTPool:
    """Decoder outputs and states of an RNN-T's prefixes, in tensors."""

    def __init__(self, scorer: "RNNTScorer"):
        self._scorer = scorer
        self._rows = RowStore()
        decoder = scorer.decoder
        zeros = decoder.embed.weight.new_zeros(1, decoder.dlayers, decoder.dunits)
        self._run(np.array([ROOT]), np.array([0]), zeros, zeros)

    def compute(self, nodes: np.ndarray, parents: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`PrefixPool`."""
        before = torch.from_numpy(parents).to(self._scorer.device)
        self._run(nodes, labels + 1, self._rows["hidden"][before], self._rows["cell"][before])

    @torch.no_grad()
    def _run(self, nodes: np.ndarray, tokens: np.ndarray, hidden: Tensor, cell: Tensor) -> None:
        scorer, at = self._scorer, torch.from_numpy(nodes)
        embedded = scorer.decoder.embed(torch.from_numpy(tokens).to(scorer.device))
        output, hidden, cell = rnn_step(scorer.decoder.decoder, embedded, hidden, cell)
        self._rows.put("part", at, scorer.joint.lin_dec(output))
        self._rows.put("hidden", at, hidden)
        self._rows.put("cell", at, cell)

    @property
    def bytes_per_prefix(self) -> int:
        """See :class:`PrefixPool`."""
        return self._rows.row_bytes

    def parts(self, nodes: np.ndarray) -> Tensor:
        """The decoder's part of the joint network's input (M, J)."""
        return self._rows["part"][torch.from_numpy(nodes).to(self._scorer.device)]

    @torch.no_grad()
    def lm(self, nodes: np.ndarray) -> Tensor:
        """Internal LM: the labels' softmax where the encoder's part of the joint is zero.

        [Internal LM estimation, arXiv 2011.01991; HAT, arXiv 2003.07705]
        """
        joint = self._scorer.joint
        logits = joint.lin_out(joint.joint_activation(self.parts(nodes)))[:, 1:]
        return logits.float().log_softmax(dim=-1).clamp(min=-1e4)

    def free(self, nodes: Sequence[int]) -> None:
        """See :class:`PrefixPool`: rows are overwritten, nothing to do."""


class RNNTCells:
    """Cells of an RNN-T, whose joint network scores blank and labels together."""

    def __init__(self, log_probs: Tensor):
        self._log_probs = log_probs
        self.blank = log_probs[:, 0]
        self.ceiling = log_probs[:, 1:].amax(dim=1)

    def labels(self, which: Tensor) -> Tensor:
        """See :class:`Cells`."""
        return self._log_probs[which, 1:]


class RNNTScorer:
    """Scores of an RNN-T with ESPnet's decoder and joint network.

    The labels are the token ids 1..V-1, ``<sos/eos>`` included (it is never seen in training).
    """

    alpha = 0.0
    blank_needs_predictor = True

    def __init__(self, model: TransducerModel):
        self.decoder = model.decoder
        self.joint = model.joint_network
        self.num_labels = model.vocab_size - 1
        self.device = self.joint.lin_out.weight.device

    @torch.no_grad()
    def frames(self, encoder_out: Tensor) -> RNNTFrames:
        """See :class:`TransducerScorer`."""
        residual = None
        if isinstance(self.joint, ResidualJoint):
            residual = self.joint.acoustic_output(encoder_out)
        return RNNTFrames(self.joint.lin_enc(encoder_out), residual)

    @torch.no_grad()
    def prefixes(self) -> RNNTPool:
        """See :class:`TransducerScorer`."""
        return RNNTPool(self)

    @torch.no_grad()
    def cells(self, frames, utterance, frame, pool, nodes, last, alpha) -> RNNTCells:
        """See :class:`TransducerScorer`; there is no LM inside the softmax for ``alpha``."""
        hidden = self.joint.joint_activation(frames.part[utterance, frame] + pool.parts(nodes))
        logits = self.joint.lin_out(hidden)
        if frames.residual is not None:
            logits = logits + frames.residual[utterance, frame]
        return RNNTCells(logits.float().log_softmax(dim=-1))


def rnn_step(
    layers: Sequence[torch.nn.RNNBase], step: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ESPnet's stack of one-layer LSTMs or GRUs.

    The cell functions instead of the layers': on a CPU an LSTM layer spends most of a single step
    on preparing its weights (0.15 ms instead of 0.03 for 192 units).

    Args:
        layers: ``decoder.decoder``.
        step: Input (M, H).
        hidden, cell: States (M, N, H); a GRU hands its cell through.

    Returns:
        Output (M, H) and the new states.
    """
    new_hidden, new_cell = [], []
    for n, layer in enumerate(layers):
        weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
        if isinstance(layer, torch.nn.LSTM):
            step, memory = torch.lstm_cell(step, (hidden[:, n], cell[:, n]), *weights)
        else:
            step, memory = torch.gru_cell(step, hidden[:, n], *weights), cell[:, n]
        new_hidden.append(step)
        new_cell.append(memory)
    return step, torch.stack(new_hidden, dim=1), torch.stack(new_cell, dim=1)
