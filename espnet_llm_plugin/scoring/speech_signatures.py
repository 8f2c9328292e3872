"""Which failure signatures of a speech LLM an experiment shows.

The signatures are those of arXiv 2603.15045 (the LLM ignores the audio, oscillations and inserted
text, joint decoding that hides what the LLM alone does, wide beams with length normalisation), of
arXiv 2307.11795 (embeddings that are not aligned, a stride that is too large) and of arXiv
2406.14701 (a transducer on the prefix recognises what the LLM does not). What takes a
series of experiments (rank, share of masked tokens, auxiliary losses) is not among them: compare
their rows in a results table. The thresholds are constants below, this package's: where they come
from its own experiments is said there, the others are set where a healthy system is far away.
"""

import math
from dataclasses import dataclass, field
from typing import Mapping, Optional

from espnet_llm_plugin.scoring import hallucination as signs
from espnet_llm_plugin.scoring.audio_use import CONTRADICTION, AudioUse
from espnet_llm_plugin.scoring.bootstrap import Difference
from espnet_llm_plugin.scoring.hallucination import Hallucination
from espnet_llm_plugin.scoring.scored_set import ScoredSet
from espnet_llm_plugin.scoring.signatures import (
    Evidence,
    Finding,
    finding,
    grid,
    lost_ends,
    overfits,
)

# Nats per token that the right audio is worth. On the stories corpus an LLM that wrote text of its
# own (WER 81) had 0.03 to 0.4, those that listened 2.2 to 2.6.
MIN_GAP, FULL_GAP = 0.3, 2.0
MIN_ATTENTION = 0.02  # of the layer that gives the audio most
MIN_GATE = 0.01  # of the widest gate: below, nothing of the audio is let in
MAX_CONTRADICTED = 0.05  # share of hypotheses that CTC finds much less likely than the transcript
MAX_CTC_WER = 50.0  # of greedy CTC: one that recognises less is no witness
# For comparison a CTC model on stories (1,600 utterances, WER 24): 0.002 new loops, 0.12 of the
# insertions in the worst 1 % (0.16 per word), 0.007 odd lengths.
MAX_NEW_LOOPS = 0.01  # share of utterances
MIN_WORST_SHARE = 0.3  # of all insertions, in the worst 1 % of the utterances,
MIN_WORST_RATE = 0.5  # which insert so many words per reference word
MIN_UTTERANCES = 100  # of which 1 % is one
# Share of utterances; 0.33 of the LLM that wrote text of its own, 0.045 of one that listened (both
# with short utterances that are less than MIN_WORDS_OFF words off).
MAX_ODD_LENGTHS = 0.05
MIN_HIDDEN = 1.2  # WER of the LLM alone over that of joint decoding
MAX_BEAM_LOSS = 0.2  # per cent absolute, by a wider beam
MIN_UNREAD = 1.5  # WER of the LLM, greedy and alone, over that of the best head on its prefix
MIN_ORDER = 0.2  # rank correlation in the own audio, less that in another's
MAX_CROWDED = 0.05  # share of utterances with more tokens than audio embeddings


@dataclass(frozen=True)
class SpeechEvidence(Evidence):
    """What was measured of a speech LLM; None where it was not.

    Attributes:
        hallucination: Of the set that the findings are about.
        audio: From ``bin/evaluate_audio_use``.
        alone: The same set decoded by the LLM alone.
        joint: WER of the LLM alone, and of this decoding (paired, the LLM alone first).
        wider: WER of this decoding, and with a wider beam (paired, this one first).
        greedy: WER by name (``llm`` and auxiliary losses), decoded greedily in the validation after
            the last epoch.
    """

    hallucination: Optional[Hallucination] = None
    audio: Optional[AudioUse] = None
    alone: Optional[ScoredSet] = None
    joint: Optional[Difference] = None
    wider: Optional[Difference] = None
    greedy: Mapping[str, float] = field(default_factory=dict)


def greedy_rates(statistics: Mapping[str, float]) -> dict[str, float]:
    """What ``SpeechEvidence.greedy`` has, of the statistics of a validation."""
    return {
        name.removeprefix("wer_"): value
        for name, value in statistics.items()
        if name.startswith("wer_") and math.isfinite(value)
    }


def findings(evidence: SpeechEvidence) -> list[Finding]:
    """A finding for every signature."""
    rules = (ignores_audio, contradicts_ctc, loops, few_utterances, odd_lengths, lost_ends)
    rules += (hidden_errors, wide_beam, unread_prefix, not_aligned, large_stride)
    return [*(rule(evidence) for rule in rules), overfits(evidence, "overfitting"), grid(evidence)]


def ignores_audio(e: SpeechEvidence) -> Finding:
    """The LLM writes text that is likely, whatever was said."""
    rule = (
        f"another utterance's audio costs less than {MIN_GAP} nats per token, or no layer gives "
        f"the audio {100 * MIN_ATTENTION:g} % of its attention, or no gate is open by {MIN_GATE}"
    )
    name, audio = "LLM ignores the audio", e.audio
    if audio is None:
        return finding(name, None, "The use of the audio was not measured.", rule)
    parts, verdicts = [], []
    if audio.gap is not None:
        verdicts.append(audio.gap < MIN_GAP)
        parts.append(
            f"The transcripts cost {audio.nll:.2f} nats per token with their own audio and "
            f"{audio.gap:.2f} more with another's; above {FULL_GAP:g} the LLM relies on the audio."
        )
    if audio.attention:
        verdicts.append(max(audio.attention) < MIN_ATTENTION)
        parts.append(
            f"The audio gets {100 * min(audio.attention):.0f} to {100 * max(audio.attention):.0f} "
            f"% of a layer's attention; {100 * audio.uniform_attention:.0f} % if all positions "
            "were equal."
        )
    if audio.gates:
        widest = max(map(abs, audio.gates))
        verdicts.append(widest < MIN_GATE)
        parts.append(f"The widest gate is open by {widest:.2f}.")
    if not verdicts:
        return finding(name, None, "A single utterance was measured.", rule)
    return finding(name, any(verdicts), " ".join(parts), rule)


def contradicts_ctc(e: SpeechEvidence) -> Finding:
    """The hypotheses say what the CTC layer, which cannot invent, did not hear."""
    rule = (
        f"CTC finds more than {100 * MAX_CONTRADICTED:g} % of the hypotheses less likely than "
        f"their transcripts by {CONTRADICTION:g} nats per label or more (its own WER being at most "
        f"{MAX_CTC_WER:g})"
    )
    name = "hypotheses without support in the audio"
    ctc = None if e.audio is None else e.audio.ctc
    if ctc is None or ctc.contradicted is None:
        return finding(name, None, "CTC and hypotheses were not compared.", rule)
    trusted = ctc.greedy_wer <= MAX_CTC_WER
    return finding(
        name,
        ctc.contradicted > MAX_CONTRADICTED if trusted else None,
        f"CTC contradicts {100 * ctc.contradicted:.1f} % of the hypotheses. The WER is "
        f"{ctc.greedy_wer:.2f} of greedy CTC, {ctc.hypothesis_wer:.2f} of the hypotheses, and "
        f"{ctc.disagreement:.2f} between the two.",
        rule,
    )


def loops(e: SpeechEvidence) -> Finding:
    """Hypotheses repeat a phrase until they are stopped."""
    rule = (
        f"more than {100 * MAX_NEW_LOOPS:g} % of the hypotheses say 1 to {signs.MAX_PERIOD} words "
        f"{signs.MIN_COPIES} times or more in a row, beyond what the reference does"
    )
    name, found = "loops", e.hallucination
    if found is None:
        return finding(name, None, _score_again(), rule)
    statement = (
        f"{100 * found.loops:.1f} % of the hypotheses and {100 * found.reference_loops:.1f} % of "
        f"the references have loops; {100 * found.new_loops:.1f} % of the hypotheses more of them "
        "than their reference."
    )
    shows = found.new_loops > MAX_NEW_LOOPS
    if shows:
        statement += " A repetition guard (--max_repeats) or a CTC weight stops them."
    return finding(name, shows, statement, rule)


def few_utterances(e: SpeechEvidence) -> Finding:
    """A few utterances, in which the LLM went on by itself, hold the insertions."""
    rule = (
        f"the worst 1 % of the utterances hold {100 * MIN_WORST_SHARE:g} % of the insertions or "
        f"more, and insert {MIN_WORST_RATE:g} words per reference word or more"
    )
    name, found = "insertions in few utterances", e.hallucination
    if found is None:
        return finding(name, None, _score_again(), rule)
    if found.utterances < MIN_UTTERANCES:
        return finding(name, None, f"There are less than {MIN_UTTERANCES} utterances.", rule)
    if found.worst_insertions is None:
        return finding(name, False, "Nothing is inserted.", rule)
    return finding(
        name,
        found.worst_insertions >= MIN_WORST_SHARE and found.worst_rate >= MIN_WORST_RATE,
        f"The worst {found.worst} of {found.utterances} utterances hold "
        f"{100 * found.worst_insertions:.0f} % of the insertions, {found.worst_rate:.2f} per word "
        "of their references.",
        rule,
    )


def odd_lengths(e: SpeechEvidence) -> Finding:
    """Hypotheses end early, or go on after the audio has ended."""
    rule = (
        f"more than {100 * MAX_ODD_LENGTHS:g} % of the hypotheses have more than {signs.LONG} or "
        f"less than {signs.SHORT} times the reference's words, and differ from it by "
        f"{signs.MIN_WORDS_OFF} words at least"
    )
    name, found = "lengths out of proportion", e.hallucination
    if found is None:
        return finding(name, None, _score_again(), rule)
    shows = found.too_long + found.too_short > MAX_ODD_LENGTHS
    statement = (
        f"{100 * found.too_long:.1f} % of the hypotheses are too long, {100 * found.too_short:.1f} "
        "% too short."
    )
    if shows and found.too_short > found.too_long:
        statement += " A larger --penalty or --length_norm, or a CTC weight, helps against the end."
    return finding(name, shows, statement, rule)


def hidden_errors(e: SpeechEvidence) -> Finding:
    """Joint decoding with CTC makes up for an LLM that does not recognise much."""
    rule = (
        f"WER of the LLM alone is {MIN_HIDDEN:g} times that of joint decoding or more, and the "
        "95 % interval of the paired difference is above 0"
    )
    name = "joint decoding hides the LLM's errors"
    if e.joint is None:
        return finding(name, None, "The LLM was not decoded alone.", rule)
    return finding(
        name,
        e.joint.low > 0 and e.joint.first >= MIN_HIDDEN * e.joint.second,
        f"WER {e.joint.first:.2f} alone, {e.joint.second:.2f} jointly: {-e.joint.difference:+.2f} "
        f"(95 % {-e.joint.high:+.2f} to {-e.joint.low:+.2f}).",
        rule,
    )


def wide_beam(e: SpeechEvidence) -> Finding:
    """A wider beam finds hypotheses of better score that are worse."""
    rule = f"WER with the wider beam is higher by more than {MAX_BEAM_LOSS:g}"
    name = "collapse at a large beam"
    if e.wider is None:
        return finding(name, None, "A wider beam was not tried.", rule)
    statement = f"WER {e.wider.first:.2f}, {e.wider.second:.2f} with the wider beam."
    return finding(name, -e.wider.difference > MAX_BEAM_LOSS, statement, rule)


def unread_prefix(e: SpeechEvidence) -> Finding:
    """An auxiliary loss can read the text off the prefix, the LLM cannot."""
    rule = (
        f"greedy WER of the LLM alone is {MIN_UNREAD:g} times that of the best auxiliary loss or "
        f"more, in the validation during training (that being at most {MAX_CTC_WER:g})"
    )
    name = "prefix good, LLM not"
    rates = dict(e.greedy)
    llm = rates.pop("llm", None)
    if llm is None or not rates:
        return finding(
            name,
            None,
            "No auxiliary loss was decoded beside the LLM in training (report_wer_utts).",
            rule,
        )
    # what listens to the encoder says nothing of the prefix: for want of others only
    on_prefix = {n: rate for n, rate in rates.items() if n != "ctc" and not n.startswith("encoder")}
    best, rate = min((on_prefix or rates).items(), key=lambda item: item[1])
    shows = rate <= MAX_CTC_WER and llm >= MIN_UNREAD * rate
    statement = f"Greedy WER {llm:.1f} by the LLM, {rate:.1f} by {best}."
    if shows and on_prefix:
        statement += " The prefix has the text; the LLM (its size, tuning, prompt) cannot read it."
    elif shows:
        statement += " The encoder has the text; adapter or LLM lose it."
    elif rate > MAX_CTC_WER and llm > MAX_CTC_WER:
        statement += " Neither reads the prefix: look at encoder and adapter."
    return finding(name, shows, statement, rule)


def not_aligned(e: SpeechEvidence) -> Finding:
    """Audio embeddings do not look like the text's, in the order of the text."""
    rule = (
        "the rank correlation of tokens and most similar audio positions exceeds that with another "
        f"utterance's audio by less than {MIN_ORDER:g}"
    )
    name = "embeddings not aligned"
    found = None if e.audio is None else e.audio.alignment
    if found is None:
        return finding(name, None, "The similarity of the embeddings was not measured.", rule)
    return finding(
        name,
        found.paired - found.mismatched < MIN_ORDER,
        f"The rank correlation is {found.paired:.2f} on average, {found.mismatched:.2f} with "
        f"another's audio ({found.utterances} utterances).",
        rule,
    )


def large_stride(e: SpeechEvidence) -> Finding:
    """An audio embedding must stand for more than a token."""
    rule = f"more than {100 * MAX_CROWDED:g} % of the utterances have more tokens than embeddings"
    name = "stride too large"
    if e.audio is None:
        return finding(name, None, "The use of the audio was not measured.", rule)
    return finding(
        name,
        e.audio.crowded > MAX_CROWDED,
        f"There are {e.audio.tokens_per_embedding:.2f} tokens per audio embedding, and more tokens "
        f"than embeddings in {100 * e.audio.crowded:.1f} % of the utterances.",
        rule,
    )


def _score_again() -> str:
    return "The decoding was scored by an earlier version: run bin/score again."
