"""Held-out utterances, and the model whose scales are tuned on them, in one process or several."""

import argparse
import logging
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
from tqdm import tqdm

from espnet_llm_plugin import registry
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError, first_line
from espnet_llm_plugin.inference.batches import Utterance, by_length
from espnet_llm_plugin.inference.decode import FAILURES
from espnet_llm_plugin.inference.fusion_options import fusion_options, has_external_lm, used_options
from espnet_llm_plugin.inference.languages import given_languages
from espnet_llm_plugin.inference.loading import LoadedASR, load_asr, load_ilm, load_lm, require_file
from espnet_llm_plugin.inference.options import device_of
from espnet_llm_plugin.inference.recognizer import build_search, encode
from espnet_llm_plugin.inference.speech_llm import SpeechLLMRecognizer
from espnet_llm_plugin.inference.speech_llm_options import speech_llm_options
from espnet_llm_plugin.inference.streaming import set_chunk_ms
from espnet_llm_plugin.inference.utterances import Utterances, read_keys

# What is done with a batch: its utterance ids and encoder outputs (T, D).
Work = Callable[[list[str], list[torch.Tensor]], None]


def read_references(args: argparse.Namespace) -> dict[str, str]:
    """Transcripts of the utterances to tune on, in their order; checks the options.

    Raises:
        UserError: A bad option, a missing file, or an utterance without transcript.
    """
    if args.ngpu > 1:
        raise UserError(f"--ngpu {args.ngpu}: a process uses one GPU; give --nj for more of both")
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
    return {key: references[key] for key in keys}


def model_files(args: argparse.Namespace) -> list[Optional[str]]:
    """Files that the results depend on."""
    files = [args.asr_train_config, args.asr_model_file, args.lm_train_config, args.lm_file]
    files += [args.predictor_file, args.prior_file, args.ilm_file, args.fusion_ngram]
    return [*files, args.text, args.utt2lang]


class HeldOut:
    """The utterances and the model, loaded.

    Args:
        args: Options of a tuning command.

    Attributes:
        asr: Recogniser.
        has_lm: Whether there is an external LM.
        languages: Of the utterances, if the model knows any.
        seconds: Durations of waveforms, once they are read.
        search: Of a transducer or CTC, with the LM.
        speech_llm: Recogniser of a speech LLM.

    Raises:
        UserError: Bad options, models or data.
    """

    def __init__(self, args: argparse.Namespace):
        device = device_of(args)
        self.asr = load_asr(
            args.asr_train_config,
            args.asr_model_file,
            device=device,
            predictor=args.predictor,
            predictor_conf=args.predictor_conf,
            predictor_file=args.predictor_file,
            token_type=args.token_type,
            bpemodel=args.bpemodel,
        )
        set_chunk_ms(self.asr.model, args.chunk_ms)
        self.has_lm = has_external_lm(args)
        lm = None
        if args.lm_train_config:
            tokens = self.asr.model.token_list
            lm = load_lm(args.lm_train_config, args.lm_file, tokens, device=device)
        if self.asr.is_speech_llm:
            for name in used_options(args):
                raise UserError(
                    f"--{name} {getattr(args, name)}: it is for CTC models and transducers, and "
                    "this model is a speech_llm"
                )
            if args.long_form != "off":
                raise UserError(
                    f"--long_form {args.long_form}: weights are tuned on utterances as they are; "
                    "give segments of long recordings, and --long_form when decoding"
                )
            self.speech_llm = tuned_recognizer(args, self.asr, lm)
        else:
            self.search = build_search(
                self.asr,
                lm,
                beam_size=args.beam_size,
                max_symbols_per_frame=args.max_symbols_per_frame,
                fusion=fusion_options(args, self.asr),
                ilm=load_ilm(args.ilm, args.ilm_file, self.asr.model.token_list),
            )
        self.open_data(args)

    def open_data(self, args: argparse.Namespace) -> None:
        """The utterances, once the model is loaded.

        Raises:
            UserError: Bad data, or a model whose tokens make no words.
        """
        if self.asr.text.text([]) is None:
            raise UserError("the model has no token_type: give --token_type, so that words exist")
        self.data = Utterances(
            args.data_path_and_name_and_type,
            self.asr.train_args,
            sample_rate=self.asr.sample_rate,
            key_file=args.key_file,
        )
        self.languages = given_languages(args, self.asr.model, self.data.keys)
        self.seconds: dict[str, float] = {}
        self._batch_size = args.batch_size

    def text_of(self, labels: Sequence[int]) -> str:
        """Text of labels."""
        return self.asr.text.text(self.asr.text.tokens([label + 1 for label in labels]))

    def for_each_batch(self, work: Work, part: int = 0, parts: int = 1) -> dict[str, str]:
        """Encode every ``parts``-th utterance, from number ``part`` on, and call ``work``.

        Returns:
            Reasons of utterances that failed.
        """
        failed: dict[str, str] = {}
        mine = self.data.keys[part::parts]
        skip = set(self.data.keys) - set(mine)
        progress = tqdm(total=len(mine), unit="utt", disable=part > 0 or not sys.stderr.isatty())

        def attempt(batch: Sequence[Utterance]) -> None:
            rate = self.asr.sample_rate
            if rate is not None:
                self.seconds.update((one.utt, len(one.speech) / rate) for one in batch)
            encoder_out, lengths = encode(self.asr.model, [one.speech for one in batch])
            encoded = [out[:length] for out, length in zip(encoder_out, lengths.tolist())]
            work([one.utt for one in batch], encoded)

        for batch in by_length(self.data.readable(failed, skip=list(skip)), self._batch_size):
            try:
                attempt(batch)
            except FAILURES as error:
                if isinstance(error, torch.cuda.OutOfMemoryError) and len(batch) == 1:
                    raise
                # One by one, so that only the utterance that fails is lost.
                for utterance in batch:
                    try:
                        attempt([utterance])
                    except FAILURES as error:
                        if isinstance(error, torch.cuda.OutOfMemoryError):
                            raise
                        failed[utterance.utt] = first_line(error)
            progress.update(len(batch))
        progress.close()
        return failed


def tuned_recognizer(
    args: argparse.Namespace, asr: LoadedASR, lm: Optional[torch.nn.Module]
) -> SpeechLLMRecognizer:
    """The recogniser of a speech LLM, with the options that are not tuned."""
    fixed = dict(ctc_weight=0.0, textlm_weight=0.0, lm_weight=0.0, length_norm=0.0)
    values = argparse.Namespace(
        **{**vars(args), **fixed}, nbest=1, maxlenratio=0.0, minlenratio=0.0
    )
    return SpeechLLMRecognizer(asr, lm, speech_llm_options(values, None, has_lm=lm is not None))


Run = Callable[..., list[Any]]


@contextmanager
def workers(
    args: argparse.Namespace, num_utterances: int, make: type[HeldOut] = HeldOut
) -> Iterator[Run]:
    """``args.nj`` processes that keep the model while they are used, on GPUs each on its own.

    Args:
        args: Options of a tuning command.
        num_utterances: No more processes than these, and on GPUs no more than there are visible.
        make: Of the options: the utterances and the model.

    Yields:
        ``run(function, *more)``: the results of ``function(held_out, part, parts, *more)`` for
        every part, in order. The function is one of a module, and all it takes can be pickled.
    """
    gpus = visible_gpus() if args.ngpu else []
    most = max(len(gpus), 1) if args.ngpu else args.nj
    processes = min(args.nj, num_utterances, most)
    if processes == 1:
        held_out: list[HeldOut] = []

        def run_here(function: Callable, *more: Any) -> list[Any]:
            held_out[:] = held_out or [make(args)]
            return [function(held_out[0], 0, 1, *more)]

        yield run_here
        return
    if gpus:
        # Started anew: CUDA does not work in a forked process.
        context = multiprocessing.get_context("spawn")
        devices = context.Queue()
        for gpu in gpus[:processes]:
            devices.put(gpu)
        start = (_take_gpu, (devices, args.log_level))
    else:
        # Forked after ESPnet is imported (10 s) and before a model exists or a thread runs.
        registry.register()
        context = multiprocessing.get_context("fork")
        start = (torch.set_num_threads, (1,))
    with ProcessPoolExecutor(processes, context, *start) as pool:

        def run_there(function: Callable, *more: Any) -> list[Any]:
            futures = [
                pool.submit(_run_part, make, args, function, part, processes, *more)
                for part in range(processes)
            ]
            return [future.result() for future in futures]

        yield run_there


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _take_gpu(devices: Any, log_level: str) -> None:
    """Let this worker process see one GPU of a queue, before it uses any."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s: %(message)s")


_held_out: list[HeldOut] = []  # of this worker process


def _run_part(make: type[HeldOut], args: argparse.Namespace, function: Callable, *more: Any) -> Any:
    if not _held_out:
        _held_out.append(make(args))
    return function(_held_out[0], *more)


def check_failures(failed: dict[str, str], keys: Sequence[str]) -> dict[str, str]:
    """The failures in the order of the utterances.

    Raises:
        UserError: Not one utterance is left.
    """
    if len(failed) == len(keys):
        utt, reason = next(iter(failed.items()))
        raise UserError(f"not one utterance could be decoded; {utt} {reason}")
    return {key: failed[key] for key in keys if key in failed}
