"""Unweighted scores of hypotheses: under other alphas, and of the language models.

T frames, D encoder width, A alphas, N hypotheses, U labels of the longest, L labels.
"""

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from espnet_llm_plugin.transducer.nbest_scores import factorized_nbest_nll, sequence_blank_logits
from espnet_llm_plugin.transducer.predictors import as_history
from espnet_llm_plugin.transducer.prefix_tree import ROOT

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.delayed import Fusion
    from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
    from espnet_llm_plugin.transducer.prefix_tree import PrefixTree

# LM scores of hypotheses computed at once: hypotheses x positions x labels, 4 bytes each.
_LM_SCORES = 4_000_000


def prefixes_of(tree: "PrefixTree", labels: Sequence[int]) -> list[int]:
    """The nodes of the U + 1 prefixes of a label sequence, shortest (empty) first."""
    nodes = [ROOT]
    for label in labels:
        nodes.append(int(tree.children(np.array(nodes[-1:]), np.array([label]))[0]))
    return nodes


@torch.inference_mode()
def lm_log_probs(tree: "PrefixTree", hypotheses: Sequence[Sequence[int]]) -> list[float]:
    """The predictor's LM's log-prob of each label sequence; of an RNN-T its estimate."""
    ends = [prefixes_of(tree, labels)[-1] for labels in hypotheses]
    tree.need_predictor(np.array([tree.parent[end] for end in ends if end != ROOT], dtype=np.int64))
    return [tree.lm_sum(end) for end in ends]


@torch.inference_mode()
def external_lm_log_probs(
    tree: "PrefixTree", hypotheses: Sequence[Sequence[int]], fusion: Optional["Fusion"] = None
) -> list[float]:
    """The LM's log-prob of each label sequence, as a search with this ``fusion`` scores it."""
    ends = [prefixes_of(tree, labels)[-1] for labels in hypotheses]
    if fusion is not None:
        return fusion.lm_scores(tree, np.array(ends, dtype=np.int64)).tolist()
    tree.need_external(np.array([tree.parent[end] for end in ends if end != ROOT], dtype=np.int64))
    return [tree.external_sum(end) for end in ends]


@torch.inference_mode()
def prior_log_probs(
    tree: "PrefixTree", hypotheses: Sequence[Sequence[int]], fusion: "Fusion"
) -> list[float]:
    """The log prior of each label sequence, which a search subtracts."""
    ends = [prefixes_of(tree, labels)[-1] for labels in hypotheses]
    return fusion.prior_scores(tree, np.array(ends, dtype=np.int64)).tolist()


@torch.inference_mode()
def factorized_log_probs(
    decoder: "FactorizedTransducerDecoder",
    encoder_out: Tensor,
    hypotheses: Sequence[Sequence[int]],
    alphas: Sequence[float],
    tree: "PrefixTree",
) -> np.ndarray:
    """log P_alpha(hypothesis | speech) of a factorized transducer, all alignments summed.

    What a search reports as ``acoustic`` is the same without the alignments that it has pruned,
    at its own alpha.

    Args:
        decoder: Of the model.
        encoder_out: (T, D) of one utterance.
        hypotheses: N label sequences.
        alphas: LM scales inside the softmax.
        tree: Prefixes of a search with this decoder: the predictor runs for new ones only.

    Returns:
        (A, N), natural logarithms.
    """
    acoustic, acoustic_blank = decoder.acoustic(encoder_out[None])
    frame_lengths = torch.tensor([len(encoder_out)], device=encoder_out.device)
    longest = max(map(len, hypotheses), default=0)
    size = max(1, _LM_SCORES // ((longest + 1) * decoder.num_labels))
    columns = []
    for first in range(0, len(hypotheses), size):
        some = hypotheses[first : first + size]
        # 1. Labels, and the LM's scores after each of their prefixes.
        positions = max(map(len, some)) + 1
        nodes = np.full((len(some), positions), ROOT)
        labels = torch.zeros(1, len(some), positions - 1, dtype=torch.long)
        for row, sequence in enumerate(some):
            nodes[row, : len(sequence) + 1] = prefixes_of(tree, sequence)
            labels[0, row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            if decoder.blank_norm == "sigmoid":  # what follows the last label is not asked for
                nodes[row, len(sequence)] = ROOT
        tree.need_predictor(nodes.ravel())
        lm = tree.pool.lm(nodes.ravel()).unflatten(0, nodes.shape)[None]
        labels = labels.to(encoder_out.device)

        # 2. The lattices at each alpha.
        blank = sequence_blank_logits(decoder, encoder_out[None], as_history(labels)).float()
        lengths = torch.tensor([[len(sequence) for sequence in some]], device=encoder_out.device)
        nll = [
            factorized_nbest_nll(
                acoustic,
                lm,
                blank + acoustic_blank[:, :, None, None],
                labels,
                frame_lengths,
                lengths,
                lm_scale=alpha,
                blank_norm=decoder.blank_norm,
            )[0]
            for alpha in alphas
        ]
        columns.append(-torch.stack(nll).double().cpu().numpy())
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(alphas), 0))
