"""One page on an experiment: what was measured, and which failure signatures it shows.

Everything is read from files of the scoring stage; no model is needed. Written into the output
directory::

    diagnosis.md         the page
    diagnosis.png        its plots
    diagnosis.json       all numbers and findings; written last
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import bootstrap, diagnosis_page, signatures, speech_signatures
from espnet_llm_plugin.scoring.audio_use import read_audio_use
from espnet_llm_plugin.scoring.diagnosis_plots import diagnosis_png
from espnet_llm_plugin.scoring.evaluate import compare_counts, read_counts
from espnet_llm_plugin.scoring.scored_set import read_json, read_scored
from espnet_llm_plugin.scoring.signatures import Evidence, Finding
from espnet_llm_plugin.scoring.speech_plots import speech_panels
from espnet_llm_plugin.scoring.speech_signatures import SpeechEvidence, greedy_rates
from espnet_llm_plugin.scoring.training_log import last_statistics, read_epochs

PAGE, PLOTS, NUMBERS = "diagnosis.md", "diagnosis.png", "diagnosis.json"


def diagnose(
    scored: Sequence[str],
    output_dir: str,
    *,
    nll: Optional[str] = None,
    weak: Optional[str] = None,
    untuned: Optional[str] = None,
    swapped: Optional[str] = None,
    weak_nll: Optional[str] = None,
    vocabulary_report: Optional[str] = None,
    audio_use: Optional[str] = None,
    alone: Optional[str] = None,
    wider: Optional[str] = None,
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
        untuned: Like ``scored[0]``, with the strong LM and the scales of training.
        swapped: Of a model that was trained further after the swap: like ``scored[0]``, with the
            strong LM and tuned scales, before that.
        weak_nll: ``nll.json`` of the system with the weak LM.
        vocabulary_report: ``vocabulary_report.json`` of ``bin/adapt_vocabulary``.
        audio_use: ``audio_use.json`` of ``bin/evaluate_audio_use``. With this or one of the next
            two the page is about a speech LLM and its signatures.
        alone: Like ``scored[0]``, decoded by the LLM alone.
        wider: Like ``scored[0]``, decoded with a wider beam.
        scales: ``scales.json`` of the tuning.
        train_log: Log of the training.
        resamples, seed: Of the bootstrap.

    Raises:
        UserError: A file is missing or is something else, or options of a transducer and of a
            speech LLM are mixed; nothing is written then.
    """
    is_speech_llm = any(option is not None for option in (audio_use, alone, wider))
    swap = {"weak": weak, "swapped": swapped, "weak_nll": weak_nll}
    swap["vocabulary_report"] = vocabulary_report
    mixed = [name for name, option in swap.items() if option is not None]
    if is_speech_llm and mixed:
        raise UserError(
            f"--{mixed[0]} is about the predictor of a transducer; --audio_use, --alone and "
            "--wider are about a speech LLM"
        )
    for name, option in (("untuned", untuned), ("swapped", swapped)):
        if option is not None and weak is None:
            raise UserError(f"the {name} system is compared with the weak LM's: give --weak too")
    sets = [read_scored(directory) for directory in scored]
    likelihood, other = read_json(nll), read_json(weak_nll)
    alignment = likelihood.get("alignment") or {}

    def paired(first: Optional[str], second: Optional[str]) -> Optional[bootstrap.Difference]:
        if first is None or second is None:
            return None
        return compare_counts(read_counts(first), read_counts(second), resamples, seed)

    common = {
        "total": sets[0].total,
        "by_length": sets[0].by_length,
        "length_ratio": sets[0].length_ratio,
        "nll_per_label": likelihood.get("nll_per_label"),
        "nbest": sets[0].nbest,
        "epochs": read_epochs(train_log) if train_log is not None else [],
        "at_edge": read_json(scales).get("at_edge") if scales is not None else None,
    }
    evidence: Evidence
    if is_speech_llm:
        evidence = SpeechEvidence(
            **common,
            hallucination=sets[0].hallucination,
            audio=None if audio_use is None else read_audio_use(audio_use),
            alone=None if alone is None else read_scored(alone),
            joint=paired(alone, scored[0]),
            wider=paired(scored[0], wider),
            greedy={} if train_log is None else greedy_rates(last_statistics(train_log)),
        )
        found = speech_signatures.findings(evidence)
        sections = diagnosis_page.speech_sections(sets, evidence, audio_use, output_dir)
        png = diagnosis_png(evidence, speech_panels(evidence))
    else:
        evidence = Evidence(
            **common,
            blank_at_labels=alignment.get("blank_at_labels"),
            blank_elsewhere=alignment.get("blank_elsewhere"),
            word_perplexity=(likelihood.get("internal_lm") or {}).get("word_perplexity"),
            weak_word_perplexity=(other.get("internal_lm") or {}).get("word_perplexity"),
            native_word_perplexity=read_json(vocabulary_report).get("word_perplexity_before"),
            untuned=paired(weak, untuned),
            tuned=paired(weak, swapped or scored[0]),
            trained=paired(swapped, scored[0]),
        )
        found = signatures.findings(evidence)
        sections = diagnosis_page.transducer_sections(evidence, alignment.get("label_log_prob"))
        png = diagnosis_png(evidence)
    numbers = {
        "findings": [finding.as_dict() for finding in found],
        "evidence": asdict(evidence),
        "sets": {str(one.directory): asdict(one) for one in sets},
    }
    out = Path(output_dir)
    with atomic_write(out / PLOTS, "wb") as stream:
        stream.write(png)
    with atomic_write(out / PAGE) as stream:
        stream.write(diagnosis_page.page(sets, found, sections, PLOTS))
    with atomic_write(out / NUMBERS) as stream:
        json.dump(numbers, stream, indent=1, ensure_ascii=False, default=str)
        stream.write("\n")
    return found
