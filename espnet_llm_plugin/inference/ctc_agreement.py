"""Does the CTC layer of a speech LLM hear what transcripts and hypotheses say?

T frames, E encoder width, U tokens, L labels of the CTC.

CTC cannot invent: a hypothesis that it finds much less likely than the transcript was not heard.
"""

import math
from typing import NamedTuple, Optional, Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from espnet_llm_plugin.scoring.audio_use import CONTRADICTION, CTCAgreement
from espnet_llm_plugin.speech_llm.heads.ctc import VocabularyCTC
from espnet_llm_plugin.speech_llm.units import LabelUnits


class Likelihood(NamedTuple):
    """Of a text: log-probability (nats; minus infinity if the frames are too few) and labels."""

    log_prob: float
    labels: int


def text_likelihood(ctc: VocabularyCTC, encoder_out: Tensor, tokens: Sequence[int]) -> Likelihood:
    """log P_CTC of token ids (U) given encoder outputs (T, E)."""
    text = torch.tensor([list(tokens)], dtype=torch.long, device=encoder_out.device)
    lengths = torch.tensor([len(tokens)], device=encoder_out.device)
    _, counts = ctc.vocabulary.targets(text, lengths)
    frames = torch.tensor([len(encoder_out)], device=encoder_out.device)
    loss = ctc.loss(encoder_out[None], frames, text, lengths)
    log_prob = -float(loss.nll) if bool(loss.fits) else -math.inf
    return Likelihood(log_prob, int(counts))


def greedy_text(ctc: VocabularyCTC, encoder_out: Tensor) -> str:
    """Text of the best path through encoder outputs (T, E)."""
    path = ctc.label_log_probs(encoder_out[None])[0].argmax(dim=-1)
    labels = path.unique_consecutive()
    return ctc.vocabulary.text(labels[labels > 0].tolist())


def loss_per_label(transcript: Likelihood, hypothesis: Likelihood) -> float:
    """Nats by which the hypothesis is less likely, per label of the transcript."""
    return (transcript.log_prob - hypothesis.log_prob) / max(transcript.labels, 1)


class AgreementSums:
    """Collects utterances.

    Args:
        ctc: The CTC layer, in evaluation mode.
        units: Of the token ids.
    """

    def __init__(self, ctc: VocabularyCTC, units: LabelUnits):
        self.ctc, self.units = ctc, units
        self._log_prob, self._labels, self._impossible = 0.0, 0, 0
        self._words, self._greedy, self._wrong, self._apart = 0, 0, 0, 0
        self._losses: list[float] = []
        self._has_hypotheses = False

    def add(
        self, encoder_out: Tensor, text: Sequence[int], hypothesis: Optional[Sequence[int]]
    ) -> Optional[float]:
        """Add an utterance.

        Args:
            encoder_out: (T, E).
            text: Its transcript (U).
            hypothesis: Token ids, if there are hypotheses.

        Returns:
            :func:`loss_per_label` of the hypothesis, infinite if it has more labels than frames;
            None without hypothesis, or if the transcript has.
        """
        transcript = text_likelihood(self.ctc, encoder_out, text)
        words = self.units.decode(text).split()
        greedy = greedy_text(self.ctc, encoder_out).split()
        self._words += len(words)
        self._greedy += Levenshtein.distance(words, greedy)
        possible = math.isfinite(transcript.log_prob)
        if possible:
            self._log_prob += transcript.log_prob
            self._labels += transcript.labels
        else:
            self._impossible += 1
        if hypothesis is None:
            return None
        self._has_hypotheses = True
        found = self.units.decode(hypothesis).split()
        self._wrong += Levenshtein.distance(words, found)
        self._apart += Levenshtein.distance(greedy, found)
        if not possible:
            return None
        loss = loss_per_label(transcript, text_likelihood(self.ctc, encoder_out, hypothesis))
        self._losses.append(loss)
        return loss

    def report(self) -> CTCAgreement:
        """Over all utterances."""

        def percent(errors: int) -> float:
            return 100 * errors / max(self._words, 1)

        found = {}
        if self._has_hypotheses:
            found = {
                "hypothesis_wer": percent(self._wrong),
                "disagreement": percent(self._apart),
            }
        if self._losses:
            contradicted = sum(loss >= CONTRADICTION for loss in self._losses)
            found["contradicted"] = contradicted / len(self._losses)
        return CTCAgreement(
            self._log_prob / self._labels if self._labels else None,
            self._impossible,
            percent(self._greedy),
            **found,
        )
