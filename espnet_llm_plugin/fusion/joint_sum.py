"""The weighed sum of an attention decoder, CTC, a language model and the internal LM.

    (1 - ctc_weight) log P_AED + ctc_weight log P_CTC + lm_weight log P_LM - ilm_weight log P_ILM
    + penalty |tokens|

with ESPnet's names, whose search it is (``BatchBeamSearch``). [Watanabe 2017, eq. 49; internal LM:
arXiv 2011.01991]
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Sequence

from espnet_llm_plugin.errors import UserError

# A scorer that ESPnet asks although it weighs nothing, so that its scores are known: what ESPnet
# takes for log 0, -1e10, stays far below the precision of a score.
NOTHING = 1e-30


@dataclass(frozen=True)
class JointWeights:
    """Weights of the sum above."""

    AXES: ClassVar[tuple[str, ...]] = ("ctc_weight", "lm_weight", "ilm_weight", "penalty")

    ctc_weight: float = 0.3
    lm_weight: float = 0.0
    ilm_weight: float = 0.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ctc_weight < 1.0:
            raise UserError(
                f"ctc_weight {self.ctc_weight}: expected a number from 0 to below 1, what is left "
                "is the attention decoder's"
            )

    def by_scorer(self) -> dict[str, float]:
        """What ESPnet's scorers are multiplied by."""
        return {
            "decoder": 1.0 - self.ctc_weight,
            "ctc": self.ctc_weight,
            "lm": self.lm_weight,
            "ilm": -self.ilm_weight,
            "length_bonus": self.penalty,
        }

    def in_search(self) -> dict[str, float]:
        """The same, without zeros: ESPnet would leave these scorers out."""
        return {name: weight or NOTHING for name, weight in self.by_scorer().items()}

    def vector(self) -> list[float]:
        """Factors of a candidate's :meth:`JointCandidate.parts`."""
        return list(self.by_scorer().values())


@dataclass(frozen=True)
class JointCandidate:
    """A hypothesis with what the sum is made of (not weighed, natural logarithms).

    Attributes:
        text: Its words.
        decoder: Of the attention decoder.
        ctc: Of CTC.
        lm: Of the language model.
        ilm: Of the internal LM.
        length_bonus: Number of tokens, the end included.
        score: What is not weighed.
    """

    text: str
    decoder: float = 0.0
    ctc: float = 0.0
    lm: float = 0.0
    ilm: float = 0.0
    length_bonus: float = 0.0
    score: float = 0.0

    def parts(self) -> list[float]:
        """What :meth:`JointWeights.vector` weighs."""
        return [self.decoder, self.ctc, self.lm, self.ilm, self.length_bonus]


def joint_grid(
    ctc_weights: Sequence[float],
    lm_weights: Sequence[float],
    ilm_weights: Sequence[float],
    penalties: Sequence[float],
) -> list[JointWeights]:
    """Every combination, without repetitions."""
    axes = map(dict.fromkeys, (ctc_weights, lm_weights, ilm_weights, penalties))
    return [JointWeights(*weights) for weights in itertools.product(*axes)]


def first_points(grid: Sequence[JointWeights]) -> list[JointWeights]:
    """Points whose searches find hypotheses that are plausible at most others of the grid.

    The middle, and the same with the least of the language models: if the LM of the middle makes
    the search lose its way, there are still lists to go on from.
    """

    values = {axis: sorted({getattr(w, axis) for w in grid}) for axis in JointWeights.AXES}
    middle = {axis: each[len(each) // 2] for axis, each in values.items()}
    least = {axis: values[axis][0] for axis in ("lm_weight", "ilm_weight")}
    return list(dict.fromkeys([JointWeights(**middle), JointWeights(**{**middle, **least})]))
