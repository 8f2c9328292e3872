"""What a search is asked with and what it answers: scales, hypotheses."""

from dataclasses import dataclass, replace
from typing import ClassVar, Optional


class SearchError(RuntimeError):
    """The scores of an utterance are not numbers."""


@dataclass(frozen=True)
class Scales:
    """Weights of the parts of a score.

    The score of a label is ``log P(label) + beta * lm + lm_weight * external_lm + label_bonus``,
    that of a blank ``blank_scale * log P(blank)``.

    Attributes:
        alpha: Scale of the predictor's LM inside the label softmax; ``None`` leaves the model's.
        beta: Scale of the predictor's LM outside of it; negative values subtract the internal LM.
        lm_weight: Scale of the external LM.
        label_bonus: Added to every label.
        blank_scale: Factor of the blank's log-probability; below 1 it favours long hypotheses.
        prior_weight: Scale of the prior, which is subtracted (CTC).
    """

    # what is tuned
    AXES: ClassVar[tuple[str, ...]] = ("alpha", "beta", "lm_weight", "label_bonus", "prior_weight")

    alpha: Optional[float] = None
    beta: float = 0.0
    lm_weight: float = 0.0
    label_bonus: float = 0.0
    blank_scale: float = 1.0
    prior_weight: float = 0.0


def without_late(scales: Scales) -> Scales:
    """What is left of scales at the labels if an LM comes delayed.

    The LM takes with it what balances it: the prior, the subtraction of an internal LM, and the
    bonus, unless that balances a predictor's LM, which is there at once.
    """
    bonus = scales.label_bonus if scales.beta > 0 or not scales.lm_weight else 0.0
    beta = max(scales.beta, 0.0)
    return replace(scales, beta=beta, lm_weight=0.0, label_bonus=bonus, prior_weight=0.0)


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence; its score ``total`` is the sum of the parts, which are weighted.

    Attributes:
        labels: Labels in [0, L); token id = label + 1.
        total: Score of the search (natural log).
        acoustic: Log of the sum over the alignments, without the additive LM scores, the bonus and
            the prior of labels. A prior of frames is in it.
        lm: ``beta`` times the predictor's LM log-prob of the sequence.
        external_lm: ``lm_weight`` times the external LM's, with the end of the sentence where the
            search asks for it.
        bonus: ``label_bonus`` times the number of labels.
        frames: Encoder frame at which the best alignment emits each label.
        blank: Score of the blanks of the best alignment, a part of ``acoustic``; ``None`` where
            the search does not tell it (CTC).
        prior: ``-prior_weight`` times the log prior of the labels.
    """

    labels: tuple[int, ...]
    total: float
    acoustic: float
    lm: float
    external_lm: float
    bonus: float
    frames: tuple[int, ...]
    blank: Optional[float] = None
    prior: float = 0.0

    def parts(self) -> dict[str, object]:
        """The scores as ``nbest.jsonl`` has them."""
        return {
            "total": self.total,
            "acoustic": self.acoustic,
            "lm": self.lm,
            "external_lm": self.external_lm,
            "bonus": self.bonus,
            "prior": self.prior,
            "blank": self.blank,
            "frames": list(self.frames),
        }

    @property
    def normalized(self) -> float:
        """Total per symbol; the end counts as one, as in ESPnet's transducer search."""
        return self.total / (len(self.labels) + 1)
