"""Which failure signatures of Transducer-Llama an experiment shows.

The signatures are those of arXiv 2412.16464 and of the factorized transducer before it (arXiv
2404.01716); the thresholds, constants below, are this package's, from its own experiments. Every
finding says its rule and its numbers; what was not measured is said to be so.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Sequence

from espnet_llm_plugin.scoring.bootstrap import Difference
from espnet_llm_plugin.scoring.nbest import NBestStatistics
from espnet_llm_plugin.scoring.training_log import Epoch
from espnet_llm_plugin.scoring.wer import Summary

SHOWS, CLEAR, UNKNOWN = "shows", "does not show", "not measured"

MAX_NLL = 1.3  # nats per label of the validation set: above, search results mean little
MAX_LENGTH_RATIO = 0.03  # hypothesis / reference words differ from 1 by more
ONE_SIDED = 2.0  # deletions per insertion, or the reverse
MIN_SHARE = 2.0  # per cent of the words deleted (or inserted): fewer are no problem
MAX_BLANK_AT_LABELS = 0.3  # mean P(blank) where the best alignment emits
LOST_ENDS = 2.0  # deletion rate of the longest references over that of the shortest
MIN_LOST = 5.0  # per cent deleted among the longest references
MIN_BUCKET = 100  # words of a length bucket that is compared
MAX_RISE = 1.05  # validation loss of the last epoch over the lowest
MIN_ORACLE_GAIN = 0.05  # share of the 1-best's errors that the oracle avoids
MIN_EFFECTIVE = 1.2  # hypotheses of the posterior
MAX_ALIKE = 0.5  # share of lists whose hypotheses have equal errors
MAX_PERPLEXITY_RATIO = 1.2  # adapted LLM over native, by word


@dataclass(frozen=True)
class Evidence:
    """What was measured; None or empty where it was not.

    Attributes:
        total: Errors of the set that the findings are about.
        by_length: Its errors by reference length, shortest first.
        length_ratio: Hypothesis words over reference words.
        nll_per_label: Of the validation set, nats.
        blank_at_labels: Mean P(blank) where the best alignment of the transcripts emits a label.
        blank_elsewhere: Mean P(blank) in frames where it emits none.
        word_perplexity: Internal LM's, of the validation set.
        weak_word_perplexity: The same of the system with the weak LM.
        native_word_perplexity: The LLM's with its own vocabulary.
        nbest: Of that set.
        epochs: Of training.
        untuned: WER with the weak LM, and with the strong LM untuned (paired, weak first).
        tuned: WER with the weak LM, and with the strong LM tuned (paired, weak first).
        trained: WER with the strong LM tuned, and after more training with it (paired).
        at_edge: Scales whose best value is at the end of the grid; None: not tuned.
    """

    total: Summary
    by_length: Mapping[str, Summary]
    length_ratio: float
    nll_per_label: Optional[float] = None
    blank_at_labels: Optional[float] = None
    blank_elsewhere: Optional[float] = None
    word_perplexity: Optional[float] = None
    weak_word_perplexity: Optional[float] = None
    native_word_perplexity: Optional[float] = None
    nbest: Optional[NBestStatistics] = None
    epochs: Sequence[Epoch] = field(default_factory=list)
    untuned: Optional[Difference] = None
    tuned: Optional[Difference] = None
    trained: Optional[Difference] = None
    at_edge: Optional[Sequence[str]] = None


@dataclass(frozen=True)
class Finding:
    """A verdict on one signature, in words; ``verdict`` is SHOWS, CLEAR or UNKNOWN."""

    signature: str
    verdict: str
    statement: str
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self).copy()


def findings(evidence: Evidence) -> list[Finding]:
    """A finding for every signature."""
    rules = (half_trained, imbalance, spread_emissions, lost_ends, strong_lm, vocabulary)
    return [rule(evidence) for rule in (*rules, overfits, mwer, grid)]


def finding(signature: str, shows: Optional[bool], statement: str, rule: str) -> Finding:
    """A finding; ``shows`` is None for what was not measured."""
    verdict = UNKNOWN if shows is None else SHOWS if shows else CLEAR
    return Finding(signature, verdict, statement, rule)


def half_trained(e: Evidence) -> Finding:
    """The transducer is not trained enough for its search results to mean something."""
    nll = e.nll_per_label
    return finding(
        "half-trained transducer",
        None if nll is None else nll > MAX_NLL,
        "The likelihood of the validation set was not measured."
        if nll is None
        else f"The transcripts cost {nll:.2f} nats per label.",
        f"-log P(text | speech) per label of the validation set > {MAX_NLL} nats",
    )


def imbalance(e: Evidence) -> Finding:
    """Blank and label probabilities are out of balance, as after a swap that was not tuned."""
    counts, ratio = e.total.counts, e.length_ratio
    deleted, inserted = (100 * n / counts.words for n in (counts.deletions, counts.insertions))
    too_short = (
        ratio < 1 - MAX_LENGTH_RATIO and deleted >= MIN_SHARE and deleted >= ONE_SIDED * inserted
    )
    too_long = (
        ratio > 1 + MAX_LENGTH_RATIO and inserted >= MIN_SHARE and inserted >= ONE_SIDED * deleted
    )
    statement = (
        f"Hypotheses have {ratio:.3f} times the words of the references; {deleted:.1f} % of the "
        f"words are deleted, {inserted:.1f} % inserted."
    )
    if too_short:
        statement += " Labels lose against the blank: a larger label bonus, or a smaller beta."
    if too_long:
        statement += " Labels win against the blank: a smaller label bonus, or a larger beta."
    return finding(
        "imbalance of blank and labels",
        too_short or too_long,
        statement,
        f"length ratio off 1 by more than {MAX_LENGTH_RATIO}, and deletions (or insertions) at "
        f"least {MIN_SHARE:g} % of the words and {ONE_SIDED:g} times the other",
    )


def spread_emissions(e: Evidence) -> Finding:
    """A label's probability is spread over several frames: dropping it is cheap."""
    at_labels, elsewhere = e.blank_at_labels, e.blank_elsewhere
    if at_labels is None:
        statement = "Alignments were not measured (CTC, or no evaluate_nll)."
    else:
        other = "no other frame" if elsewhere is None else f"{elsewhere:.2f} in other frames"
        statement = f"P(blank) is {at_labels:.2f} on average where labels are emitted, {other}."
    return finding(
        "emissions spread over frames",
        None if at_labels is None else at_labels > MAX_BLANK_AT_LABELS,
        statement,
        f"mean P(blank) at the labels of the transcripts' best alignments > {MAX_BLANK_AT_LABELS}",
    )


def lost_ends(e: Evidence) -> Finding:
    """Deletions grow with the length: ends of sentences are lost, or there is no bonus."""
    large = [(name, s) for name, s in e.by_length.items() if s.counts.words >= MIN_BUCKET]
    shows, statement = None, f"Less than two lengths have {MIN_BUCKET} words."
    if len(large) > 1:
        (short, first), (long, last) = (
            (name, 100 * s.counts.deletions / s.counts.words) for name, s in (large[0], large[-1])
        )
        shows = last >= MIN_LOST and last > LOST_ENDS * first
        statement = (
            f"{first:.1f} % of the words are deleted in references of {short} words, {last:.1f} % "
            f"in those of {long}."
        )
    return finding(
        "deletions grow with length",
        shows,
        statement,
        f"at least {MIN_LOST:g} % deleted in the longest references, and more than "
        f"{LOST_ENDS:g} times the rate of the shortest (lengths of {MIN_BUCKET} words or more)",
    )


def strong_lm(e: Evidence) -> Finding:
    """The encoder fits the LM that it was trained with: a stronger one does not help."""
    name = "strong LM does not help"
    rule = (
        "WER with the strong LM, tuned, is not below the WER with the weak LM (95 % interval of "
        "the paired bootstrap)"
    )
    if e.tuned is None:
        return finding(name, None, "Weak and strong LM were not compared.", rule)
    tuned = e.tuned
    statement = (
        f"WER {tuned.first:.2f} with the weak LM, {tuned.second:.2f} with the strong LM tuned: "
        f"{tuned.difference:+.2f} (95 % {tuned.low:+.2f} to {tuned.high:+.2f})."
    )
    if e.untuned is not None:
        statement += f" Untuned the strong LM has {e.untuned.second:.2f}"
        if e.untuned.low > 0:
            statement += ": the swap helps as it is."
        else:
            statement += ": all of the gain is tuning." if tuned.low > 0 else "."
    if e.trained is not None:
        after = e.trained
        statement += (
            f" Trained further with it {after.second:.2f}: {after.difference:+.2f} (95 % "
            f"{after.low:+.2f} to {after.high:+.2f})."
        )
    gain = gain_per_nat(e)
    if gain is not None:
        statement += f" The gain is {gain:.2f} % WER for a nat of word log-perplexity."
    return finding(name, tuned.low <= 0, statement, rule)


def swap_rates(e: Evidence) -> list[tuple[str, float]]:
    """WER step by step: weak LM, strong LM untuned and tuned, trained further; what is known."""
    rates = [("weak LM", e.tuned.first)]
    if e.untuned is not None:
        rates.append(("strong LM,\nuntuned", e.untuned.second))
    rates.append(("strong LM,\ntuned", e.tuned.second))
    if e.trained is not None:
        rates.append(("strong LM,\ntrained further", e.trained.second))
    return rates


def gain_per_nat(e: Evidence) -> Optional[float]:
    """WER reduction (per cent absolute) over that of the LMs' log-perplexity per word."""
    if e.tuned is None or e.word_perplexity is None or e.weak_word_perplexity is None:
        return None
    nats = math.log(e.weak_word_perplexity) - math.log(e.word_perplexity)
    return e.tuned.difference / nats if nats > 0 else None


def vocabulary(e: Evidence) -> Finding:
    """The LLM predicts worse in the recogniser's pieces than in its own."""
    now, native = e.word_perplexity, e.native_word_perplexity
    shows, statement = None, "The LLM's perplexity with its own vocabulary is not known."
    if now is not None and native is not None:
        shows = now > MAX_PERPLEXITY_RATIO * native
        statement = (
            f"Word perplexity {now:.1f} in the recogniser's vocabulary, {native:.1f} in the "
            "LLM's own (meaningful if it is of the same kind of text)."
        )
    return finding(
        "vocabulary adaptation mismatch",
        shows,
        statement,
        f"word perplexity after adaptation > {MAX_PERPLEXITY_RATIO} times the native one",
    )


def overfits(e: Evidence, name: str = "predictor overfits") -> Finding:
    """A bigger predictor (or a tuned LLM) learns the training set by heart."""
    rule = (
        f"validation loss of the last epoch > {MAX_RISE} times the lowest, while the training "
        "loss fell since"
    )
    epochs = [epoch for epoch in e.epochs if math.isfinite(epoch.train + epoch.valid)]
    if len(epochs) < 2:
        return finding(name, None, "Losses of less than two epochs are known.", rule)
    best, last = min(epochs, key=lambda epoch: epoch.valid), epochs[-1]
    shows = last.valid > MAX_RISE * best.valid and last.train < best.train
    statement = (
        f"The validation loss was lowest in epoch {best.number} ({best.valid:.3g}) and is "
        f"{last.valid:.3g} in the last, {last.number}; the training loss went from "
        f"{best.train:.3g} to {last.train:.3g}."
    )
    return finding(name, shows, statement, rule)


def mwer(e: Evidence) -> Finding:
    """The n-best lists hold nothing that MWER training could learn from."""
    rule = (
        f"the oracle avoids less than {100 * MIN_ORACLE_GAIN:g} % of the errors, or less than "
        f"{MIN_EFFECTIVE} effective hypotheses, or more than {100 * MAX_ALIKE:g} % of the lists "
        "have equally many errors throughout"
    )
    name, lists = "MWER has nothing to learn from", e.nbest
    if lists is None or len(lists.oracle) < 2:
        return finding(name, None, "Decode with --nbest 4 or more to see.", rule)
    one_best = lists.oracle[0]
    shows = (
        lists.best > (1 - MIN_ORACLE_GAIN) * one_best
        or lists.effective < MIN_EFFECTIVE
        or lists.without_variance > MAX_ALIKE
    )
    statement = (
        f"1-best WER {one_best:.2f}, oracle WER {lists.best:.2f} of {lists.mean_length:.1f} "
        f"hypotheses on average; {lists.effective:.2f} effective hypotheses; "
        f"{100 * lists.without_variance:.0f} % of the lists without variance."
    )
    return finding(name, shows, statement, rule)


def grid(e: Evidence) -> Finding:
    """The scales were tuned on a grid that may not contain the optimum."""
    rule = "the best value of a scale is the first or last of several in the grid (0 is an end)"
    name = "tuning ends at the edge of the grid"
    if e.at_edge is None:
        return finding(name, None, "The scales were not tuned.", rule)
    statement = (
        f"At the edge: {', '.join(e.at_edge)}." if e.at_edge else "The optimum is inside the grid."
    )
    return finding(name, bool(e.at_edge), statement, rule)
