"""Auxiliary transducer on the encoder, the adapter, or the LLM's outputs at the audio.

B utterances, T frames, E width, N rows still decoded.

[Speech Prefix-Tuning with RNNT Loss, arXiv 2406.14701]
"""

import torch
from torch import Tensor

from espnet_llm_plugin.speech_llm.heads.abs_head import LabelHead, LabelLoss
from espnet_llm_plugin.speech_llm.heads.history import build_history
from espnet_llm_plugin.speech_llm.heads.joints import build_joint
from espnet_llm_plugin.speech_llm.heads.vocabulary import LabelVocabulary

# Labels that greedy decoding may write at one frame.
_MAX_LABELS_PER_FRAME = 10


class RNNTHead(torch.nn.Module, LabelHead):
    """A transducer over a :class:`LabelVocabulary`.

    Other than CTC it can have more labels than frames, which a prefix of long frames needs.

    Args:
        vocabulary: The labels.
        width: E.
        predictor: ``stateless`` or ``lstm``.
        predictor_dim: Its width.
        joint: ``dense``, for vocabularies of some thousands, or ``factorized``, for an LLM's.
        joint_dim: Its width.
    """

    def __init__(
        self,
        vocabulary: LabelVocabulary,
        width: int,
        predictor: str = "stateless",
        predictor_dim: int = 256,
        joint: str = "dense",
        joint_dim: int = 512,
    ):
        super().__init__()
        self.vocabulary = vocabulary
        self.predictor = build_history(predictor, vocabulary.size, predictor_dim)
        self.joint = build_joint(joint, vocabulary.size, width, predictor_dim, joint_dim)

    def loss(self, hs_pad: Tensor, hlens: Tensor, text: Tensor, lengths: Tensor) -> LabelLoss:
        labels, counts = self.vocabulary.targets(text, lengths)
        fits = hlens.to(counts.device) > 0
        nll = self.joint.nll(
            self._frames(hs_pad), hlens.clamp(min=1), self.predictor(labels), labels, counts
        )
        return LabelLoss(nll.masked_fill(~fits, 0.0), counts.masked_fill(~fits, 0), fits)

    @torch.no_grad()
    def greedy(self, hs_pad: Tensor, hlens: Tensor) -> list[list[int]]:
        frames, lengths = self._frames(hs_pad), hlens.to(hs_pad.device)
        found: list[list[int]] = [[] for _ in range(len(frames))]
        features, state = self.predictor.start(len(frames))
        at = torch.zeros_like(lengths)  # frame of each utterance
        here = torch.zeros_like(lengths)  # labels written at it
        rows = (lengths > 0).nonzero().squeeze(1)
        while len(rows):
            best = self.joint.scores(frames[rows, at[rows]], features[rows]).argmax(dim=1)
            best = best.masked_fill(here[rows] >= _MAX_LABELS_PER_FRAME, 0)
            is_label = best > 0
            writes = rows[is_label]
            if len(writes):
                labels = best[is_label]
                features[writes], state[writes] = self.predictor.step(labels, state[writes])
                for row, label in zip(writes.tolist(), labels.tolist()):
                    found[row].append(label)
            at[rows] += ~is_label
            here[rows] = (here[rows] + 1) * is_label
            rows = rows[at[rows] < lengths[rows]]
        return found

    def _frames(self, hs_pad: Tensor) -> Tensor:
        # an LLM in half precision has such outputs; under autocast this changes nothing
        return hs_pad.to(self.predictor.embed.weight.dtype)
