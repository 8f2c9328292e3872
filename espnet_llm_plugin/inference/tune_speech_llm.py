"""Tune the weights of a speech LLM's search.

The audio is encoded and read by the LLM once, whatever the number of points.
"""

import argparse
import itertools
import logging
from typing import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.held_out import HeldOut
from espnet_llm_plugin.inference.speech_llm import has_token_ctc
from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights

# Options that a decoding needs besides the weights, to give what was tuned.
KEPT = (
    "beam_size",
    "ctc_top_k",
    "ctc_compression",
    "max_tokens_per_second",
    "max_repeats",
    "max_repeat_ngram",
    "end_detection",
)
DEFAULT_CTC_WEIGHTS = [0.5]  # ESPnet's
# Of the grid, without a meaning for other models; and the reverse.
OURS = ("ctc_weights", "textlm_weights", "length_norms")
THEIRS = ("alphas", "betas", "ilm_weights")

LeftOut = Callable[[str, str], None]


def leave_out(args: argparse.Namespace, left_out: LeftOut) -> None:
    """Say which parts of the grid another model does not have."""
    given = [name for name in OURS if getattr(args, name)]
    if given:
        left_out(", ".join(given), "this model is no speech_llm")


def run_part(
    held_out: HeldOut, part: int, parts: int, args: argparse.Namespace
) -> tuple[list[SearchWeights], dict[str, list[str]], dict[str, str]]:
    """Search every ``parts``-th utterance at all points.

    Returns:
        The grid, texts of each utterance at all points, reasons of utterances that failed.
    """
    grid = grid_of(args, held_out, quiet=part > 0)
    if part == 0:
        logging.info(f"{len(grid)} points, {len(held_out.data)} utterances, {parts} processes")
    recognizer = held_out.speech_llm
    used = {name for weights in grid for name in weights.by_scorer()}
    texts: dict[str, list[str]] = {}

    def decode(utts: list[str], encoded: list[torch.Tensor]) -> None:
        lengths = torch.tensor([len(one) for one in encoded])
        seconds = [held_out.seconds.get(utt) for utt in utts]
        padded = pad_sequence(encoded, batch_first=True)
        codes = [None] * len(utts) if held_out.languages is None else held_out.languages.of(utts)
        languages = recognizer.language_numbers(codes)
        prepared = recognizer.prepare(padded, lengths, seconds, used, languages)
        found = [recognizer.search_prepared(prepared, weights) for weights in grid]
        for utt, lists in zip(utts, zip(*found)):
            texts[utt] = [recognizer.recognition(hyps[:1]).text for hyps in lists]

    failed = held_out.for_each_batch(decode, part, parts)
    return grid, texts, failed


def grid_of(
    args: argparse.Namespace, held_out: HeldOut, quiet: bool = False
) -> list[SearchWeights]:
    """Every combination of the weights that mean something for this model; the rest is said.

    Raises:
        UserError: An LM without weights to try, or CTC weights without a CTC head.
    """

    def left_out(what: str, why: str) -> None:
        if not quiet:
            logging.warning(f"{why}: {what} are left out")

    given = [name for name in THEIRS if getattr(args, name)]
    if given:
        left_out(", ".join(given), "a speech_llm has no predictor and no blank")
    ctc_weights = args.ctc_weights or DEFAULT_CTC_WEIGHTS
    if not has_token_ctc(held_out.asr):
        if args.ctc_weights and any(args.ctc_weights):
            raise UserError(
                f"--ctc_weights {args.ctc_weights}: the model has no CTC head over the decoder's "
                "tokens; leave them out"
            )
        ctc_weights = [0.0]
    lm_weights: Sequence[float] = [0.0]
    if held_out.has_lm:
        if not args.lm_weights:
            raise UserError("an external LM is given: add --lm_weights, the weights to try")
        lm_weights = args.lm_weights
    elif args.lm_weights:
        left_out("lm_weights", "no external LM is given")
    lists = (
        ctc_weights,
        args.textlm_weights or [0.0],
        lm_weights,
        args.label_bonuses or [0.0],
        args.length_norms or [1.0 if args.normalize_length else 0.0],
    )
    axes = (dict.fromkeys(values) for values in lists)
    return [SearchWeights(*values) for values in itertools.product(*axes)]
