"""The best alignment of a transcript, what the blank does on it, and the internal LM's opinion.

B utterances, T frames, U labels, V tokens, L labels of the factorized transducer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from espnet_llm_plugin.transducer.base_model import AbsTransducerModel, Lattice
from espnet_llm_plugin.transducer.loss import factorized_lattice
from espnet_llm_plugin.transducer.model import FactorizedTransducerModel

# Stands for minus infinity in sums that are subtracted from each other.
_LOG_ZERO = -1e5
_TINY = 1e-12


class Transitions(NamedTuple):
    """A batch's lattice at the model's training scale, and the LM's log-probs; nats."""

    blank: Tensor  # (B, T, U+1) log P(blank | t, u)
    label: Tensor  # (B, T, U+1) log P(label u+1 | t, u), -inf where no label is left
    lm: Tensor  # (B,) log P(text) of the predictor, or of the estimate of an RNN-T's internal LM


@torch.no_grad()
def transitions(model: AbsTransducerModel, batch: Lattice) -> Transitions:
    """Log-probabilities of the transitions of the transcripts' lattices.

    An RNN-T's internal LM is the labels' softmax where the encoder's part of the joint network is
    zero [arXiv 2011.01991], as the search estimates it.
    """
    inside = torch.arange(batch.text.shape[1], device=batch.text.device)
    inside = inside < batch.text_lengths[:, None]  # (B, U)
    labels = batch.text - 1
    if isinstance(model, FactorizedTransducerModel):
        decoder = model.decoder
        factors = decoder(batch.encoder_out, batch.frame_lengths, labels, batch.text_lengths)
        blank, label = factorized_lattice(
            *factors,
            labels,
            batch.frame_lengths,
            batch.text_lengths,
            lm_scale=decoder.lm_scale,
            blank_norm=decoder.blank_norm,
        )
        lm = factors.lm_log_probs
    else:
        model.decoder.set_device(batch.encoder_out.device)
        history = torch.nn.functional.pad(batch.text, (1, 0), value=model.blank_id)
        decoder_out = model.decoder(history)  # (B, U+1, Dd)
        joint = model.joint_network
        logits = joint(batch.encoder_out.unsqueeze(2), decoder_out.unsqueeze(1))
        log_probs = logits.float().log_softmax(dim=-1)  # (B, T, U+1, V)
        blank = log_probs[..., model.blank_id]
        index = batch.text[:, None, :, None].expand(-1, log_probs.shape[1], -1, -1)
        label = log_probs[:, :, :-1].gather(-1, index).squeeze(-1)
        label = label.masked_fill(~inside[:, None], -torch.inf)
        label = torch.nn.functional.pad(label, (0, 1), value=-torch.inf)
        lm = joint.lin_out(joint.joint_activation(joint.lin_dec(decoder_out)))
        lm = lm[..., 1:].float().log_softmax(dim=-1)  # labels are the tokens 1..V-1
    chosen = lm[:, :-1].gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return Transitions(blank, label, chosen.masked_fill(~inside, 0.0).sum(dim=1))


def best_alignment(blank: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The frames at which the most probable alignment emits the labels.

    An alignment goes from (0, 0) to (T, U), by a blank to the next frame and by a label to the
    next position.

    Args:
        blank: log P(blank | t, u) (T, U+1).
        label: log P(label u+1 | t, u) (T, U).

    Returns:
        (U,) frames, not decreasing; of equally probable alignments one that emits early.
    """
    num_frames, num_labels = label.shape
    arrived = np.full(num_labels + 1, _LOG_ZERO * num_frames * (num_labels + 1))
    arrived[0] = 0.0
    source = np.empty((num_frames, num_labels + 1), dtype=np.int64)
    places = np.arange(num_labels + 1)
    for t in range(num_frames):
        # In a frame: from position k by labels to u >= k costs climbed[u] - climbed[k].
        climbed = np.concatenate([[0.0], np.maximum(label[t], _LOG_ZERO).cumsum()])
        start = arrived - climbed
        best = np.maximum.accumulate(start)
        source[t] = np.maximum.accumulate(np.where(start == best, places, 0))
        arrived = best + climbed + np.maximum(blank[t], _LOG_ZERO)
    frames = np.empty(num_labels, dtype=np.int64)
    position = num_labels
    for t in range(num_frames - 1, -1, -1):
        frames[source[t, position] : position] = t
        position = source[t, position]
    return frames


@dataclass
class AlignmentSums:
    """Sums over the best alignments of a corpus.

    Attributes:
        labels: Labels emitted.
        blank_at_labels: Sum of P(blank) in the cells where they are emitted.
        label_log_prob: Sum of log P(label | not blank) there, nats.
        other_frames: Frames in which no label is emitted.
        blank_elsewhere: Sum of P(blank) in these.
        lm_log_prob: Sum of the internal LM's log P(text), nats.
        words: Of the texts.
    """

    labels: int = 0
    blank_at_labels: float = 0.0
    label_log_prob: float = 0.0
    other_frames: int = 0
    blank_elsewhere: float = 0.0
    lm_log_prob: float = 0.0
    words: int = 0

    def add(self, blank: np.ndarray, label: np.ndarray, lm: float, words: int) -> None:
        """Count an utterance.

        Args:
            blank: log P(blank | t, u) (T, U+1).
            label: log P(label u+1 | t, u) (T, U).
            lm: The internal LM's log P(text).
            words: Of the text.
        """
        frames = best_alignment(blank, label)
        positions = np.arange(len(frames))
        at_labels = np.exp(blank[frames, positions])
        not_blank = np.log(np.maximum(1.0 - at_labels, _TINY))
        self.labels += len(frames)
        self.blank_at_labels += float(at_labels.sum())
        self.label_log_prob += float((label[frames, positions] - not_blank).sum())
        others = np.setdiff1d(np.arange(len(blank)), frames)
        emitted = np.searchsorted(frames, others)  # labels before each of these frames
        self.other_frames += len(others)
        self.blank_elsewhere += float(np.exp(blank[others, emitted]).sum())
        self.lm_log_prob += lm
        self.words += words

    def report(self) -> dict[str, dict]:
        """Means, as ``nll.json`` has them; what nothing was counted for is None."""

        def mean(total: float, number: int):
            return total / number if number else None

        perplexity = None
        if self.words:
            perplexity = float(np.exp(min(700.0, -self.lm_log_prob / self.words)))
        return {
            "alignment": {
                "blank_at_labels": mean(self.blank_at_labels, self.labels),
                "blank_elsewhere": mean(self.blank_elsewhere, self.other_frames),
                "label_log_prob": mean(self.label_log_prob, self.labels),
                "other_frames": self.other_frames,
            },
            "internal_lm": {"word_perplexity": perplexity, "words": self.words},
        }
