"""The protocol of the Open ASR Leaderboard (huggingface/open_asr_leaderboard) on its ESB test sets.

Eight test sets of seven corpora (``hf-audio/esb-datasets-test-only-sorted``). References and
hypotheses are normalised; an utterance whose reference is then empty, or "ignore time segment in
scoring", is not scored. WER of a set: minimum edit distance over all its words, in per cent,
rounded to two decimals. Two averages are in use and must not be compared with each other:

* over the **8 splits**, as the leaderboard has it: LibriSpeech counts twice;
* over the **7 corpora**, as some papers have it: first the mean of test.clean and test.other.

RTFx is seconds of audio per second of computing. The leaderboard's scripts of 2026 count words that
are only written apart (``white paper``, ``whitepaper``) as right (``merge_compounds`` of
kaldialign); the WER in that way is reported beside the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Optional

import jiwer

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.normalizers import Normalizer
from espnet_llm_plugin.scoring.table import markdown
from espnet_llm_plugin.scoring.trn import name_some

IGNORED = "ignore time segment in scoring"
REPOSITORY = "hf-audio/esb-datasets-test-only-sorted"


class Split(NamedTuple):
    """A test set: its title, and configuration and split of the data set of the Hub."""

    title: str
    corpus: str
    config: str
    split: str = "test"


SPLITS = {
    "ami": Split("AMI", "AMI", "ami"),
    "earnings22": Split("Earnings22", "Earnings22", "earnings22"),
    "gigaspeech": Split("GigaSpeech", "GigaSpeech", "gigaspeech"),
    "librispeech_clean": Split("LS clean", "LibriSpeech", "librispeech", "test.clean"),
    "librispeech_other": Split("LS other", "LibriSpeech", "librispeech", "test.other"),
    "spgispeech": Split("SPGISpeech", "SPGISpeech", "spgispeech"),
    "tedlium": Split("TED-LIUM", "TED-LIUM", "tedlium"),
    "voxpopuli": Split("VoxPopuli", "VoxPopuli", "voxpopuli"),
}
CORPORA = tuple(dict.fromkeys(split.corpus for split in SPLITS.values()))


@dataclass(frozen=True)
class SplitScore:
    """Counts of a test set; ``merged_errors`` with compounds joined, ``seconds`` None: unknown."""

    utterances: int
    dropped: int
    missing: int
    words: int
    substitutions: int
    deletions: int
    insertions: int
    merged_errors: int
    audio_seconds: Optional[float] = None
    seconds: Optional[float] = None

    @property
    def wer(self) -> float:
        """Per cent, rounded to two decimals as the leaderboard does before it averages."""
        errors = self.substitutions + self.deletions + self.insertions
        return round(100 * errors / self.words, 2)

    @property
    def wer_merged(self) -> float:
        """The same with words that are only written apart counted as right."""
        return round(100 * self.merged_errors / self.words, 2)

    @property
    def rtfx(self) -> Optional[float]:
        """Seconds of audio per second of computing."""
        if not self.seconds or self.audio_seconds is None:
            return None
        return self.audio_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rates = {"wer": self.wer, "wer_merged": self.wer_merged, "rtfx": self.rtfx}
        return {**rates, **asdict(self)}


def is_scored(normalized_reference: str) -> bool:
    """Whether the leaderboard scores an utterance with this reference."""
    return normalized_reference not in ("", IGNORED)


def score_split(
    references: Mapping[str, str],
    hypotheses: Mapping[str, str],
    normalize: Normalizer,
    *,
    dropped: int = 0,
    audio_seconds: Optional[float] = None,
    seconds: Optional[float] = None,
) -> SplitScore:
    """Score a test set.

    Args:
        references: Transcripts by utterance.
        hypotheses: Of (at least) the utterances that are scored; a missing one counts as empty.
        normalize: Applied to both.
        dropped: Utterances that were left out before.
        audio_seconds, seconds: Of all utterances: duration, and time spent on recognising them.

    Raises:
        UserError: kaldialign is missing, nothing is left to score, or hypotheses of unknown
            utterances only.
    """
    try:
        from kaldialign import batch_error_rate
    except ImportError:
        raise UserError(
            "the leaderboard's error rate needs the Python package 'kaldialign', which is not "
            "installed: run pip install 'kaldialign>=0.12'  (or install this package with its "
            "extra 'leaderboard')"
        ) from None
    normalized = {key: normalize(text) for key, text in references.items()}
    keys = [key for key, text in normalized.items() if is_scored(text)]
    if not keys:
        raise UserError("no utterance is left: all references are empty or to be ignored")
    if not hypotheses.keys() & references.keys():
        raise UserError(
            f"the hypotheses are of other utterances ({name_some(list(hypotheses))}) than the "
            f"references ({name_some(list(references))})"
        )
    refs = [normalized[key] for key in keys]
    hyps = [normalize(hypotheses.get(key, "")) for key in keys]
    split = jiwer.ReduceToListOfListOfWords(word_delimiter=" ")
    counts = jiwer.process_words(refs, hyps, split, split)
    merged = batch_error_rate(
        [text.split() for text in refs], [text.split() for text in hyps], merge_compounds=True
    )
    return SplitScore(
        utterances=len(keys),
        dropped=dropped + len(references) - len(keys),
        missing=sum(key not in hypotheses for key in keys),
        words=counts.hits + counts.substitutions + counts.deletions,
        substitutions=counts.substitutions,
        deletions=counts.deletions,
        insertions=counts.insertions,
        merged_errors=merged["total"],
        audio_seconds=audio_seconds,
        seconds=seconds,
    )


class Average(NamedTuple):
    """Mean WER in per cent over the test sets or corpora that are there."""

    wer: float
    wer_merged: float
    over: tuple[str, ...]


def average_splits(scores: Mapping[str, SplitScore]) -> Average:
    """Mean over test sets, as on the leaderboard."""
    rates = [(score.wer, score.wer_merged) for score in scores.values()]
    return Average(*map(_mean, zip(*rates)), tuple(scores))


def average_corpora(scores: Mapping[str, SplitScore]) -> Average:
    """Mean over corpora; a corpus of several test sets counts as their mean."""
    corpora: dict[str, list[tuple[float, float]]] = {}
    for name, score in scores.items():
        corpora.setdefault(SPLITS[name].corpus, []).append((score.wer, score.wer_merged))
    rates = [tuple(map(_mean, zip(*rows))) for rows in corpora.values()]
    return Average(*map(_mean, zip(*rates)), tuple(corpora))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Leaderboard:
    """Scores of one system; ``skipped`` are the test sets that were not found."""

    title: str
    normalizer: str
    scores: dict[str, SplitScore]
    skipped: tuple[str, ...]

    @property
    def rtfx(self) -> Optional[float]:
        """Over all test sets whose times are known."""
        known = [score for score in self.scores.values() if score.rtfx is not None]
        if not known:
            return None
        return sum(s.audio_seconds for s in known) / sum(s.seconds for s in known)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        averages = {
            f"average_of_{len(SPLITS)}_splits": average_splits(self.scores),
            f"average_of_{len(CORPORA)}_corpora": average_corpora(self.scores),
        }
        return {
            "title": self.title,
            "normalizer": self.normalizer,
            "rtfx": self.rtfx,
            **{name: average._asdict() for name, average in averages.items()},
            "skipped": list(self.skipped),
            "sets": {name: score.as_dict() for name, score in self.scores.items()},
        }

    def page(self) -> str:
        """As Markdown."""
        header = ["set", "WER", "sub / del / ins", "WER, compounds merged", "RTFx"]
        header += ["utterances", "dropped", "words"]
        rows = []
        for name, score in self.scores.items():
            parts = (score.substitutions, score.deletions, score.insertions)
            shares = " / ".join(f"{100 * part / score.words:.2f}" for part in parts)
            row = [SPLITS[name].title, f"{score.wer:.2f}", shares, f"{score.wer_merged:.2f}"]
            row += [_ratio(score.rtfx), str(score.utterances), str(score.dropped), str(score.words)]
            rows.append(row)
        for what, average, every in (
            ("splits", average_splits(self.scores), len(SPLITS)),
            ("corpora", average_corpora(self.scores), len(CORPORA)),
        ):
            complete = len(average.over) == every
            name = (
                f"mean of {every} {what}"
                if complete
                else f"mean of {len(average.over)} of {every} {what}"
            )
            rates = [f"{average.wer:.2f}", "", f"{average.wer_merged:.2f}"]
            ratio = _ratio(self.rtfx) if what == "splits" else ""
            rows.append([f"**{name}**", *rates, ratio, "", "", ""])
        lines = [f"# {self.title}\n", markdown(header, rows)]
        lines.append(
            f"Open ASR Leaderboard protocol, normalizer `{self.normalizer}`. The two means are not "
            "comparable with each other: the leaderboard's is the one over splits, papers also "
            "give the one over corpora (LibriSpeech's two test sets merged first).\n"
        )
        if self.skipped:
            titles = ", ".join(SPLITS[name].title for name in self.skipped)
            lines.append(f"Skipped, because not found: {titles}. The means are over the others.\n")
        missing = {SPLITS[n].title: s.missing for n, s in self.scores.items() if s.missing}
        if missing:
            counts = ", ".join(f"{number} of {title}" for title, number in missing.items())
            lines.append(f"Without hypothesis, counted as empty: {counts}.\n")
        return "\n".join(lines)


def _ratio(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.4g}"
