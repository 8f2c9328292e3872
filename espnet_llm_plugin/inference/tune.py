"""Tune the scales of a trained model on a data set: the body of ``bin/tune_scales``."""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any, Collection, Optional, Sequence

import torch
import yaml

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.joint_sum import JointWeights
from espnet_llm_plugin.fusion.tuning import (
    AnyScales,
    Point,
    best_point,
    edges,
    heat_map,
    make_grid,
    score_grid,
    search_grid,
    table,
    used_axes,
)
from espnet_llm_plugin.inference import tune_speech_llm
from espnet_llm_plugin.inference.fusion_options import has_external_lm, used_options
from espnet_llm_plugin.inference.held_out import (
    HeldOut,
    check_failures,
    model_files,
    read_references,
    workers,
)
from espnet_llm_plugin.inference.label_lms import ATTENTION_ILMS
from espnet_llm_plugin.inference.loading import LoadedASR, has_attention_decoder
from espnet_llm_plugin.inference.options import identity
from espnet_llm_plugin.inference.recognizer import default_scales, is_factorized
from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
from espnet_llm_plugin.transducer.hypothesis import Scales


def tune(args: argparse.Namespace) -> Point:
    """Search the grid, write the results into ``args.output_dir``, return the best point.

    Raises:
        UserError: Bad options, models or data.
    """
    if has_attention_decoder(args.asr_train_config):
        raise UserError(
            f"{args.asr_train_config} is of a model with an attention decoder, which ESPnet "
            "searches point by point: `python -m espnet_llm_plugin.bin.tune_fusion` tunes it from "
            "n-best lists"
        )
    references = read_references(args)
    output_dir = Path(args.output_dir)
    same = identity(args, model_files(args))
    done = finished(output_dir, same)
    if done is not None:
        logging.info(f"{output_dir} has the results of this grid already")
        return done

    start = time.perf_counter()
    texts: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    with workers(args, len(references)) as run:
        for points_of_part, some_texts, some_failed in run(run_part, args):
            grid = points_of_part  # the same in every part
            texts.update(some_texts)
            failed.update(some_failed)
    failed = check_failures(failed, list(references))
    for utt, reason in failed.items():
        logging.warning(f"{utt} {reason}: counted as empty")
    hypotheses = [texts.get(key, [""] * len(grid)) for key in references]
    points = score_grid(grid, list(references.values()), hypotheses)
    best = best_point(points)
    seconds = time.perf_counter() - start
    write_results(output_dir, args, points, best, same, seconds, failed)
    return best


def run_part(
    held_out: HeldOut, part: int, parts: int, args: argparse.Namespace
) -> tuple[list[AnyScales], dict[str, list[str]], dict[str, str]]:
    """Search every ``parts``-th utterance.

    Returns:
        The grid, texts of each utterance at all points, reasons of utterances that failed.
    """
    if held_out.asr.is_speech_llm:
        return tune_speech_llm.run_part(held_out, part, parts, args)
    grid = grid_of(args, held_out.asr, has_lm=held_out.has_lm, quiet=part > 0)
    if part == 0:
        logging.info(f"{len(grid)} points, {len(held_out.data)} utterances, {parts} processes")
    texts: dict[str, list[str]] = {}

    def decode(utts: list[str], encoded: list[torch.Tensor]) -> None:
        lists = search_grid(held_out.search, encoded, grid, args.normalize_length)
        for utt, hyps in zip(utts, lists):
            texts[utt] = [held_out.text_of(hyp.labels) for hyp in hyps]

    failed = held_out.for_each_batch(decode, part, parts)
    return grid, texts, failed


def grid_of(
    args: argparse.Namespace, asr: LoadedASR, has_lm: bool, quiet: bool = False
) -> list[Scales]:
    """The part of the grid that means something for this model; the rest is dropped, and said."""

    def left_out(what: str, why: str) -> None:
        if not quiet:
            logging.warning(f"{why}: {what} are left out")

    tune_speech_llm.leave_out(args, left_out)
    default = default_scales(asr)
    alphas, betas, lm_weights = args.alphas, args.betas, args.lm_weights
    if is_factorized(asr):
        if args.ilm_weights:
            left_out(
                "ilm_weights", "beta weighs this model's internal LM (below 0 it is subtracted)"
            )
    else:
        if alphas or betas:
            left_out("alphas and betas", "this model has no predictor LM")
        alphas = betas = None
        if args.ilm_weights and asr.is_ctc:
            left_out("ilm_weights", "a CTC model has no internal LM")
        elif args.ilm_weights:
            betas = [0.0 - weight for weight in args.ilm_weights]
    prior_weights = args.prior_weights
    if prior_weights and not args.prior_file:
        left_out("prior_weights", "no prior is given")
        prior_weights = None
    elif args.prior_file and not prior_weights:
        raise UserError("a prior is given: add --prior_weights, the weights to try")
    if not has_lm:
        if lm_weights:
            left_out("lm_weights", "no external LM is given")
        lm_weights = [0.0]
    elif not lm_weights:
        raise UserError("an external LM is given: add --lm_weights, the weights to try")
    return make_grid(
        alphas or [default.alpha],
        betas or [default.beta],
        lm_weights,
        args.label_bonuses or [default.label_bonus],
        prior_weights or [0.0],
    )


def write_results(
    output_dir: Path,
    args: argparse.Namespace,
    points: Sequence[Point],
    best: Point,
    same: dict[str, Any],
    seconds: float,
    failed: dict[str, str],
    reranked: Collection[Scales] = (),
) -> None:
    """``best.yaml``, ``table.txt``, ``heat_map.png`` (two axes), and last ``scales.json``.

    Args:
        reranked: Scales whose word errors come from n-best lists, not from a search.
    """
    if isinstance(best.scales, SearchWeights):
        keep = tune_speech_llm.KEPT
    elif isinstance(best.scales, JointWeights):
        keep = ("beam_size", "normalize_length", *used_options(args))
        keep += ("ilm", "ilm_file") if args.ilm in ATTENTION_ILMS else ()
    else:
        keep = ("beam_size", "max_symbols_per_frame", "normalize_length", *used_options(args))
    axes = used_axes(points, has_external_lm(args))
    with atomic_write(output_dir / "best.yaml") as stream:
        stream.write(f"# WER {best.wer:.2f} % on {args.text}, best of {len(points)} points\n")
        scales = best.scales_of(axes)
        search = {"search": "espnet"} if isinstance(best.scales, JointWeights) else {}
        kept = {name: getattr(args, name) for name in keep if getattr(args, name) is not None}
        yaml.safe_dump({**search, **scales, **kept}, stream)
    listing = table(points, reranked)
    with atomic_write(output_dir / "table.txt") as stream:
        stream.write(listing)
    figure = heat_map(points, best, reranked)
    if figure is not None:
        with atomic_write(output_dir / "heat_map.png", "wb") as stream:
            figure.savefig(stream, format="png", dpi=150)
    at_edge = edges(best, points)
    with atomic_write(output_dir / "scales.json") as stream:
        listed = [
            {**point.as_dict(axes), **({"reranked": True} if point.scales in reranked else {})}
            for point in points
        ]
        content = {
            "best": best.as_dict(axes),
            "at_edge": at_edge,
            "points": listed,
            "seconds": round(seconds, 2),
            "failed": failed,
            "identity": same,
        }
        json.dump(content, stream, indent=1, ensure_ascii=False)
    logging.info(f"all points, best first:\n{listing}")
    logging.info(
        f"best: {best.as_dict(axes)} in {seconds:.1f} s; use --config {output_dir}/best.yaml"
    )
    for axis in at_edge:
        logging.warning(f"the best {axis} is at the edge of the grid: a better one may lie outside")


def finished(output_dir: Path, same: dict[str, Any]) -> Optional[Point]:
    """The best point of a finished, identical tuning."""
    path = output_dir / "scales.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["identity"] != json.loads(json.dumps(same)):
        return None
    return Point.from_dict(content["best"])
