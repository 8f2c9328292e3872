"""Rescore the n-best lists of a decoding directory: the body of ``bin/rescore``."""

import argparse
import itertools
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import torch
import yaml
from tqdm import tqdm

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.prior import Prior, read_prior
from espnet_llm_plugin.fusion.rescoring import Candidate, RescoringScales, grid_points, ranked
from espnet_llm_plugin.fusion.text_scorers import LLMTextScorer, TextScorer
from espnet_llm_plugin.fusion.tuning import Point, best_point, edges, heat_map, table
from espnet_llm_plugin.inference.label_lms import internal_lm, load_text_scorer
from espnet_llm_plugin.inference.loading import require_file
from espnet_llm_plugin.inference.nbest_dirs import (
    NBestEntry,
    check_tokens_of_lists,
    read_nbest_dir,
    write_nbest_dir,
)
from espnet_llm_plugin.inference.options import device_of
from espnet_llm_plugin.inference.score_store import ScoreStore

Lists = dict[str, list[NBestEntry]]
# What best.yaml hands on besides the weights: the scores that they weigh.
KEPT = ("eos", "lm_temperature", "lm_lowercase", "bonus_unit", "first_pass_score")


def rescore(args: argparse.Namespace) -> dict[str, Any]:
    """Score, choose the weights if ``args.text`` is given, and write the re-ranked lists.

    Returns:
        What ``rescoring.json`` says.

    Raises:
        UserError: Bad options, models or lists.
    """
    output_dir, device = Path(args.output_dir), torch.device(device_of(args))
    lists = read_nbest_dir(args.nbest_dir)
    if args.nbest:
        lists = {utt: entries[: args.nbest] for utt, entries in lists.items()}
    references = _references(args, lists)
    if output_dir.resolve() == Path(args.nbest_dir).resolve():
        raise UserError("--output_dir is the directory of the n-best lists: name another")

    # 1. Scores of the distinct hypotheses
    start = time.perf_counter()
    scorer, tokens, same = load_text_scorer(args, device)
    if tokens is not None:
        check_tokens_of_lists(lists, tokens, args.nbest_dir, "the LM")
    if isinstance(scorer, LLMTextScorer):
        check_texts(lists, scorer, args.eos)
    lm = scores_of(scorer, lists, ScoreStore(output_dir / "lm_scores.jsonl", same), args.batch_size)
    ilm, has_ilm = None, args.ilm is not None
    if has_ilm:
        own, tokens, same = internal_lm(args, device)
        check_tokens_of_lists(lists, tokens, args.nbest_dir, "the internal LM")
        ilm = scores_of(
            own, lists, ScoreStore(output_dir / "ilm_scores.jsonl", same), args.batch_size
        )
    elif args.ilm_file:
        raise UserError(f"--ilm_file {args.ilm_file}: it needs --ilm mini_lstm")
    prior = _label_prior(args, lists)
    seconds = time.perf_counter() - start
    candidates = {
        utt: [
            Candidate(
                entry.text,
                first_pass_score(args, utt, entry),
                lm[utt][n],
                0.0 if prior is None else prior.of(entry.token_ids),
                0.0 if ilm is None else ilm[utt][n],
                len(entry.text.split()) if args.bonus_unit == "word" else len(_ids(args, entry)),
            )
            for n, entry in enumerate(entries)
        ]
        for utt, entries in lists.items()
    }

    # 2. The weights
    scales = RescoringScales(args.lm_weight, args.prior_weight, args.ilm_weight, args.length_bonus)
    for what, there, weight in (
        ("prior", prior is not None, scales.prior_weight),
        ("ilm", has_ilm, scales.ilm_weight),
    ):
        if weight and not there:
            raise UserError(f"--{what}_weight {weight}, but no --{what} is given")
    summary: dict[str, Any] = {}
    if references is not None:
        grid = grid_of(args, prior is not None, has_ilm)
        points = grid_points(candidates, references, [RescoringScales(), *grid])
        best = best_point(points[1:])
        write_tuning(output_dir, args, points[1:], best, points[0])
        scales = best.scales
        summary = {"first_pass_wer": points[0].wer, "wer": best.wer}

    # 3. The lists in their new order
    write_nbest_dir(
        output_dir,
        {
            utt: [reranked(entries[i], candidates[utt][i], scales) for i in order]
            for utt, entries in lists.items()
            for order in [ranked(candidates[utt], scales)]
        },
    )
    summary.update(
        nbest_dir=str(args.nbest_dir),
        utterances=len(lists),
        hypotheses=sum(map(len, lists.values())),
        scored=len({scorer.key(entry) for entries in lists.values() for entry in entries}),
        changed=sum(ranked(found, scales)[0] != 0 for found in candidates.values()),
        scales=vars(scales),
        seconds=round(seconds, 2),
    )
    with atomic_write(output_dir / "rescoring.json") as stream:
        json.dump(summary, stream, indent=1)
        stream.write("\n")
    logging.info(
        f"{summary['hypotheses']} hypotheses of {len(lists)} utterances, {summary['scored']} "
        f"distinct ones scored in {seconds:.1f} s; the best is another one in "
        f"{summary['changed']} lists"
    )
    return summary


def _references(args: argparse.Namespace, lists: Lists) -> Optional[dict[str, str]]:
    if args.text is None:
        return None
    require_file(args.text, "--text", "transcripts of the decoded set, to tune the weights on")
    references = read_clean_table(args.text, may_be_empty=True)
    without = [utt for utt in lists if utt not in references]
    if without:
        raise UserError(f"{args.text} has no transcript of {len(without)} utterances: {without[0]}")
    return references


def _ids(args: argparse.Namespace, entry: NBestEntry) -> Sequence[int]:
    if entry.token_ids is None:
        raise UserError(
            f"{args.nbest_dir} has no token_int files to count labels in; use --bonus_unit word"
        )
    return entry.token_ids


def _label_prior(args: argparse.Namespace, lists: Lists) -> Optional[Prior]:
    if args.prior is None:
        return None
    prior, tokens = read_prior(args.prior)
    if prior.mode != "label":
        raise UserError(
            f"--prior {args.prior} is a {prior.mode} prior, which acts at every frame of a search; "
            "n-best lists know no frames: estimate one with `estimate_prior --mode label`"
        )
    check_tokens_of_lists(lists, tokens, args.nbest_dir, f"prior {args.prior}")
    return prior


def first_pass_score(args: argparse.Namespace, utt: str, entry: NBestEntry) -> float:
    """The score of the search, or its acoustic part."""
    if args.first_pass_score == "total":
        return entry.score
    if "acoustic" not in entry.parts:
        raise UserError(
            f"--first_pass_score acoustic: the list of {utt} has no acoustic score; only "
            "nbest.jsonl of espnet_llm_plugin.bin.asr_inference has it, use total"
        )
    return float(entry.parts["acoustic"])


def check_texts(lists: Lists, scorer: LLMTextScorer, eos: str) -> None:
    """Say which hypotheses are nothing to the LLM's tokenizer; refuse lists that all are.

    Raises:
        UserError: The tokenizer finds no token in any hypothesis that has words.
    """
    texts = {scorer.key(entry) for entries in lists.values() for entry in entries} - {""}
    nothing = sorted(text for text in texts if not scorer.words(text))
    if texts and len(nothing) == len(texts):
        raise UserError(
            f"the LLM's tokenizer makes no tokens of any hypothesis, e.g. {nothing[0]!r}: it is "
            "an LLM of other scripts, or its tokenizer is damaged"
        )
    if nothing:
        logging.warning(
            f"the LLM's tokenizer makes no tokens of {len(nothing)} of {len(texts)} distinct "
            f"hypotheses, e.g. {nothing[0]!r}: they are scored as "
            + ("0" if eos == "none" else f"their end ({eos}) alone")
        )


def scores_of(
    scorer: TextScorer, lists: Lists, store: ScoreStore, batch_size: int
) -> dict[str, list[float]]:
    """Scores of all entries; those in the store are not computed again."""
    keys = {utt: [scorer.key(entry) for entry in entries] for utt, entries in lists.items()}
    missing = store.missing(key for some in keys.values() for key in some)
    progress = tqdm(total=len(missing), unit="hyp", disable=not sys.stderr.isatty())
    for scores in scorer.score_batches(missing, batch_size):
        store.add(scores)
        progress.update(len(scores))
    progress.close()
    return {utt: [store[key] for key in some] for utt, some in keys.items()}


def grid_of(args: argparse.Namespace, has_prior: bool, has_ilm: bool) -> list[RescoringScales]:
    """The points to try; weights of what is not there stay 0."""
    return [
        RescoringScales(*weights)
        for weights in itertools.product(
            dict.fromkeys(args.lm_weights),
            dict.fromkeys(args.prior_weights) if has_prior else [0.0],
            dict.fromkeys(args.ilm_weights) if has_ilm else [0.0],
            dict.fromkeys(args.length_bonuses),
        )
    ]


def write_tuning(
    output_dir: Path, args: argparse.Namespace, points: Sequence[Point], best: Point, first: Point
) -> None:
    """``best.yaml``, ``table.txt``, ``heat_map.png`` (two axes) and ``scales.json``."""
    with atomic_write(output_dir / "best.yaml") as stream:
        stream.write(f"# WER {best.wer:.2f} % on {args.text}, best of {len(points)} points\n")
        kept = {name: getattr(args, name) for name in KEPT}
        yaml.safe_dump({**vars(best.scales), **kept}, stream)
    listing = table(points)
    with atomic_write(output_dir / "table.txt") as stream:
        stream.write(listing)
    figure = heat_map(points, best)
    if figure is not None:
        with atomic_write(output_dir / "heat_map.png", "wb") as stream:
            figure.savefig(stream, format="png", dpi=150)
    axes = RescoringScales.AXES
    at_edge = edges(best, points)
    with atomic_write(output_dir / "scales.json") as stream:
        content = {
            "best": best.as_dict(axes),
            "first_pass": first.as_dict(axes),
            "at_edge": at_edge,
            "points": [point.as_dict(axes) for point in points],
        }
        json.dump(content, stream, indent=1, ensure_ascii=False)
    logging.info(
        f"WER {first.wer:.2f} % of the first pass, {best.wer:.2f} % at {vars(best.scales)}, best "
        f"of {len(points)} points; use --config {output_dir}/best.yaml for other sets"
    )
    for axis in at_edge:
        logging.warning(f"the best {axis} is at the edge of the grid: a better one may lie outside")


def reranked(entry: NBestEntry, candidate: Candidate, scales: RescoringScales) -> NBestEntry:
    """The entry with its new score and what that is made of (weighed, as in ``nbest.jsonl``)."""
    parts: Mapping[str, Any] = {
        "acoustic": candidate.score,
        "lm": -scales.ilm_weight * candidate.ilm,
        "external_lm": scales.lm_weight * candidate.lm,
        "prior": -scales.prior_weight * candidate.prior,
        "bonus": scales.length_bonus * candidate.length,
        "blank": None,
        "frames": list(entry.parts.get("frames", [])),
    }
    return NBestEntry(entry.text, candidate.total(scales), entry.token_ids, entry.tokens, parts)
