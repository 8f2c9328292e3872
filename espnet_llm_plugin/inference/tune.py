"""Tune the scales of a trained model on a data set: the body of ``bin/tune_scales``."""

import argparse
import json
import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch
import yaml
from tqdm import tqdm

from espnet_llm_plugin import registry
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError, first_line
from espnet_llm_plugin.fusion.tuning import (
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
from espnet_llm_plugin.inference.batches import Utterance, by_length
from espnet_llm_plugin.inference.decode import FAILURES
from espnet_llm_plugin.inference.loading import LoadedASR, load_asr, load_lm, require_file
from espnet_llm_plugin.inference.options import device_of, identity
from espnet_llm_plugin.inference.recognizer import (
    build_search,
    default_scales,
    encode,
    is_factorized,
)
from espnet_llm_plugin.inference.utterances import Utterances, read_keys
from espnet_llm_plugin.transducer.hypothesis import Scales


def tune(args: argparse.Namespace) -> Point:
    """Search the grid, write the results into ``args.output_dir``, return the best point.

    Raises:
        UserError: Bad options, models or data.
    """
    if args.ngpu > 1:
        raise UserError(f"--ngpu {args.ngpu}: tuning uses one GPU")
    for name, what in (("nj", "process"), ("batch_size", "utterance")):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least one {what} is needed")
    device_of(args)
    if len(args.data_path_and_name_and_type) != 1:
        raise UserError("give --data_path_and_name_and_type once, for `speech`")
    require_file(args.text, "--text", "the transcripts, `utterance-id words ...` a line")
    references = read_clean_table(args.text, may_be_empty=True)
    keys = read_keys(args.key_file or args.data_path_and_name_and_type[0][0])
    without = [key for key in keys if key not in references]
    if without:
        raise UserError(f"{args.text} has no transcript of {len(without)} utterances: {without[0]}")

    output_dir = Path(args.output_dir)
    files = [args.asr_train_config, args.asr_model_file, args.lm_train_config, args.lm_file]
    same = identity(args, [*files, args.predictor_file, args.text])
    done = finished(output_dir, same)
    if done is not None:
        logging.info(f"{output_dir} has the results of this grid already")
        return done

    start = time.perf_counter()
    processes = 1 if args.ngpu else min(args.nj, len(keys))
    if processes == 1:
        grid, texts, failed = run_part(args, 0, 1)
    else:
        grid, texts, failed = run_parts(args, processes)
    if len(failed) == len(keys):
        utt, reason = next(iter(failed.items()))
        raise UserError(f"not one utterance could be decoded; {utt} {reason}")
    failed = {key: failed[key] for key in keys if key in failed}
    for utt, reason in failed.items():
        logging.warning(f"{utt} {reason}: counted as empty")
    hypotheses = [texts.get(key, [""] * len(grid)) for key in keys]
    points = score_grid(grid, [references[key] for key in keys], hypotheses)
    seconds = time.perf_counter() - start
    best = best_point(points)
    write_results(output_dir, args, points, best, same, seconds, failed)
    return best


def run_part(
    args: argparse.Namespace, part: int, parts: int
) -> tuple[list[Scales], dict[str, list[str]], dict[str, str]]:
    """Search every ``parts``-th utterance.

    Returns:
        The grid, texts of each utterance at all points, reasons of utterances that failed.
    """
    device = device_of(args)
    asr = load_asr(
        args.asr_train_config,
        args.asr_model_file,
        device=device,
        predictor=args.predictor,
        predictor_conf=args.predictor_conf,
        predictor_file=args.predictor_file,
        token_type=args.token_type,
        bpemodel=args.bpemodel,
    )
    if asr.text.text([]) is None:
        raise UserError("the model has no token_type: give --token_type, so that words exist")
    lm = None
    if args.lm_train_config:
        lm = load_lm(args.lm_train_config, args.lm_file, asr.model.token_list, device=device)
    grid = grid_of(args, asr, has_lm=lm is not None, quiet=part > 0)
    search = build_search(
        asr, lm, beam_size=args.beam_size, max_symbols_per_frame=args.max_symbols_per_frame
    )
    data = Utterances(
        args.data_path_and_name_and_type,
        asr.train_args,
        sample_rate=asr.sample_rate,
        key_file=args.key_file,
    )
    mine = data.keys[part::parts]
    if part == 0:
        logging.info(f"{len(grid)} points, {len(data)} utterances, {parts} processes")
    texts: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    skip = set(data.keys) - set(mine)
    progress = tqdm(total=len(mine), unit="utt", disable=part > 0 or not sys.stderr.isatty())

    def readable() -> Iterator[Utterance]:
        for utt, speech, reason in data.read(skip=list(skip)):
            if reason:
                failed[utt] = reason
            else:
                yield Utterance(utt, speech)

    def decode(batch: Sequence[Utterance]) -> None:
        encoder_out, lengths = encode(asr.model, [utterance.speech for utterance in batch])
        encoded = [out[:length] for out, length in zip(encoder_out, lengths.tolist())]
        for utterance, hyps in zip(
            batch, search_grid(search, encoded, grid, args.normalize_length)
        ):
            texts[utterance.utt] = [text_of(asr, hyp.labels) for hyp in hyps]

    for batch in by_length(readable(), args.batch_size):
        try:
            decode(batch)
        except FAILURES as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) and len(batch) == 1:
                raise
            # One by one, so that only the utterance that fails is lost.
            for utterance in batch:
                try:
                    decode([utterance])
                except FAILURES as error:
                    if isinstance(error, torch.cuda.OutOfMemoryError):
                        raise
                    failed[utterance.utt] = first_line(error)
        progress.update(len(batch))
    progress.close()
    return grid, texts, failed


def run_parts(args: argparse.Namespace, processes: int):
    """:func:`run_part` in several processes."""
    # Forked after ESPnet is imported (10 s) and before a model exists or a thread runs.
    registry.register()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        processes, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        parts = [pool.submit(run_part, args, part, processes) for part in range(processes)]
        results = [part.result() for part in parts]
    texts = {utt: found for _, part, _ in results for utt, found in part.items()}
    failed = {utt: reason for _, _, part in results for utt, reason in part.items()}
    return results[0][0], texts, failed


def text_of(asr: LoadedASR, labels: Sequence[int]) -> str:
    """Text of labels."""
    return asr.text.text(asr.text.tokens([label + 1 for label in labels]))


def grid_of(
    args: argparse.Namespace, asr: LoadedASR, has_lm: bool, quiet: bool = False
) -> list[Scales]:
    """The part of the grid that means something for this model; the rest is dropped, and said."""
    default = default_scales(asr)
    alphas, betas, lm_weights = args.alphas, args.betas, args.lm_weights
    if not is_factorized(asr):
        if (alphas or betas) and not quiet:
            logging.warning("this model has no predictor LM: alphas and betas are left out")
        alphas = betas = None
    if not has_lm:
        if lm_weights and not quiet:
            logging.warning("no external LM is given: lm_weights are left out")
        lm_weights = [0.0]
    elif not lm_weights:
        raise UserError("an external LM is given: add --lm_weights, the weights to try")
    return make_grid(
        alphas or [default.alpha],
        betas or [default.beta],
        lm_weights,
        args.label_bonuses or [default.label_bonus],
    )


def write_results(
    output_dir: Path,
    args: argparse.Namespace,
    points: Sequence[Point],
    best: Point,
    same: dict[str, Any],
    seconds: float,
    failed: dict[str, str],
) -> None:
    """``best.yaml``, ``table.txt``, ``heat_map.png`` (two axes), and last ``scales.json``."""
    keep = ("beam_size", "max_symbols_per_frame", "normalize_length")
    axes = used_axes(points, bool(args.lm_train_config))
    scales = {axis: getattr(best.scales, axis) for axis in axes}
    with atomic_write(output_dir / "best.yaml") as stream:
        stream.write(f"# WER {best.wer:.2f} % on {args.text}, best of {len(points)} points\n")
        yaml.safe_dump({**scales, **{name: getattr(args, name) for name in keep}}, stream)
    listing = table(points)
    with atomic_write(output_dir / "table.txt") as stream:
        stream.write(listing)
    figure = heat_map(points, best)
    if figure is not None:
        with atomic_write(output_dir / "heat_map.png", "wb") as stream:
            figure.savefig(stream, format="png", dpi=150)
    at_edge = edges(best, points)
    with atomic_write(output_dir / "scales.json") as stream:
        content = {
            "best": best.as_dict(axes),
            "at_edge": at_edge,
            "points": [point.as_dict(axes) for point in points],
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
    best = content["best"]
    scales = {name: best.pop(name) for name in vars(Scales()) if name in best}
    return Point(Scales(**scales), **best)
