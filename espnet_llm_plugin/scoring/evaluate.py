"""Score one hypothesis file: the files of ESPnet's scoring stage, and ``scores.json``.

Layout of the output directory (the decoding directory of the test set, as in ESPnet)::

    score_wer/{ref.trn,hyp.trn,result.txt,utterances.tsv}   likewise score_cer, score_ter
    diagnostics.txt      errors by length and kind, signs of hallucination, words of interest
    scores.json          all sums; written last, so it is there only if the rest is
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Mapping, Optional, Sequence, Union

import numpy as np

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring import bootstrap, diagnostics
from espnet_llm_plugin.scoring.hallucination import Hallucination, hallucination
from espnet_llm_plugin.scoring.normalizers import build_normalizer
from espnet_llm_plugin.scoring.report import result_text
from espnet_llm_plugin.scoring.trn import (
    name_some,
    read_keyed,
    sclite_markup,
    speakers_of,
    write_trn,
)
from espnet_llm_plugin.scoring.units import WER, build_tokenizers, unknown_tokens
from espnet_llm_plugin.scoring.wer import Scored, Summary, score

SCORES = "scores.json"


@dataclass(frozen=True)
class Evaluation:
    """A scored hypothesis file."""

    scored: dict[str, Scored]  # by "wer", "cer", "ter"
    scores: dict  # what scores.json holds
    warnings: list[str]


def evaluate(
    ref: str,
    hyp: str,
    output_dir: str,
    *,
    utt2spk: Optional[str] = None,
    bpemodel: Optional[str] = None,
    token_list: Optional[str] = None,
    token_type: str = "bpe",
    non_linguistic_symbols: Optional[str] = None,
    words: Optional[str] = None,
    compare: tuple[str, ...] = (),
    case_sensitive: bool = False,
    allow_empty_ref: bool = False,
    normalizer: str = "none",
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Score a hypothesis file and write the results.

    Args:
        ref: Kaldi ``text`` of the references.
        hyp: Kaldi ``text`` of the hypotheses; a missing one counts as empty.
        output_dir: Where the files above go.
        utt2spk: Speakers; default: the ``utt2spk`` beside ``ref`` if there is one.
        bpemodel: SentencePiece model for the token error rate.
        token_list: Tokens of the model; tokens of the references that it lacks are counted.
        token_type: How the model cuts text into tokens (used with ``token_list``).
        non_linguistic_symbols: File of symbols that count neither as words nor as characters.
        words: File of words of interest, see :func:`diagnostics.read_word_groups`.
        compare: Output directories of other systems on the same test set.
        case_sensitive: Tell capital letters from small ones.
        allow_empty_ref: Score utterances whose reference is empty: all words are insertions.
        normalizer: Of references and hypotheses, see :mod:`.normalizers`.
        resamples, seed: Of the bootstrap.

    Raises:
        UserError: Bad or inconsistent files; nothing is written then.
    """
    tokenizers = build_tokenizers(bpemodel, non_linguistic_symbols)
    groups = None if words is None else diagnostics.read_word_groups(words)
    references, hypotheses = read_keyed(ref), read_keyed(hyp)
    unknown = [key for key in hypotheses if key not in references]
    if unknown:
        raise UserError(f"{hyp}: {ref} has no reference for {name_some(unknown)}")
    if utt2spk is None and (Path(ref).parent / "utt2spk").is_file():
        utt2spk = str(Path(ref).parent / "utt2spk")
    speakers = speakers_of(list(references), utt2spk)

    warnings = []
    missing = [key for key in references if key not in hypotheses]
    if missing:
        warnings.append(
            f"{hyp}: {len(missing)} of {len(references)} utterances have no hypothesis and count "
            f"as empty: {name_some(missing)}"
        )

    unknown_share = None
    if token_list is not None:
        unknown_tokens_, total = unknown_tokens(
            references.values(), token_list, token_type, bpemodel, non_linguistic_symbols
        )
        unknown_share = unknown_tokens_.total() / max(total, 1)
        if unknown_tokens_:
            common = (token for token, _ in unknown_tokens_.most_common())
            warnings.append(
                f"{100 * unknown_share:.2f} % of the reference's tokens are not in {token_list} "
                f"and cannot be recognised: {name_some(common)}"
            )

    # 1. Normalise and tokenize.
    normalize = build_normalizer(normalizer)
    references = {key: normalize(text) for key, text in references.items()}
    hypotheses = {key: normalize(text) for key, text in hypotheses.items()}
    tokens = {}
    for unit, tokenize in tokenizers.items():
        refs = {key: tokenize(text) for key, text in references.items()}
        hyps = {key: tokenize(hypotheses.get(key, "")) for key in references}
        empty = [key for key, tokens_ in refs.items() if not tokens_]
        if empty and not allow_empty_ref:
            raise UserError(
                f"{ref}: empty reference for {name_some(empty)}; remove these utterances, or give "
                "--allow_empty_ref to count what was recognised there as insertions"
            )
        tokens[unit] = refs, hyps
    markup = sclite_markup(tokens[WER][0]) + sclite_markup(tokens[WER][1])
    if markup:
        warnings.append(
            f"sclite would read {name_some(sorted(set(markup)))} as markup; here they are words, "
            "so its numbers may differ"
        )

    # 2. Score.
    scored = {
        unit: score(refs, hyps, speakers, case_sensitive=case_sensitive)
        for unit, (refs, hyps) in tokens.items()
    }
    scores: dict = {
        "ref": str(ref),
        "hyp": str(hyp),
        "case_sensitive": case_sensitive,
        "normalizer": normalizer,
        "missing": missing,
        "unknown_token_share": unknown_share,
        "resamples": resamples,
        "seed": seed,
    }
    for unit, result in scored.items():
        scores[unit] = _unit_scores(result, resamples, seed)
    found = None if groups is None else diagnostics.word_groups(scored[WER], groups)
    signs = hallucination(scored[WER])
    scores["diagnostics"] = _diagnostics(scored[WER], found, signs)
    scores["comparisons"] = {
        other: asdict(compare_counts(Counted.of(scored[WER]), read_counts(other), resamples, seed))
        for other in compare
    }

    # 3. Write.
    out = Path(output_dir)
    for unit, result in scored.items():
        directory = out / f"score_{unit}"
        write_trn(directory / "ref.trn", tokens[unit][0], speakers)
        write_trn(directory / "hyp.trn", tokens[unit][1], speakers)
        with atomic_write(directory / "utterances.tsv") as stream:
            stream.write(_utterance_table(result))
        with atomic_write(directory / "result.txt") as stream:
            stream.write(result_text(result, f"{unit.upper()} of {hyp}"))
    with atomic_write(out / "diagnostics.txt") as stream:
        stream.write(diagnostics.diagnostics_text(scored[WER], found, signs))
    with atomic_write(out / SCORES) as stream:
        json.dump(scores, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
    return Evaluation(scored, scores, warnings)


def _summary_dict(summary: Summary) -> dict:
    return {
        "sentences": summary.sentences,
        "words": summary.counts.words,
        **summary.counts._asdict(),
        "errors": summary.counts.errors,
        "sentence_errors": summary.sentence_errors,
        "rate": summary.rate if summary.counts.words else None,
    }


def _unit_scores(scored: Scored, resamples: int, seed: int) -> dict:
    interval = bootstrap.error_rate_interval(
        scored.errors, scored.words, resamples=resamples, seed=seed
    )
    return {
        **_summary_dict(scored.summary()),
        "interval": list(interval),
        "jiwer": {**scored.jiwer._asdict(), "errors": scored.jiwer.errors},
        "speakers": {name: _summary_dict(s) for name, s in scored.by_speaker().items()},
    }


def _diagnostics(
    scored: Scored, groups: Optional[list[diagnostics.WordGroup]], signs: Hallucination
) -> dict:
    table: dict = {
        "length_ratio": diagnostics.length_ratio(scored),
        "by_length": {
            name: _summary_dict(summary) for name, summary in diagnostics.by_length(scored).items()
        },
        "hallucination": signs.as_dict(),
    }
    if groups is not None:
        table["words"] = [
            {**asdict(group), "recall": group.recall, "precision": group.precision}
            for group in [*groups, diagnostics.total_group(groups)]
        ]
    return table


# ---- counts of each utterance, for comparisons ----------------------------------------------

_COLUMNS = ["utterance", "speaker", "correct", "substitutions", "deletions", "insertions"]


def _utterance_table(scored: Scored) -> str:
    rows = [_COLUMNS] + [
        [utterance, speaker, *map(str, counts)]
        for utterance, speaker, counts in zip(scored.ids, scored.speakers, scored.counts)
    ]
    return "".join("\t".join(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Counted:
    """Reference words and errors of each utterance of a system."""

    name: str
    words: Mapping[str, int]
    errors: Mapping[str, int]

    @classmethod
    def of(cls, scored: Scored, name: str = "this system") -> "Counted":
        return cls(
            name,
            dict(zip(scored.ids, scored.words.tolist())),
            dict(zip(scored.ids, scored.errors.tolist())),
        )


def read_counts(directory: Union[str, Path], unit: str = WER) -> Counted:
    """Read what :func:`evaluate` wrote for one error rate."""
    path = Path(directory) / f"score_{unit}" / "utterances.tsv"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; score {directory} first (espnet_llm_plugin.bin.score)"
        )
    words, errors = {}, {}
    header, *lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        fields = line.split("\t")
        if header.split("\t") != _COLUMNS or len(fields) != len(_COLUMNS):
            raise UserError(f"{path}:{number}: expected the columns {' '.join(_COLUMNS)}")
        odd = [text for text in fields[2:] if not text.isdecimal()]
        if odd:
            raise UserError(f"{path}:{number}: {odd[0]!r} is not a number of words")
        correct, substitutions, deletions, insertions = map(int, fields[2:])
        words[fields[0]] = correct + substitutions + deletions
        errors[fields[0]] = substitutions + deletions + insertions
    return Counted(str(directory), words, errors)


def pool_counts(runs: Sequence[Counted]) -> Counted:
    """Sums over runs of a system, such as seeds, on the same test set (else a UserError)."""
    for other in runs[1:]:
        check_same_references(runs[0], other)
    return Counted(
        ", ".join(run.name for run in runs),
        {key: words * len(runs) for key, words in runs[0].words.items()},
        {key: sum(run.errors[key] for run in runs) for key in runs[0].words},
    )


def check_same_references(first: Counted, second: Counted) -> None:
    """Raise a UserError unless both were scored on the same utterances and references."""
    odd = first.words.keys() ^ second.words.keys()
    if odd:
        raise UserError(
            f"{first.name} and {second.name} were scored on different utterances: "
            f"{name_some(sorted(odd))}"
        )
    other = [key for key, words in first.words.items() if words != second.words[key]]
    if other:
        raise UserError(
            f"{first.name} and {second.name} were scored with different references: "
            f"{name_some(other)}"
        )


def compare_counts(
    first: Counted, second: Counted, resamples: int, seed: int
) -> bootstrap.Difference:
    """Paired bootstrap of two systems on the same test set (else a UserError)."""
    check_same_references(first, second)
    ids = list(first.words)
    return bootstrap.paired_difference(
        np.array([first.errors[key] for key in ids]),
        np.array([second.errors[key] for key in ids]),
        np.array([first.words[key] for key in ids]),
        resamples=resamples,
        seed=seed,
    )
