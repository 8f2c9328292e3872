"""One page on an experiment: what was measured, and which failure signatures it shows.

Everything is read from files of the scoring stage; no model is needed. Written into the output
directory::

    diagnosis.md         the page
    diagnosis.png        its plots
    diagnosis.json       all numbers and findings; written last
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import bootstrap, nbest
from espnet_llm_plugin.scoring.alignment import Counts
from espnet_llm_plugin.scoring.diagnosis_plots import diagnosis_png
from espnet_llm_plugin.scoring.evaluate import SCORES, compare_counts, read_counts
from espnet_llm_plugin.scoring.report import round_half_up
from espnet_llm_plugin.scoring.signatures import SHOWS, Evidence, Finding, findings
from espnet_llm_plugin.scoring.table import markdown
from espnet_llm_plugin.scoring.training_log import read_epochs
from espnet_llm_plugin.scoring.trn import read_keyed
from espnet_llm_plugin.scoring.wer import Summary

PAGE, PLOTS, NUMBERS = "diagnosis.md", "diagnosis.png", "diagnosis.json"
_NONE = "-"


@dataclass(frozen=True)
class ScoredSet:
    """A scored decoding directory, and its n-best lists if they were kept."""

    directory: Path
    total: Summary
    by_length: dict[str, Summary]
    length_ratio: float
    nbest: Optional[nbest.NBestStatistics]


def diagnose(
    scored: Sequence[str],
    output_dir: str,
    *,
    nll: Optional[str] = None,
    weak: Optional[str] = None,
    untuned: Optional[str] = None,
    weak_nll: Optional[str] = None,
    vocabulary_report: Optional[str] = None,
    scales: Optional[str] = None,
    train_log: Optional[str] = None,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> list[Finding]:
    """Write the page.

    Args:
        scored: Output directories of ``bin/score``; the findings are about the first.
        output_dir: Where the files above go.
        nll: ``nll.json`` of ``bin/evaluate_nll``.
        weak: Like ``scored[0]``, of the system with the weak LM.
        untuned: Like ``scored[0]``, with the scales of training.
        weak_nll: ``nll.json`` of the system with the weak LM.
        vocabulary_report: ``vocabulary_report.json`` of ``bin/adapt_vocabulary``.
        scales: ``scales.json`` of the tuning.
        train_log: Log of the training.
        resamples, seed: Of the bootstrap.

    Raises:
        UserError: A file is missing or is something else; nothing is written then.
    """
    sets = [read_scored(directory) for directory in scored]
    likelihood, other = _json(nll), _json(weak_nll)
    alignment = likelihood.get("alignment") or {}

    def against_weak(directory: Optional[str]) -> Optional[bootstrap.Difference]:
        if weak is None or directory is None:
            return None
        return compare_counts(read_counts(weak), read_counts(directory), resamples, seed)

    if untuned is not None and weak is None:
        raise UserError("the untuned system is compared with the weak LM's: give --weak too")
    evidence = Evidence(
        total=sets[0].total,
        by_length=sets[0].by_length,
        length_ratio=sets[0].length_ratio,
        nll_per_label=likelihood.get("nll_per_label"),
        blank_at_labels=alignment.get("blank_at_labels"),
        blank_elsewhere=alignment.get("blank_elsewhere"),
        word_perplexity=(likelihood.get("internal_lm") or {}).get("word_perplexity"),
        weak_word_perplexity=(other.get("internal_lm") or {}).get("word_perplexity"),
        native_word_perplexity=_json(vocabulary_report).get("word_perplexity_before"),
        nbest=sets[0].nbest,
        epochs=read_epochs(train_log) if train_log is not None else [],
        untuned=against_weak(untuned),
        tuned=against_weak(scored[0]),
        at_edge=_json(scales).get("at_edge") if scales is not None else None,
    )
    found = findings(evidence)
    numbers = {
        "findings": [finding.as_dict() for finding in found],
        "evidence": asdict(evidence),
        "sets": {str(one.directory): asdict(one) for one in sets},
    }
    out = Path(output_dir)
    with atomic_write(out / PLOTS, "wb") as stream:
        stream.write(diagnosis_png(evidence))
    with atomic_write(out / PAGE) as stream:
        stream.write(page(sets, evidence, found, alignment.get("label_log_prob")))
    with atomic_write(out / NUMBERS) as stream:
        json.dump(numbers, stream, indent=1, ensure_ascii=False, default=str)
        stream.write("\n")
    return found


def read_scored(directory: str) -> ScoredSet:
    """Read ``scores.json`` and ``nbest.jsonl`` (of the directory, or of its decoding jobs).

    Raises:
        UserError: The directory is not scored, or its lists are malformed.
    """
    path = Path(directory) / SCORES
    if not path.is_file():
        raise UserError(f"{path}: no such file; score {directory} first (bin/score)")
    scores = _json(str(path))
    try:
        kinds = scores["diagnostics"]
        total = _summary(scores["wer"])
        by_length = {name: _summary(table) for name, table in kinds["by_length"].items()}
        ratio, ref = kinds["length_ratio"], scores["ref"]
        case_sensitive = scores["case_sensitive"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by espnet_llm_plugin.bin.score ({error})") from error
    files = [Path(directory) / "nbest.jsonl"]
    if not files[0].is_file():
        files = sorted(Path(directory).glob("logdir/output.*/nbest.jsonl"))
    lists = None
    if files:
        lists = nbest.statistics(
            read_keyed(ref), nbest.read_lists(files), case_sensitive=case_sensitive
        )
    return ScoredSet(Path(directory), total, by_length, ratio, lists)


def _summary(table: Mapping[str, Any]) -> Summary:
    counts = Counts(*(table[name] for name in Counts._fields))
    return Summary(table["sentences"], table["sentence_errors"], counts)


def _json(path: Optional[str]) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has no table of values")
    return content


def page(
    sets: Sequence[ScoredSet],
    evidence: Evidence,
    found: Sequence[Finding],
    label_log_prob: Optional[float],
) -> str:
    """The page in Markdown.

    Args:
        label_log_prob: Mean log P(label | not blank) along the best alignments.
    """
    shown = [finding.signature for finding in found if finding.verdict == SHOWS]
    summary = (
        f"Failure signatures that show: **{', '.join(shown)}**."
        if shown
        else "None of the failure signatures shows."
    )
    cells = [[f.signature, f.verdict, f.statement, f.rule] for f in found]
    return "\n".join(
        [
            "<!-- Generated by espnet_llm_plugin.bin.diagnose -->",
            f"# Diagnosis of {sets[0].directory.parent}\n",
            summary + f" The verdicts are about {sets[0].directory.name}.\n",
            markdown(["signature", "verdict", "what was found", "rule"], cells),
            f"![Plots of the numbers below]({PLOTS})\n",
            "## Error rates in %, and n-best lists\n",
            markdown(*_rates(sets)),
            "## Deletions / insertions in % by words of the reference\n",
            markdown(*_by_length(sets)),
            "## Model, on the validation set\n",
            markdown(["number", "value"], _model(evidence, label_log_prob)),
        ]
    )


def _rates(sets: Sequence[ScoredSet]) -> tuple[list[str], list[list[str]]]:
    header = ["set", "words", "WER", "ins", "del", "sub", "hyp/ref words"]
    header += ["oracle WER", "hypotheses", "effective", "lists without variance"]
    rows = []
    for one in sets:
        _, sub, dele, ins, rate, _ = one.total.percentages()
        row = [one.directory.name, str(one.total.counts.words)]
        row += [f"{value:.2f}" for value in (rate, ins, dele, sub)] + [f"{one.length_ratio:.3f}"]
        lists = one.nbest
        row += (
            [_NONE] * 4
            if lists is None
            else [
                f"{lists.best:.2f}",
                f"{lists.mean_length:.1f}",
                f"{lists.effective:.2f}",
                f"{100 * lists.without_variance:.0f} %",
            ]
        )
        rows.append(row)
    return header, rows


def _by_length(sets: Sequence[ScoredSet]) -> tuple[list[str], list[list[str]]]:
    names = sorted(
        {name for one in sets for name in one.by_length}, key=lambda name: int(name.split("-")[0])
    )

    def cell(summary: Optional[Summary]) -> str:
        if summary is None or not summary.counts.words:
            return _NONE
        _, _, dele, ins, _, _ = summary.percentages()
        return f"{round_half_up(dele)} / {round_half_up(ins)} ({summary.counts.words} words)"

    rows = [
        [one.directory.name, *(cell(one.by_length.get(name)) for name in names)] for one in sets
    ]
    return ["set", *names], rows


def _model(evidence: Evidence, label_log_prob: Optional[float]) -> list[list[str]]:
    numbers = {
        "-log P(text | speech) per label, nats": evidence.nll_per_label,
        "mean P(blank) where labels are emitted": evidence.blank_at_labels,
        "mean P(blank) in other frames": evidence.blank_elsewhere,
        "mean log P(label | not blank), nats": label_log_prob,
        "word perplexity of the internal LM": evidence.word_perplexity,
        "the same with the weak LM": evidence.weak_word_perplexity,
        "word perplexity of the LLM with its own vocabulary": evidence.native_word_perplexity,
    }
    return [[name, _NONE if value is None else f"{value:.3f}"] for name, value in numbers.items()]
