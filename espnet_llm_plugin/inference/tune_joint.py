"""Tune the weights of ESPnet's search for a model with an attention decoder.

What ``bin/tune_fusion`` does for such models. The held-out set is searched at the middle of the
grid and with the least LM, and every hypothesis that ended is kept with the unweighted score of
each scorer. Every point of the grid is then a re-ranking of these lists; the most promising
points are searched, which confirms their word errors and lengthens the lists.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch

from espnet_llm_plugin import registry
from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.joint_sum import (
    JointCandidate,
    JointWeights,
    first_points,
    joint_grid,
)
from espnet_llm_plugin.fusion.reranking import alternate
from espnet_llm_plugin.fusion.rescoring import grid_points
from espnet_llm_plugin.fusion.tuning import Point, best_point, score_grid
from espnet_llm_plugin.inference.espnet_search import (
    LLM_OPTIONS,
    added_scorers,
    check_lms,
    search_with,
)
from espnet_llm_plugin.inference.fusion_options import used_options
from espnet_llm_plugin.inference.held_out import (
    HeldOut,
    check_failures,
    model_files,
    read_references,
    workers,
)
from espnet_llm_plugin.inference.label_lms import ATTENTION_ILMS
from espnet_llm_plugin.inference.loading import (
    LoadedASR,
    TextConverter,
    require_file,
    sample_rate,
)
from espnet_llm_plugin.inference.options import device_of, identity
from espnet_llm_plugin.inference.tune import finished, write_results

# Options of ESPnet's Speech2Text by the same names.
_MODELS = ("asr_train_config", "asr_model_file", "lm_train_config", "lm_file")
_MODELS += ("token_type", "bpemodel")
# Of the grid, without a meaning for these models.
_OTHERS = ("alphas", "betas", "prior_weights", "textlm_weights", "length_norms")

Labels = tuple[int, ...]
NBEST = "nbest.jsonl"


class Found(NamedTuple):
    """What the search of a part of the utterances brings."""

    texts: dict[str, list[str]]  # of the points searched
    candidates: dict[str, dict[Labels, JointCandidate]]
    failed: dict[str, str]


def tune_joint(args: argparse.Namespace) -> Point:
    """Tune, write the results into ``args.output_dir``, return the best searched point.

    Raises:
        UserError: Bad options, models or data.
    """
    check_options(args)
    grid = grid_of(args)
    references = read_references(args)
    output_dir = Path(args.output_dir)
    same = identity(args, model_files(args))
    done = finished(output_dir, same)
    if done is not None:
        logging.info(f"{output_dir} has the results of this grid already")
        return done

    start = time.perf_counter()
    lists: dict[str, dict[Labels, JointCandidate]] = {utt: {} for utt in references}
    failed: dict[str, str] = {}
    with workers(args, len(references), JointHeldOut) as run:

        def search(points: Sequence[JointWeights]) -> list[Point]:
            texts: dict[str, list[str]] = {}
            for found in run(search_part, args, points):
                texts.update(found.texts)
                failed.update(found.failed)
                for utt, candidates in found.candidates.items():
                    lists[utt] = {**candidates, **lists[utt]}
            check_failures(failed, list(references))
            hypotheses = [texts.get(utt, [""] * len(points)) for utt in references]
            return score_grid(points, list(references.values()), hypotheses)

        def rerank() -> list[Point]:
            nothing = [JointCandidate("")]
            candidates = {utt: list(some.values()) or nothing for utt, some in lists.items()}
            return grid_points(candidates, references, grid)

        logging.info(f"{len(grid)} points, {len(references)} utterances")
        searched = {point.scales: point for point in search(first_points(grid))}
        reranked = alternate(search, rerank, searched, args.rounds, args.cells)
    for utt, reason in failed.items():
        logging.warning(f"{utt} {reason}: counted as empty")
    points = [searched.get(point.scales, point) for point in reranked]
    best = best_point(points, searched)
    logging.info(
        f"searched {len(searched)} of {len(grid)} points; lists of "
        f"{sum(map(len, lists.values())) / len(lists):.1f} hypotheses in the mean"
    )
    with atomic_write(output_dir / NBEST) as stream:
        for utt, candidates in lists.items():
            for labels, candidate in candidates.items():
                line = {"utt": utt, "labels": labels, **vars(candidate)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    others = {point.scales for point in points if point.scales not in searched}
    seconds = time.perf_counter() - start
    write_results(output_dir, args, points, best, same, seconds, failed, others)
    return best


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that ESPnet's search does not have.

    Raises:
        UserError: Names the option and why.
    """
    for name in ("rounds", "cells"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1 is needed")
    if args.nbest_files:
        raise UserError(
            "--nbest_files are those of our searches, with the parts of the scores; a model with "
            "an attention decoder is searched by ESPnet: leave them out"
        )
    for name in used_options(args):
        if name not in LLM_OPTIONS:
            raise UserError(
                f"--{name} {getattr(args, name)}: it is for CTC models and transducers, and this "
                "model has an attention decoder"
            )
    for name in LLM_OPTIONS:
        if name in used_options(args) and not args.fusion_llm:
            raise UserError(f"--{name} {getattr(args, name)}: it needs --fusion_llm")
    for name in ("predictor", "chunk_ms"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name} {getattr(args, name)}: this model has an attention decoder, and "
                "ESPnet's search does not know it"
            )
    check_lms(args)


def grid_of(args: argparse.Namespace) -> list[JointWeights]:
    """Every combination of the weights that mean something for this model; the rest is said.

    Raises:
        UserError: A language model without weights to try.
    """
    given = [name for name in _OTHERS if getattr(args, name)]
    if given:
        logging.warning(f"this model has an attention decoder: {', '.join(given)} are left out")

    def weights_of(name: str, there: bool, what: str) -> Sequence[float]:
        values = getattr(args, name)
        if there and not values:
            raise UserError(f"{what} is given: add --{name}, the weights to try")
        if values and not there:
            logging.warning(f"no {what} is given: {name} are left out")
        return values if there else [0.0]

    has_lm = bool(args.lm_train_config or args.fusion_llm)
    return joint_grid(
        args.ctc_weights or [JointWeights().ctc_weight],
        weights_of("lm_weights", has_lm, "an external LM"),
        weights_of("ilm_weights", args.ilm in ATTENTION_ILMS, "an internal LM (--ilm)"),
        args.label_bonuses or [0.0],
    )


class JointHeldOut(HeldOut):
    """The utterances, and ESPnet's ``Speech2Text`` with our scorers.

    Args:
        args: Options of ``tune_fusion``.

    Raises:
        UserError: Bad options, models or data.
    """

    def __init__(self, args: argparse.Namespace):
        registry.register()
        require_file(args.asr_model_file, "--asr_model_file", "the checkpoint, a .pth file")
        if args.lm_train_config:
            require_file(args.lm_file, "--lm_file", "the LM's checkpoint")
        # Any weights but 0, so that no scorer is left out.
        self.speech2text = import_quietly("espnet2.bin.asr_inference").Speech2Text(
            **{name: getattr(args, name) for name in _MODELS},
            device=device_of(args),
            beam_size=args.beam_size,
            ctc_weight=0.5,
            lm_weight=1.0,
            penalty=1.0,
            normalize_length=args.normalize_length,
        )
        logging.getLogger("espnet").setLevel(logging.ERROR)  # a dozen lines for each utterance
        model, train_args = self.speech2text.asr_model, self.speech2text.asr_train_args
        self.added = added_scorers(args, self.speech2text)
        self.asr = LoadedASR(
            model=model,
            train_args=train_args,
            text=TextConverter(
                model.token_list,
                args.token_type or train_args.token_type,
                args.bpemodel or train_args.bpemodel,
            ),
            is_ctc=False,
            sample_rate=sample_rate(train_args),
        )
        self.open_data(args)


@torch.no_grad()
def search_part(
    held_out: JointHeldOut,
    part: int,
    parts: int,
    args: argparse.Namespace,
    points: Sequence[JointWeights],
) -> Found:
    """Search every ``parts``-th utterance at some points."""
    searches = [
        search_with(held_out.speech2text, held_out.added, weights.in_search()) for weights in points
    ]
    texts: dict[str, list[str]] = {}
    candidates: dict[str, dict[Labels, JointCandidate]] = {}
    convert = held_out.asr.text

    def work(utts: list[str], encoded: list[torch.Tensor]) -> None:
        for utt, encoder_out in zip(utts, encoded):
            best, found = [], {}
            for search in searches:
                ended = search(x=encoder_out)
                for n, hyp in enumerate(ended):
                    labels = tuple(token for token in hyp.yseq[1:-1].tolist() if token != 0)
                    text = convert.text(convert.tokens(labels))
                    found.setdefault(labels, _candidate(hyp, text, args.normalize_length))
                    if n == 0:
                        best.append(text)
                if not ended:
                    best.append("")
            texts[utt], candidates[utt] = best, found

    failed = held_out.for_each_batch(work, part, parts)
    return Found(texts, candidates, failed)


def _candidate(hyp: Any, text: str, normalize_length: bool) -> JointCandidate:
    length = len(hyp.yseq) - 1 if normalize_length else 1
    return JointCandidate(
        text, **{name: float(score) / length for name, score in hyp.scores.items()}
    )
