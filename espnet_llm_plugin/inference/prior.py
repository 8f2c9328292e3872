"""Estimate a prior of a model's labels: the body of ``bin/estimate_prior``."""

import argparse
import logging
import sys
from typing import Any, Sequence

import torch
from tqdm import tqdm

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError, first_line
from espnet_llm_plugin.fusion.prior import (
    PosteriorMean,
    Prior,
    count_labels,
    frame_prior,
    label_prior,
    most_and_least,
    save_prior,
)
from espnet_llm_plugin.inference.batches import Utterance, by_length
from espnet_llm_plugin.inference.decode import FAILURES
from espnet_llm_plugin.inference.loading import load_model, read_train_config, require_file
from espnet_llm_plugin.inference.options import device_of
from espnet_llm_plugin.inference.recognizer import encode
from espnet_llm_plugin.inference.utterances import Utterances
from espnet_llm_plugin.llm.perplexity import asr_tokenizer

# Of counts [arXiv 2603.15045]; posteriors are smooth by themselves.
COUNT_SMOOTHING = 0.1


def estimate_prior(args: argparse.Namespace) -> Prior:
    """Estimate from speech or transcripts, write ``args.output``, return the prior.

    Raises:
        UserError: Bad options, model or data.
    """
    config = require_file(args.asr_train_config, "--asr_train_config", "config.yaml of the ASR")
    if args.estimate_from == "counts":
        prior, tokens, source = _from_transcripts(args, read_train_config(config))
    else:
        prior, tokens, source = _from_speech(args)
    save_prior(prior, args.output, tokens, source)
    logging.info(f"{args.output}: {prior.mode} prior of {len(tokens)} tokens from {source}")
    logging.info(f"log-probabilities: {most_and_least(prior, tokens)}")
    return prior


def _from_transcripts(
    args: argparse.Namespace, config: dict[str, Any]
) -> tuple[Prior, list[str], str]:
    if args.mode != "label":
        raise UserError(
            f"--mode {args.mode}: transcripts know no frames; use --estimate_from posteriors"
        )
    path = require_file(args.text, "--text", "training transcripts, `utterance-id words ...` lines")
    tokens = list(config["token_list"])
    token_type = args.token_type or config.get("token_type")
    encode_text = asr_tokenizer(tokens, token_type, args.bpemodel or config.get("bpemodel"))
    texts = read_clean_table(path, may_be_empty=True)
    counts = count_labels((encode_text(text) for text in texts.values()), len(tokens))
    smoothing = COUNT_SMOOTHING if args.smoothing is None else args.smoothing
    return label_prior(counts, smoothing), tokens, f"{len(texts)} transcripts of {path}"


@torch.inference_mode()
def _from_speech(args: argparse.Namespace) -> tuple[Prior, list[str], str]:
    if not args.data_path_and_name_and_type:
        raise UserError(
            "--data_path_and_name_and_type is missing: training speech, e.g. "
            "`dump/raw/train/wav.scp,speech,sound`"
        )
    model, train_args = load_model(args.asr_train_config, args.asr_model_file, device_of(args))
    ctc, tokens = getattr(model, "ctc", None), list(model.token_list)
    if ctc is None:
        raise UserError(
            f"{args.asr_train_config} is of a model without CTC: there are no frame posteriors; "
            "use --estimate_from counts"
        )
    if ctc.ctc_lo.out_features != len(tokens):
        raise UserError(
            f"CTC has {ctc.ctc_lo.out_features} outputs, the token list {len(tokens)} tokens: the "
            "prior would be of other labels; use --estimate_from counts"
        )
    data = Utterances(
        args.data_path_and_name_and_type, train_args, key_file=args.key_file, dtype="float32"
    )
    failed: dict[str, str] = {}
    progress = tqdm(total=len(data), unit="utt", disable=not sys.stderr.isatty())

    posteriors = PosteriorMean(len(tokens))

    def add(batch: Sequence[Utterance]) -> None:
        encoder_out, lengths = encode(model, [one.speech for one in batch])
        posteriors.add(ctc.log_softmax(encoder_out), lengths)

    for batch in by_length(data.readable(failed, num_workers=args.num_workers), args.batch_size):
        try:
            add(batch)
        except FAILURES:
            for one in batch:  # only the utterance that fails is lost
                try:
                    add([one])
                except FAILURES as error:
                    if isinstance(error, torch.cuda.OutOfMemoryError):
                        raise
                    failed[one.utt] = first_line(error)
        progress.update(len(batch))
    progress.close()
    if failed:
        utt, reason = next(iter(failed.items()))
        logging.warning(f"{len(failed)} of {len(data)} utterances left out, e.g. {utt}: {reason}")
    make = label_prior if args.mode == "label" else frame_prior
    source = f"{posteriors.frames} frames of {len(data) - len(failed)} utterances"
    return make(posteriors.mean, args.smoothing or 0.0), tokens, source
