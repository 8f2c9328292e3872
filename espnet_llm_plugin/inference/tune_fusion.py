"""Tune scales by re-ranking n-best lists and searching the best points only.

The body of ``bin/tune_fusion``; of models with an attention decoder: ``tune_joint.py``. Lists come
from files that ``asr_inference --nbest N`` wrote, or from searches at three points of the grid.
Every point is scored on the lists; the most promising ones are searched, which lengthens the lists,
and so on, until that brings nothing [as minimum error rate training alternates n-best lists and
weights, Och 2003].
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence

import torch

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.reranking import (
    Candidate,
    Reranker,
    alternate,
    first_points,
)
from espnet_llm_plugin.fusion.tuning import Point, best_point, score_grid, search_lists
from espnet_llm_plugin.inference.held_out import (
    HeldOut,
    check_failures,
    model_files,
    read_references,
    workers,
)
from espnet_llm_plugin.inference.loading import has_attention_decoder
from espnet_llm_plugin.inference.nbest_files import StoredHypothesis, read_nbest
from espnet_llm_plugin.inference.options import identity
from espnet_llm_plugin.inference.recognizer import is_factorized
from espnet_llm_plugin.inference.tune import finished, grid_of, write_results
from espnet_llm_plugin.inference.tune_joint import tune_joint
from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.prefix_tree import PrefixTree
from espnet_llm_plugin.transducer.unweighted_scores import (
    external_lm_log_probs,
    factorized_log_probs,
    lm_log_probs,
    prior_log_probs,
)

Labels = tuple[int, ...]
NBEST = "nbest.jsonl"


class Found(NamedTuple):
    """What the search of a part of the utterances brings."""

    texts: dict[str, list[str]]  # of the points searched
    candidates: dict[str, list[Candidate]]  # new ones
    failed: dict[str, str]


def tune_fusion(args: argparse.Namespace) -> Point:
    """Tune, write the results into ``args.output_dir``, return the best searched point.

    Raises:
        UserError: Bad options, models or data.
    """
    if has_attention_decoder(args.asr_train_config):
        return tune_joint(args)
    for name in ("rounds", "cells"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1 is needed")
    references = read_references(args)
    stored = read_nbest(args.nbest_files, references)
    output_dir = Path(args.output_dir)
    same = identity(args, [*model_files(args), *args.nbest_files])
    done = finished(output_dir, same)
    if done is not None:
        logging.info(f"{output_dir} has the results of this grid already")
        return done

    start = time.perf_counter()
    with workers(args, len(references)) as run:
        grid = run(grid_of_part, args)[0]
        alphas = list(dict.fromkeys(scales.alpha for scales in grid))
        lists = Reranker(references, alphas, args.normalize_length)
        failed: dict[str, str] = {}

        def search(
            points: Sequence[Scales], given: Optional[dict[str, list[StoredHypothesis]]] = None
        ) -> list[Point]:
            known = {utt: lists.known(utt) for utt in references}
            texts: dict[str, list[str]] = {}
            for found in run(explore, args, grid, points, known, given or {}):
                texts.update(found.texts)
                failed.update(found.failed)
                for utt, candidates in found.candidates.items():
                    lists.add(utt, candidates)
            check_failures(failed, list(references))
            hypotheses = [texts.get(utt, [""] * len(points)) for utt in references]
            return score_grid(points, list(references.values()), hypotheses)

        first = search([] if stored else first_points(grid), stored)
        searched = {point.scales: point for point in first}
        reranked = alternate(search, lambda: lists.points(grid), searched, args.rounds, args.cells)

    failed = {utt: failed[utt] for utt in references if utt in failed}
    for utt, reason in failed.items():
        logging.warning(f"{utt} {reason}: counted as empty")
    points = [searched.get(point.scales, point) for point in reranked]
    best = best_point(points, searched)
    with atomic_write(output_dir / NBEST) as stream:
        for utt in references:
            for candidate in lists.candidates(utt):
                line = {"utt": utt, **candidate.as_dict()}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    seconds = time.perf_counter() - start
    logging.info(f"searched {len(searched)} of {len(grid)} points")
    others = {point.scales for point in points if point.scales not in searched}
    write_results(output_dir, args, points, best, same, seconds, failed, others)
    return best


def grid_of_part(
    held_out: HeldOut, part: int, parts: int, args: argparse.Namespace
) -> list[Scales]:
    """The grid; see :func:`~espnet_llm_plugin.inference.tune.grid_of`."""
    if held_out.asr.is_speech_llm:
        raise UserError("tune_fusion is for transducers and CTC; tune a speech_llm by tune_scales")
    grid = grid_of(args, held_out.asr, has_lm=held_out.has_lm, quiet=part > 0)
    if part == 0:
        logging.info(f"{len(grid)} points, {len(held_out.data)} utterances, {parts} processes")
    return grid


def explore(
    held_out: HeldOut,
    part: int,
    parts: int,
    args: argparse.Namespace,
    grid: Sequence[Scales],
    points: Sequence[Scales],
    known: dict[str, set[Labels]],
    given: dict[str, list[StoredHypothesis]],
) -> Found:
    """Search every ``parts``-th utterance at some points, and score what is new in the lists.

    Args:
        grid: All points: says which parts of the scores are needed.
        points: Of the grid; none: only score what is given.
        known: Label sequences that are scored already.
        given: Stored hypotheses to score.
    """
    texts: dict[str, list[str]] = {}
    candidates: dict[str, list[Candidate]] = {}

    def work(utts: list[str], encoded: list[torch.Tensor]) -> None:
        if points:
            found = search_lists(
                held_out.search, encoded, points, held_out.search.beam_size, args.normalize_length
            )
            trees = [utterance.tree for utterance in found]
        else:
            # one tree for the batch, without frames: the prefixes are those of the given lists
            trees = [held_out.search.start(grid[:1]).tree] * len(utts)
        for number, (utt, one, tree) in enumerate(zip(utts, encoded, trees)):
            hyps = {stored.labels: stored.acoustic for stored in given.get(utt, ())}
            if points:
                lists = found[number].lists
                texts[utt] = [held_out.text_of(hyps_of_point[0].labels) for hyps_of_point in lists]
                for hyp in sorted(
                    (hyp for hyps_of_point in lists for hyp in hyps_of_point),
                    key=lambda hyp: hyp.acoustic,
                ):
                    hyps[hyp.labels] = hyp.acoustic  # the beam that kept most of its alignments
            new = {labels: score for labels, score in hyps.items() if labels not in known[utt]}
            candidates[utt] = list(_candidates(held_out, one, new, grid, tree))

    failed = held_out.for_each_batch(work, part, parts)
    return Found(texts, candidates, failed)


def _candidates(
    held_out: HeldOut,
    encoder_out: torch.Tensor,
    hypotheses: dict[Labels, float],
    grid: Sequence[Scales],
    tree: PrefixTree,
) -> Iterator[Candidate]:
    """Candidates from label sequences and the acoustic scores that a search gave them."""
    sequences = list(hypotheses)
    highest = max((label for labels in sequences for label in labels), default=0)
    if highest >= held_out.search.num_labels:
        raise UserError(
            f"the n-best lists have a token {highest + 1}, but the model has "
            f"{len(held_out.asr.model.token_list)} tokens: they are another model's"
        )
    if is_factorized(held_out.asr):
        # at every alpha, and at the search's own without its pruning: comparable numbers
        alphas: list[Optional[float]] = list(dict.fromkeys(scales.alpha for scales in grid))
        decoder = held_out.asr.model.decoder
        acoustic = factorized_log_probs(decoder, encoder_out, sequences, alphas, tree).T.tolist()
    else:
        acoustic = [[score] for score in hypotheses.values()]
    lm = external = prior = [0.0] * len(sequences)
    if any(scales.beta for scales in grid):
        lm = lm_log_probs(tree, sequences)
    if any(scales.lm_weight for scales in grid):
        external = external_lm_log_probs(tree, sequences, held_out.search.fusion)
    if any(scales.prior_weight for scales in grid):
        prior = prior_log_probs(tree, sequences, held_out.search.fusion)
    for labels, *parts in zip(sequences, acoustic, lm, external, prior):
        yield Candidate(labels, held_out.text_of(labels), tuple(parts[0]), *parts[1:])
