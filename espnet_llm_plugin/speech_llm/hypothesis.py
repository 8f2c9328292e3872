"""What a label-synchronous search is asked with and what it answers."""

from dataclasses import dataclass, field
from typing import ClassVar, Mapping

from espnet_llm_plugin.errors import UserError

DECODER, CTC, TEXT_LM, LM = "decoder", "ctc", "textlm", "lm"
END_DETECTION = ("espnet", "generate")


@dataclass(frozen=True)
class SearchWeights:
    """Weights of the parts of a score (ESPnet's names and meaning).

    ``total = (1 - ctc_weight) log p(tokens | audio) + ctc_weight log p_CTC(tokens)
    + textlm_weight log p(tokens) + lm_weight log p_LM(tokens) + penalty |tokens|``
    [Watanabe 2017, eq. 49; 2603.15045 sec. 2.4].

    Attributes:
        ctc_weight: Of the CTC prefix score; 1 leaves the audio out of the LLM.
        textlm_weight: Of the same LLM without audio; below 0 it is subtracted.
        lm_weight: Of an external LM.
        penalty: Added for every token, the end symbol included.
        length_norm: Hypotheses are ranked by ``total / |tokens|**length_norm``, the end symbol
            counted (transformers' ``length_penalty``).
    """

    AXES: ClassVar[tuple[str, ...]] = (
        "ctc_weight",
        "textlm_weight",
        "lm_weight",
        "penalty",
        "length_norm",
    )  # tuned

    ctc_weight: float = 0.0
    textlm_weight: float = 0.0
    lm_weight: float = 0.0
    penalty: float = 0.0
    length_norm: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ctc_weight <= 1.0:
            raise UserError(f"ctc_weight {self.ctc_weight}: expected a number from 0 to 1")
        if self.length_norm < 0.0:
            raise UserError(f"length_norm {self.length_norm}: expected 0 (off) or above")

    def by_scorer(self) -> dict[str, float]:
        """Weight of every scorer that has one."""
        weights = {
            DECODER: 1.0 - self.ctc_weight,
            CTC: self.ctc_weight,
            TEXT_LM: self.textlm_weight,
            LM: self.lm_weight,
        }
        return {name: weight for name, weight in weights.items() if weight != 0.0}

    @property
    def only_falls(self) -> bool:
        """Whether no total can grow with a further token, and totals rank the hypotheses."""
        return (
            self.penalty <= 0.0
            and self.length_norm == 0.0
            and min(self.textlm_weight, self.lm_weight) >= 0.0
        )


@dataclass(frozen=True)
class LabelHypothesis:
    """A token sequence of an utterance.

    Attributes:
        tokens: Token ids, without start and end symbol.
        total: Weighted sum of ``scores`` and the length bonus (natural log).
        ranking: What the n-best list is sorted by: ``total / (tokens and end)**length_norm``.
        scores: Unweighted log-probability by scorer: ``decoder``, ``ctc``, ``textlm``, ``lm``.
        bonus: ``penalty`` times the number of tokens and end symbols.
        ended: Whether the end symbol was found; False at the length limit, where the scores
            have no part of it.
    """

    tokens: tuple[int, ...]
    total: float
    ranking: float
    scores: Mapping[str, float] = field(default_factory=dict)
    bonus: float = 0.0
    ended: bool = True

    def parts(self) -> dict[str, object]:
        """The scores as ``nbest.jsonl`` has them."""
        return {
            "total": self.total,
            "ranking": self.ranking,
            **self.scores,
            "bonus": self.bonus,
            "ended": self.ended,
        }
