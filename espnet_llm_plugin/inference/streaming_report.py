"""Measure a streaming recogniser on test sets at several chunk sizes: ``bin/streaming_report``.

The alignment that delays are measured against is the best CTC alignment of the recognised tokens
to the encoder output of the whole recording at the longest of the chunk sizes, by the model's own
CTC branch; a delay is counted from the end of the token's last frame. A CTC branch is no phonetic
aligner: it may itself be late by a frame or two, and the delays are to be compared between chunk
sizes, rows and models with the same alignment. A model without CTC branch has no delays.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import numpy as np
import torch

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.encoder.streaming_frontend import frame_geometry
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.decode import FAILURES, build_recognizer
from espnet_llm_plugin.inference.emission import known_seconds, last_frames
from espnet_llm_plugin.inference.loading import load_model, require_file
from espnet_llm_plugin.inference.options import device_of
from espnet_llm_plugin.inference.recognizer import Recognizer, encode
from espnet_llm_plugin.inference.simulate import simulate, text_of
from espnet_llm_plugin.inference.streaming import StreamingRecognizer, set_chunk_ms
from espnet_llm_plugin.inference.utterances import Utterances
from espnet_llm_plugin.scoring.streaming import (
    StreamingResult,
    plot_streaming,
    streaming_table,
)
from espnet_llm_plugin.scoring.wer import score


class EvaluationSet(NamedTuple):
    """Name, samples (n,) and reference text of each utterance."""

    name: str
    samples: dict[str, np.ndarray]
    references: Mapping[str, str]


def streaming_report(args: argparse.Namespace) -> list[StreamingResult]:
    """Measure, write ``RESULTS.md``, ``results.json`` and ``wer_latency.png``.

    Raises:
        UserError: Bad options, models or data.
    """
    recognizer = build_recognizer(args)
    model = recognizer.asr.model
    aligner = load_aligner(args, model)
    chunks = sorted(set(args.chunks_ms))
    for chunk_ms in chunks:  # all of them are possible, before any is measured
        set_chunk_ms(model, chunk_ms)
        StreamingRecognizer(recognizer)
    tests = [
        read_test_set(recognizer, triple, text)
        for triple, text in paired(args.data_path_and_name_and_type, args.text)
    ]
    if len({test.name for test in tests}) < len(tests):
        raise UserError(
            "two test sets have one name, that of the directory of their transcripts: "
            + ", ".join(test.name for test in tests)
        )
    results = []
    for test in tests:
        log_probs = ctc_log_probs(aligner, chunks[-1], test)
        for chunk_ms in chunks:
            result = measure(recognizer, test, chunk_ms, log_probs)
            logging.info(
                f"{test.name}, {chunk_ms:g} ms: WER {result.wer.rate:.2f} %, RTF {result.rtf:.4f}"
            )
            results.append(result)
    write(results, Path(args.output_dir), args)
    return results


def paired(triples: Sequence, texts: Sequence[str]) -> list[tuple]:
    """Speech and transcripts of each test set."""
    if len(triples) != len(texts):
        raise UserError(
            f"{len(triples)} --data_path_and_name_and_type and {len(texts)} --text: give one of "
            "each for every test set, in the same order"
        )
    return list(zip(triples, texts))


def read_test_set(recognizer: Recognizer, triple: tuple, text: str) -> EvaluationSet:
    """Speech into memory, so that reading is no part of what is measured.

    Raises:
        UserError: A file is missing, or an utterance has no transcript or cannot be read.
    """
    require_file(text, "--text", "the transcripts, `utterance-id words ...` a line")
    references = read_clean_table(text, may_be_empty=True)
    asr = recognizer.asr
    dtype = str(next(asr.model.parameters()).dtype).removeprefix("torch.")
    data = Utterances([triple], asr.train_args, sample_rate=asr.sample_rate, dtype=dtype)
    without = [key for key in data.keys if key not in references]
    if without:
        raise UserError(f"{text} has no transcript of {len(without)} utterances: {without[0]}")
    samples = {}
    for utt, speech, reason in data.read():
        if reason:
            raise UserError(f"{utt} {reason}; take it out of {triple[0]}")
        samples[utt] = speech
    return EvaluationSet(Path(text).resolve().parent.name, samples, references)


def load_aligner(args: argparse.Namespace, model: torch.nn.Module) -> torch.nn.Module:
    """The model whose CTC says where tokens end: that of the options, or the recogniser's.

    Raises:
        UserError: It has other tokens or frames, or no CTC.
    """
    if not args.align_asr_train_config:
        if args.align_asr_model_file:
            raise UserError("--align_asr_model_file needs --align_asr_train_config")
        return model
    config = require_file(args.align_asr_train_config, "--align_asr_train_config", "config.yaml")
    file = require_file(args.align_asr_model_file, "--align_asr_model_file", "its checkpoint")
    aligner, _ = load_model(config, file, str(device_of(args)))

    def unlike(what: str, ours: object, theirs: object) -> UserError:
        return UserError(
            f"--align_asr_train_config {config}: its {what} ({theirs}) must be those of the model "
            f"({ours})"
        )

    if list(aligner.token_list) != list(model.token_list):
        raise unlike("tokens", len(model.token_list), len(aligner.token_list))
    ours, theirs = (
        (frame_geometry(one.frontend), getattr(one.encoder, "subsampling", None))
        for one in (model, aligner)
    )
    if ours != theirs:
        raise unlike("frames", ours, theirs)
    if aligner.ctc is None:
        raise UserError(f"--align_asr_train_config {config}: the model has no CTC")
    return aligner


@torch.inference_mode()
def ctc_log_probs(
    model: torch.nn.Module, chunk_ms: float, test: EvaluationSet
) -> dict[str, torch.Tensor]:
    """CTC log-probs (T, V) of a test set's utterances, at a chunk size; none without CTC branch."""
    if model.ctc is None:
        logging.warning(
            "the model has no CTC branch (model_conf ctc_weight: 0) to align with: no delays; "
            "--align_asr_train_config names another model"
        )
        return {}
    set_chunk_ms(model, chunk_ms)
    log_probs = {}
    for utt, samples in test.samples.items():
        try:
            encoder_out, _ = encode(model, [samples])
        except FAILURES:  # shorter than a frame
            continue
        log_probs[utt] = model.ctc.log_softmax(encoder_out)[0].float().cpu()
    return log_probs


def measure(
    recognizer: Recognizer,
    test: EvaluationSet,
    chunk_ms: float,
    log_probs: Mapping[str, torch.Tensor],
) -> StreamingResult:
    """Recognise a test set in pieces of one chunk; ``log_probs`` (T, V) to align with."""
    set_chunk_ms(recognizer.asr.model, chunk_ms)
    streaming = StreamingRecognizer(recognizer)
    piece_length = round(chunk_ms * streaming.sample_rate / 1000)
    # The first call of a network is slow; it is not what is to be measured.
    simulate(streaming, next(iter(test.samples.values()))[: 4 * piece_length], piece_length)
    hypotheses, compute, shown, stable, unaligned = {}, [], [], [], 0
    for utt, samples in test.samples.items():
        pieces = simulate(streaming, samples, piece_length)
        best = pieces[-1].segments[-1].nbest[0]
        hypotheses[utt] = text_of(best)
        compute += [piece.compute_seconds for piece in pieces]  # the stream's end is one, too
        frames = last_frames(log_probs[utt], best.token_ids) if utt in log_probs else None
        if frames is None:
            unaligned += 1
            continue
        spoken = np.array([streaming.seconds(frame + 1) for frame in frames])
        spoken = np.minimum(spoken, len(samples) / streaming.sample_rate)
        for known, delays in zip(known_seconds(pieces, best.token_ids), (shown, stable)):
            delays += (known - spoken).tolist()
    words = {utt: test.references[utt].split() for utt in test.samples}
    scored = score(
        words, {utt: text.split() for utt, text in hypotheses.items()}, {utt: utt for utt in words}
    )
    return StreamingResult(
        test=test.name,
        chunk_ms=chunk_ms,
        latency_ms=streaming.latency.longest,
        wer=scored.summary(),
        audio_seconds=sum(map(len, test.samples.values())) / streaming.sample_rate,
        compute_ms=1000 * np.array(compute),
        shown_ms=1000 * np.array(shown),
        stable_ms=1000 * np.array(stable),
        unaligned=unaligned,
    )


def write(results: Sequence[StreamingResult], directory: Path, args: argparse.Namespace) -> None:
    """The table, the numbers and the plot."""
    directory.mkdir(parents=True, exist_ok=True)
    device = (
        torch.cuda.get_device_name() if args.ngpu else f"CPU, {torch.get_num_threads()} threads"
    )
    heading = f"# Streaming\n\n{args.asr_model_file}, beam {args.beam_size}, {device}\n\n"
    page = heading + streaming_table(results)
    with atomic_write(directory / "RESULTS.md") as stream:
        stream.write(page)
    with atomic_write(directory / "results.json") as stream:
        json.dump([result.as_dict() for result in results], stream, indent=1, ensure_ascii=False)
    plot_streaming(results, directory / "wer_latency.png")
    logging.info(f"\n{page}")
