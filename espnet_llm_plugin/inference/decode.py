"""Decode a data set into a directory: the body of ``bin/asr_inference``."""

import argparse
import logging
import sys
import time
from typing import Any, Iterator, Optional, Sequence, Union

import torch
from espnet.nets.pytorch_backend.transformer.subsampling import TooShortUttError
from tqdm import tqdm

from espnet_llm_plugin.errors import UserError, UtteranceError, first_line
from espnet_llm_plugin.fusion.ngram import load_ngram
from espnet_llm_plugin.inference.batches import Utterance, by_length
from espnet_llm_plugin.inference.fusion_options import fusion_options, has_external_lm
from espnet_llm_plugin.inference.languages import GivenLanguages, given_languages
from espnet_llm_plugin.inference.loading import load_asr, load_ilm, load_lm, require_file
from espnet_llm_plugin.inference.options import (
    bonus_of,
    changed_options,
    device_of,
    espnet_parser,
    identity,
    refuse_unsupported,
)
from espnet_llm_plugin.inference.recognizer import Recognizer, default_scales
from espnet_llm_plugin.inference.speech_llm import SpeechLLMRecognizer, default_ctc_weight
from espnet_llm_plugin.inference.speech_llm_options import speech_llm_options
from espnet_llm_plugin.inference.streaming import set_chunk_ms
from espnet_llm_plugin.inference.utterances import Utterances
from espnet_llm_plugin.inference.writer import ResultWriter

AnyRecognizer = Union[Recognizer, SpeechLLMRecognizer]


def decode(args: argparse.Namespace, recognizer: Optional[AnyRecognizer] = None) -> dict[str, Any]:
    """Decode with our search; returns the summary that ``rtf.json`` has.

    Args:
        args: Options.
        recognizer: What :func:`build_recognizer` made of the same options for other data.

    Raises:
        UserError: Bad options, models or data; or not one utterance could be decoded.
    """
    refuse_unsupported(args)
    recognizer = recognizer or build_recognizer(args)
    asr = recognizer.asr
    refuse_unsupported(args, asr.is_ctc, is_speech_llm=asr.is_speech_llm)
    data = Utterances(
        args.data_path_and_name_and_type,
        asr.train_args,
        sample_rate=asr.sample_rate,
        key_file=args.key_file,
        dtype=args.dtype,
    )
    languages = given_languages(args, asr.model, data.keys)
    logging.info(
        f"{len(data)} utterances in batches of {args.batch_size}, {recognizer.scales}, "
        f"beam {args.beam_size}"
    )
    files = [args.asr_model_file, args.lm_file, args.predictor_file, args.prior_file]
    files += [args.ilm_file, args.ngram_file, args.fusion_ngram, args.utt2lang]
    writer = ResultWriter(args.output_dir, identity(args, files))
    try:
        decode_all(recognizer, data, writer, args.num_workers, args.batch_size, languages)
    finally:
        writer.close()
    summary = writer.finish(data.keys)
    report(summary)
    return summary


def build_recognizer(args: argparse.Namespace) -> AnyRecognizer:
    """The models and the search that the options of a decoding command ask for.

    Raises:
        UserError: Bad options or models.
    """
    device = device_of(args)
    torch.manual_seed(args.seed)
    asr = load_asr(
        args.asr_train_config,
        args.asr_model_file,
        device=device,
        dtype=args.dtype,
        predictor=args.predictor,
        predictor_conf=args.predictor_conf,
        predictor_file=args.predictor_file,
        token_type=args.token_type,
        bpemodel=args.bpemodel,
    )
    if asr.is_speech_llm and not hasattr(args, "ctc_top_k"):  # options of a streaming command
        raise UserError(
            f"--asr_train_config {args.asr_train_config}: a speech_llm reads whole recordings, it "
            "cannot stream: decode it with espnet_llm_plugin.bin.asr_inference (--long_form for "
            "long ones)"
        )
    set_chunk_ms(asr.model, getattr(args, "chunk_ms", None))
    lm, lm_weight = None, args.lm_weight
    ngram_file = getattr(args, "ngram_file", None)
    if ngram_file and args.lm_train_config:
        raise UserError(
            f"--ngram_file {ngram_file} and --lm_train_config {args.lm_train_config}: the search "
            "has one external LM"
        )
    if ngram_file and asr.is_speech_llm:
        raise UserError(f"--ngram_file {ngram_file}: the search of a speech_llm has no n-gram LM")
    if ngram_file:
        require_file(ngram_file, "--ngram_file", "n-gram LM over the model's tokens")
        lm, lm_weight = load_ngram(ngram_file, asr.model.token_list), args.ngram_weight
    if args.lm_train_config:
        lm = load_lm(
            args.lm_train_config,
            args.lm_file,
            asr.model.token_list,
            device=device,
            dtype=args.dtype,
        )
    if asr.is_speech_llm:
        is_default = "ctc_weight" not in changed_options(args, espnet_parser())
        args.ctc_weight = default_ctc_weight(asr, args.ctc_weight, is_default)
        options = speech_llm_options(args, bonus_of(args), has_lm=lm is not None)
        return SpeechLLMRecognizer(asr, lm, options)
    return Recognizer(
        asr,
        lm,
        scales=default_scales(
            asr,
            args.alpha,
            args.beta,
            bonus_of(args),
            lm_weight=lm_weight if lm is not None or has_external_lm(args) else 0.0,
            ilm_weight=args.ilm_weight,
            blank_scale=args.blank_scale,
            prior_weight=args.prior_weight,
        ),
        beam_size=args.beam_size,
        max_symbols_per_frame=args.max_symbols_per_frame,
        nbest=args.nbest,
        normalize_length=args.normalize_length,
        fusion=fusion_options(args, asr),
        ilm=load_ilm(args.ilm, args.ilm_file, asr.model.token_list),
    )


def decode_all(
    recognizer: AnyRecognizer,
    data: Utterances,
    writer: ResultWriter,
    num_workers: int = 0,
    batch_size: int = 1,
    languages: Optional[GivenLanguages] = None,
) -> None:
    """Decode what ``writer`` does not have yet. Failures are kept as empty hypotheses."""
    if writer.records:
        logging.info(f"{len(writer.records)} utterances were decoded before; going on")
    progress = tqdm(
        total=len(data),
        initial=len(writer.records),
        unit="utt",
        disable=not sys.stderr.isatty(),
    )

    def keep(utt: str, nbest: list, reason: str = "", **timing: float) -> None:
        if reason:
            logging.warning(f"{utt} {reason}: its hypothesis is empty")
        else:
            best = nbest[0]
            shown = best.text if best.text is not None else " ".join(best.tokens)
            logging.info(f"{utt} {best.hypothesis.total:.2f} {shown}")
        writer.add(utt, nbest, failure=reason, **timing)
        progress.update()

    def readable() -> Iterator[Utterance]:
        for utt, speech, reason in data.read(skip=list(writer.records), num_workers=num_workers):
            if reason:
                keep(utt, [], reason)
            else:
                lang = None if languages is None else languages.of([utt])[0]
                yield Utterance(utt, speech, lang)

    for batch in by_length(readable(), batch_size):
        try:
            results = timed(recognizer, batch)
        except FAILURES as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) and len(batch) == 1:
                raise
            # One by one, so that only the utterance that fails is lost.
            results = [attempt(recognizer, utterance) for utterance in batch]
        for utterance, (nbest, reason, timing) in zip(batch, results):
            keep(utterance.utt, nbest, reason, **timing)
    progress.close()


# What an utterance can fail with; others mean that something is wrong with all of them.
FAILURES = (UtteranceError, RuntimeError, TooShortUttError)


def attempt(recognizer: AnyRecognizer, utterance: Utterance) -> tuple[list, str, dict[str, float]]:
    """N-best, reason of a failure, and times of one utterance."""
    try:
        return timed(recognizer, [utterance])[0]
    except FAILURES as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return [], first_line(error), {}


def timed(
    recognizer: AnyRecognizer, batch: Sequence[Utterance]
) -> list[tuple[list, str, dict[str, float]]]:
    """N-best, times (seconds) and LM use of each utterance: the batch's, shared by length."""
    rate = recognizer.asr.sample_rate
    counts = recognizer.lm_use if isinstance(recognizer, Recognizer) else lambda: (0, 0)
    calls, tokens = counts()
    start, cpu_start = time.perf_counter(), time.process_time()
    encoder_out, lengths = recognizer.encode([utterance.speech for utterance in batch])
    if encoder_out.is_cuda:
        torch.cuda.synchronize()
    middle = time.perf_counter()
    codes = [[utterance.lang for utterance in batch]] if recognizer.asr.is_speech_llm else []
    lists = recognizer.decode(encoder_out, lengths, *codes)
    end, cpu_end = time.perf_counter(), time.process_time()
    all_calls, all_tokens = counts()
    total = sum(len(utterance.speech) for utterance in batch)
    results = []
    for utterance, nbest in zip(batch, lists):
        share = len(utterance.speech) / total
        is_waveform = rate and utterance.speech.ndim == 1
        timing = dict(
            audio_seconds=len(utterance.speech) / rate if is_waveform else 0.0,
            encoder_seconds=share * (middle - start),
            search_seconds=share * (end - middle),
            cpu_seconds=share * (cpu_end - cpu_start),
            lm_calls=share * (all_calls - calls),
            lm_tokens=share * (all_tokens - tokens),
        )
        results.append((nbest, "", timing))
    return results


def report(summary: dict[str, Any]) -> None:
    """Log the real-time factor and what failed.

    Raises:
        UserError: Everything failed.
    """
    failed = summary["failed"]
    if summary["rtf"] is not None:
        logging.info(
            f"RTF {summary['rtf']:.4f}: encoder {summary['encoder_seconds']} s, search "
            f"{summary['search_seconds']} s for {summary['audio_seconds']} s of audio"
        )
    if summary["lm_calls"]:
        logging.info(f"LM: {summary['lm_calls']} calls, {summary['lm_tokens']} tokens")
    if failed:
        some = ", ".join(list(failed)[:5]) + (", ..." if len(failed) > 5 else "")
        logging.warning(f"{len(failed)} of {summary['utterances']} utterances failed: {some}")
    if len(failed) == summary["utterances"]:
        utt, reason = next(iter(failed.items()))
        raise UserError(f"not one utterance could be decoded; {utt} {reason}")
