"""Decode a data set as streams into a directory: the body of ``bin/asr_inference_streaming``."""

import argparse
import logging
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from espnet_llm_plugin.errors import UserError, first_line
from espnet_llm_plugin.inference.decode import FAILURES, build_recognizer, report
from espnet_llm_plugin.inference.options import endpoint_rules_of, identity, refuse_unsupported
from espnet_llm_plugin.inference.simulate import joined, simulate, text_of
from espnet_llm_plugin.inference.streaming import StreamingRecognizer
from espnet_llm_plugin.inference.utterances import Utterances
from espnet_llm_plugin.inference.writer import ResultWriter


def decode_streaming(args: argparse.Namespace) -> dict[str, Any]:
    """Decode in pieces of ``sim_chunk_length`` samples; returns the summary in ``rtf.json``.

    Raises:
        UserError: Bad options, models or data; or not one utterance could be decoded.
    """
    refuse_unsupported(args, streaming=True)
    rules = endpoint_rules_of(args)
    if rules and args.nbest > 1:
        raise UserError(
            f"--nbest {args.nbest} with --endpoint true: the segments of a recording are joined, "
            "which only their best hypotheses can be; use --nbest 1"
        )
    recognizer = build_recognizer(args)
    refuse_unsupported(args, recognizer.asr.is_ctc, streaming=True)
    streaming = StreamingRecognizer(recognizer, rules)
    logging.info(str(streaming.latency))
    data = Utterances(
        args.data_path_and_name_and_type,
        recognizer.asr.train_args,
        sample_rate=recognizer.asr.sample_rate,
        key_file=args.key_file,
        dtype=args.dtype,
    )
    logging.info(
        f"{len(data)} streams, {recognizer.scales}, beam {args.beam_size}, pieces of "
        f"{args.sim_chunk_length or 'all'} samples"
    )
    files = [args.asr_model_file, args.lm_file, args.predictor_file, args.prior_file]
    files += [args.ilm_file]
    writer = ResultWriter(args.output_dir, identity(args, files))
    try:
        decode_all(streaming, data, writer, args.sim_chunk_length, args.num_workers)
    finally:
        writer.close()
    summary = writer.finish(data.keys)
    report(summary)
    return summary


def decode_all(
    streaming: StreamingRecognizer,
    data: Utterances,
    writer: ResultWriter,
    piece_length: int,
    num_workers: int = 0,
) -> None:
    """Decode what ``writer`` does not have yet. Failures are kept as empty hypotheses."""
    if writer.records:
        logging.info(f"{len(writer.records)} utterances were decoded before; going on")
    utterances = data.read(skip=list(writer.records), num_workers=num_workers)
    progress = tqdm(
        utterances,
        total=len(data),
        initial=len(writer.records),
        unit="utt",
        disable=not sys.stderr.isatty(),
    )
    for utt, speech, reason in progress:
        pieces = []
        cpu_start = time.process_time()
        if not reason:
            try:
                pieces = simulate(streaming, speech, piece_length)
            except FAILURES as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                reason = first_line(error)
        cpu_seconds = time.process_time() - cpu_start
        if reason:
            logging.warning(f"{utt} {reason}: its hypothesis is empty")
            writer.add(utt, [], failure=reason)
            continue
        segments = [segment for piece in pieces for segment in piece.segments]
        nbest = joined(streaming.recognizer, segments)
        logging.info(f"{utt} {nbest[0].hypothesis.total:.2f} {text_of(nbest[0])}")
        writer.add(
            utt,
            nbest,
            audio_seconds=len(speech) / streaming.sample_rate,
            encoder_seconds=sum(piece.encoder_seconds for piece in pieces),
            search_seconds=sum(piece.search_seconds for piece in pieces),
            cpu_seconds=cpu_seconds,
            pieces=[piece.as_dict() for piece in pieces],
        )
