"""Where a stream is cut into segments: Kaldi's endpoint rules on the search's own silence.

Silence is what the best hypothesis has passed with blanks alone: the time since its best alignment
emitted its last label. There is no voice activity detector besides.
"""

from dataclasses import dataclass
from typing import Iterable

from espnet_llm_plugin.errors import UserError

# Times are multiples of a frame, in floating point (seconds).
ROUNDING = 1e-6


@dataclass(frozen=True)
class EndpointRule:
    """A segment ends if all conditions hold [Kaldi, online2/online-endpoint.h].

    Attributes:
        must_contain_nonsilence: At least one label has been emitted in it.
        min_trailing_silence: Seconds since the last label, or the beginning if there is none.
        min_utterance_length: Seconds since the segment began.
    """

    must_contain_nonsilence: bool = True
    min_trailing_silence: float = 0.0
    min_utterance_length: float = 0.0

    def fires(self, silence: float, length: float, nonsilence: bool) -> bool:
        """Whether the rule ends a segment of this trailing silence and length (seconds)."""
        return (
            (nonsilence or not self.must_contain_nonsilence)
            and silence > self.min_trailing_silence - ROUNDING
            and length > self.min_utterance_length - ROUNDING
        )


def endpoint_rules(
    silence: float = 2.4,
    silence_after_speech: float = 1.2,
    max_length: float = 20.0,
    min_length: float = 0.0,
) -> tuple[EndpointRule, ...]:
    """The three usual rules, in seconds; any of them ends a segment. ``inf`` switches one off.

    Args:
        silence: Silence that ends a segment without a label; it is dropped.
        silence_after_speech: Silence that ends a segment with labels.
        max_length: Length at which a segment ends, wherever that is: within a word, perhaps.
        min_length: No segment ends by silence before.

    Raises:
        UserError: Not positive, or a minimum that is not below the maximum.
    """
    if min(silence, silence_after_speech, max_length) <= 0 or min_length < 0:
        raise UserError(
            f"endpoint rules of {silence} s, {silence_after_speech} s, {max_length} s and "
            f"{min_length} s: silences and the maximum length must be above 0, the minimum length "
            "at least 0"
        )
    if min_length >= max_length:
        raise UserError(
            f"endpoint rules: the minimum length ({min_length} s) must be below the maximum length "
            f"({max_length} s)"
        )
    return (
        EndpointRule(False, silence, min_length),
        EndpointRule(True, silence_after_speech, min_length),
        EndpointRule(False, 0.0, max_length),
    )


def is_endpoint(
    rules: Iterable[EndpointRule], silence: float, length: float, nonsilence: bool
) -> bool:
    """Whether one of the rules fires."""
    return any(rule.fires(silence, length, nonsilence) for rule in rules)
