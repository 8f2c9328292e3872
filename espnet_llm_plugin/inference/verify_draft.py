"""Greedy drafts of a data set, verified by a language model: the body of ``bin/verify_draft``."""

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError, first_line
from espnet_llm_plugin.fusion.prior import load_prior
from espnet_llm_plugin.fusion.reranking import word_errors
from espnet_llm_plugin.fusion.slots import ctc_slots, transducer_slots
from espnet_llm_plugin.fusion.verify import DraftVerifier, Slot, Verified
from espnet_llm_plugin.inference.batches import by_length
from espnet_llm_plugin.inference.decode import FAILURES
from espnet_llm_plugin.inference.held_out import check_failures
from espnet_llm_plugin.inference.label_lms import is_adapted, load_label_lm
from espnet_llm_plugin.inference.loading import TextConverter, load_model, require_file, sample_rate
from espnet_llm_plugin.inference.nbest_dirs import NBestEntry, write_nbest_dir
from espnet_llm_plugin.inference.options import device_of
from espnet_llm_plugin.inference.recognizer import encode
from espnet_llm_plugin.inference.utterances import Utterances
from espnet_llm_plugin.llm.directory import check_llm_tokens
from espnet_llm_plugin.scoring.plots import plot_thresholds
from espnet_llm_plugin.scoring.table import plain
from espnet_llm_plugin.transducer.base_model import AbsTransducerModel
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch

HEADER = ["threshold", "WER", "ins", "del", "sub", "opened %", "LM calls", "LM tokens", "seconds"]
HEADER += ["RTF"]  # of draft and verification together


class Drafts(NamedTuple):
    """Slots by utterance, and what they took."""

    slots: dict[str, list[Slot]]
    audio_seconds: float
    seconds: float
    failed: dict[str, str]


def verify_draft(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Draft once, verify at every threshold, write the results into ``args.output_dir``.

    Returns:
        A row of the table for each threshold.

    Raises:
        UserError: Bad options, models or data.
    """
    device = torch.device(device_of(args))
    references = None
    if args.text is not None:
        path = require_file(args.text, "--text", "transcripts of the data")
        references = read_clean_table(path, may_be_empty=True)
    if args.llm and not is_adapted(args.llm):
        raise UserError(
            f"--llm {args.llm} has its own tokens, and drafts are verified token by token: adapt "
            "it to the recogniser's tokens by `python -m espnet_llm_plugin.bin.adapt_vocabulary`, "
            "or rescore n-best lists with it (`... .bin.rescore`)"
        )
    model, train_args = load_model(args.asr_train_config, args.asr_model_file, str(device))
    tokens = list(model.token_list)
    lm, lm_tokens, _ = load_label_lm(args, device)
    if args.llm:
        check_llm_tokens(args.llm, tokens)
    elif lm_tokens != tokens:
        raise UserError(
            f"the LM of {args.lm_train_config} ({len(lm_tokens)} tokens) is over another token "
            f"list than the ASR model ({len(tokens)} tokens): train it on the model's"
        )
    text = TextConverter(tokens, train_args.token_type, args.bpemodel or train_args.bpemodel)
    drafts = make_drafts(args, model, train_args, tokens)
    with torch.inference_mode():  # loads an LLM, which is not to be counted as verification
        lm(torch.tensor([[len(tokens) - 1]], device=device), None)

    rows = []
    output_dir = Path(args.output_dir)
    for threshold in dict.fromkeys(args.thresholds):
        verifier = DraftVerifier(
            lambda ids: lm(ids, None)[0],
            len(tokens),
            device,
            threshold=threshold,
            lm_weight=args.lm_weight,
            label_bonus=args.label_bonus,
            beam_size=args.beam_size,
            score_end=args.eos == "eos",
        )
        start = time.perf_counter()
        found = verify_all(verifier, drafts.slots, args.batch_size)
        seconds = time.perf_counter() - start
        entries = {utt: _entry(found.get(utt), text) for utt in [*drafts.slots, *drafts.failed]}
        alone = len(args.thresholds) == 1
        write_nbest_dir(
            output_dir if alone else output_dir / f"threshold_{threshold:g}",
            {utt: [entry] for utt, entry in entries.items()},
        )
        hypotheses = {utt: entry.text for utt, entry in entries.items()}
        rows.append(_row(threshold, verifier, drafts, found, seconds, references, hypotheses))
    content = {
        "utterances": len(drafts.slots),
        "failed": drafts.failed,
        "audio_seconds": round(drafts.audio_seconds, 2),
        "draft_seconds": round(drafts.seconds, 3),
        "thresholds": rows,
    }
    with atomic_write(output_dir / "verification.json") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
    listing = plain(HEADER, [_cells(row) for row in rows])
    with atomic_write(output_dir / "table.txt") as stream:
        stream.write(listing)
    if references is not None and len(rows) > 1 and drafts.audio_seconds:
        plot_thresholds(
            [(row["rtf"], row["wer"], _name(row)) for row in rows],
            drafts.seconds / drafts.audio_seconds,
            output_dir / "speed.png",
        )
    logging.info(
        f"drafts of {len(drafts.slots)} utterances in {drafts.seconds:.1f} s; seconds of the "
        f"verification:\n{listing}"
    )
    return rows


def make_drafts(
    args: argparse.Namespace, model: torch.nn.Module, train_args: Any, tokens: Sequence[str]
) -> Drafts:
    """Greedy drafts with their alternatives, of all utterances.

    Raises:
        UserError: A model that drafts nothing, or not one utterance that could be read.
    """
    slots_of = _drafter(args, model, tokens)
    rate = sample_rate(train_args)
    data = Utterances(
        args.data_path_and_name_and_type, train_args, sample_rate=rate, key_file=args.key_file
    )
    found: dict[str, list[Slot]] = {}
    failed: dict[str, str] = {}
    progress = tqdm(total=len(data), unit="utt", disable=not sys.stderr.isatty())
    spent, audio = 0.0, 0.0

    for batch in by_length(data.readable(failed, num_workers=args.num_workers), args.batch_size):
        for one in batch:
            start = time.perf_counter()
            try:
                encoder_out, _ = encode(model, [one.speech])
                found[one.utt] = slots_of(encoder_out[0])
            except FAILURES as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                failed[one.utt] = first_line(error)
            spent += time.perf_counter() - start
            audio += len(one.speech) / rate if rate and one.speech.ndim == 1 else 0.0
        progress.update(len(batch))
    progress.close()
    for utt, reason in check_failures(failed, data.keys).items():
        logging.warning(f"{utt} {reason}: its hypothesis is empty")
    ordered = {utt: found[utt] for utt in data.keys if utt in found}
    return Drafts(ordered, audio, spent, failed)


def _drafter(
    args: argparse.Namespace, model: torch.nn.Module, tokens: Sequence[str]
) -> Callable[[Tensor], list[Slot]]:
    """Encoder output (T, D) to slots."""
    prior = load_prior(args.prior, tokens) if args.prior else None
    if args.prior_weight and prior is None:
        raise UserError(f"--prior_weight {args.prior_weight}, but no --prior is given")
    if prior is not None and prior.mode != "label":
        raise UserError(f"--prior {args.prior} is a {prior.mode} prior; drafts take a label prior")
    limits = dict(alternatives=args.alternatives, margin=args.margin)
    if isinstance(model, AbsTransducerModel):
        if prior is not None:
            raise UserError("--prior is for CTC drafts; this model is a transducer")
        scorer = build_scorer(model)
        eos = len(tokens) - 1
        never = [eos - 1] if scorer.num_labels >= eos else []
        search = TransducerSearch(scorer, beam_size=1, forbidden_labels=never)

        def of_transducer(encoder_out: Tensor) -> list[Slot]:
            (hyp,) = search(encoder_out)
            return transducer_slots(
                scorer,
                encoder_out,
                hyp.labels,
                hyp.frames,
                alpha=scorer.alpha,
                forbidden=[label + 1 for label in never],
                **limits,
            )

        return of_transducer
    ctc = getattr(model, "ctc", None)
    if ctc is None or ctc.ctc_lo.out_features != len(tokens):
        raise UserError(
            f"{args.asr_train_config} has no CTC output over its token list and is no transducer: "
            "there is nothing to draft with"
        )

    @torch.inference_mode()
    def of_ctc(encoder_out: Tensor) -> list[Slot]:
        log_probs = ctc.log_softmax(encoder_out[None])[0]
        return ctc_slots(log_probs, prior=prior, prior_weight=args.prior_weight, **limits)

    return of_ctc


def verify_all(
    verifier: DraftVerifier, drafts: dict[str, list[Slot]], batch_size: int
) -> dict[str, Verified]:
    """Verify in batches of drafts of similar length."""
    order = sorted(drafts, key=lambda utt: len(drafts[utt]))
    found: dict[str, Verified] = {}
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        found.update(zip(some, verifier([drafts[utt] for utt in some])))
    return found


def _entry(verified: Optional[Verified], text: TextConverter) -> NBestEntry:
    if verified is None:
        return NBestEntry("", 0.0, (), ())
    tokens = text.tokens(verified.labels)
    parts = {"acoustic": verified.acoustic, "opened": verified.opened}
    return NBestEntry(
        text.text(tokens) or "", verified.total, verified.labels, tuple(tokens), parts
    )


def _row(
    threshold: float,
    verifier: DraftVerifier,
    drafts: Drafts,
    found: dict[str, Verified],
    seconds: float,
    references: Optional[dict[str, str]],
    hypotheses: dict[str, str],
) -> dict[str, Any]:
    slots = sum(len(slot.alternatives) > 1 for some in drafts.slots.values() for slot in some)
    row: dict[str, Any] = {
        "threshold": str(threshold),  # JSON has no infinity
        "slots": slots,
        "opened": sum(one.opened for one in found.values()),
        "lm_calls": verifier.lm_calls,
        "lm_tokens": verifier.lm_tokens,
        "seconds": round(seconds, 3),
        "rtf": round((drafts.seconds + seconds) / drafts.audio_seconds, 5)
        if drafts.audio_seconds
        else None,  # features
    }
    if references is not None:
        without = [utt for utt in hypotheses if utt not in references]
        if without:
            raise UserError(f"--text has no transcript of {len(without)} utterances: {without[0]}")
        words = sum(len(references[utt].split()) for utt in hypotheses)
        if not words:
            raise UserError("the reference text has no words")
        errors = [word_errors(references[utt], text) for utt, text in hypotheses.items()]
        insertions, deletions, substitutions = (sum(kind) for kind in zip(*errors))
        row.update(
            wer=100 * (insertions + deletions + substitutions) / words,
            insertions=insertions,
            deletions=deletions,
            substitutions=substitutions,
        )
    return row


def _name(row: dict[str, Any]) -> str:
    threshold = float(row["threshold"])
    return "all" if threshold == -math.inf else f"{threshold:g}"


def _cells(row: dict[str, Any]) -> list[str]:
    scored = "wer" in row
    names = ("insertions", "deletions", "substitutions")
    return [
        _name(row),
        f"{row['wer']:.2f}" if scored else "-",
        *(str(row[name]) if scored else "-" for name in names),
        f"{100 * row['opened'] / max(1, row['slots']):.1f}",
        str(row["lm_calls"]),
        str(row["lm_tokens"]),
        f"{row['seconds']:.2f}",
        "-" if row["rtf"] is None else f"{row['rtf']:.4f}",
    ]
