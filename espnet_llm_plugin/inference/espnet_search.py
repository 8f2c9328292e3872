"""ESPnet's own decoding, with scorers of this package added: the body of ``--search espnet``."""

import argparse
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from espnet_llm_plugin import registry
from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.label_lms import ATTENTION_ILMS, attention_ilm
from espnet_llm_plugin.inference.loading import TextConverter, require_file, sample_rate
from espnet_llm_plugin.inference.options import (
    add_model_options,
    add_search_options,
    changed_options,
    espnet_parser,
)
from espnet_llm_plugin.inference.speech_llm_options import add_speech_llm_options

# Our options that mean something in ESPnet's label-synchronous search.
LLM_OPTIONS = ("fusion_llm", "fusion_llm_dtype", "fusion_ngram", "lm_eos", "lm_temperature")
LLM_OPTIONS += ("lm_lowercase",)
_ILM = ("ilm", "ilm_file", "ilm_weight")


def decode_with_espnet(args: argparse.Namespace) -> None:
    """Run ESPnet's own inference with ESPnet's options, and with what it lacks.

    ``--fusion_llm`` adds an LLM in its own vocabulary, which scores whole words with
    ``--lm_weight``, ``--fusion_ngram`` what stands in for it until then; ``--ilm zero_context`` or
    ``mini_lstm`` the internal LM of an attention decoder, which is subtracted with
    ``--ilm_weight``. The output directory also gets ``rtf.json``.

    Raises:
        UserError: Another of our options is set, which ESPnet would not see, or options or models
            that do not go together.
    """
    check_options(args)
    registry.register()
    names = [action.dest for action in espnet_parser()._actions]
    options = {name: getattr(args, name) for name in names if name not in ("help", "config")}
    module = import_quietly("espnet2.bin.asr_inference")
    made: list[TimedSpeech2Text] = []

    def changed(speech2text: Any) -> TimedSpeech2Text:
        added = added_scorers(args, speech2text)
        if added:
            search = speech2text.beam_search
            weights = {"lm": args.lm_weight, "ilm": -args.ilm_weight}
            weights = {**getattr(search, "weights", {}), **{name: weights[name] for name in added}}
            speech2text.beam_search = search_with(speech2text, added, weights)
        made.append(TimedSpeech2Text(speech2text))
        return made[0]

    with speech2text_changed(module, changed):
        module.inference(**options)
    with atomic_write(Path(args.output_dir) / "rtf.json") as stream:
        stream.write(json.dumps(made[0].summary(), indent=2) + "\n")


class TimedSpeech2Text:
    """ESPnet's ``Speech2Text`` with a clock.

    Args:
        speech2text: It.
    """

    def __init__(self, speech2text: Any):
        self._speech2text = speech2text
        self._rate = sample_rate(speech2text.asr_train_args)
        self._audio = self._seconds = self._cpu = 0.0
        self._utterances = 0

    def __call__(self, speech: Any, **more: Any) -> Any:
        """What ESPnet's returns."""
        start, cpu_start = time.perf_counter(), time.process_time()
        results = self._speech2text(speech, **more)
        self._seconds += time.perf_counter() - start
        self._cpu += time.process_time() - cpu_start
        self._utterances += 1
        self._audio += len(speech) / self._rate if self._rate and speech.ndim == 1 else 0.0
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._speech2text, name)

    def summary(self) -> dict[str, Any]:
        """Times, as in ``rtf.json`` of our searches; those of encoder and search together."""
        audio = self._audio
        return {
            "audio_seconds": round(audio, 3),
            "seconds": round(self._seconds, 3),
            "cpu_seconds": round(self._cpu, 3),
            "rtf": self._seconds / audio if audio else None,
            "cpu_rtf": self._cpu / audio if audio else None,
            "utterances": self._utterances,
        }


def check_options(args: argparse.Namespace) -> None:
    """Refuse options of ours that this search does not know.

    Raises:
        UserError: Names the option and why.
    """
    ours = argparse.ArgumentParser()
    add_model_options(ours)
    add_search_options(ours)
    add_speech_llm_options(ours)
    changed = [name for name in changed_options(args, ours) if name != "search"]
    for name in changed:
        value = getattr(args, name)
        if name in LLM_OPTIONS:
            if not args.fusion_llm:
                raise UserError(f"--{name} {value}: with --search espnet it needs --fusion_llm")
        elif name in _ILM:
            if args.ilm not in ATTENTION_ILMS:
                raise UserError(
                    f"--{name} {value}: with --search espnet an internal LM is that of an "
                    "attention decoder: --ilm zero_context or mini_lstm"
                )
        else:
            raise UserError(
                f"--search espnet knows no --{name}; scales of a factorized_transducer are set in "
                "the decoder_conf of its config.yaml"
            )
    check_lms(args)


def check_lms(args: argparse.Namespace) -> None:
    """Refuse two external LMs.

    Raises:
        UserError: There are.
    """
    if args.fusion_llm and args.lm_train_config:
        raise UserError(
            f"--fusion_llm {args.fusion_llm}: --lm_train_config {args.lm_train_config} is another "
            "LM: give one"
        )


def added_scorers(args: argparse.Namespace, speech2text: Any) -> dict[str, Any]:
    """The scorers by name that options ask for, for ESPnet's ``Speech2Text``.

    Raises:
        UserError: An LLM without a vocabulary of its own, tokens without known word ends, or a
            model without attention decoder.
    """
    found: dict[str, Any] = {}
    model, train_args = speech2text.asr_model, speech2text.asr_train_args
    if args.fusion_llm:
        from espnet_llm_plugin.fusion.ngram import load_ngram
        from espnet_llm_plugin.fusion.word_lm import WordLM
        from espnet_llm_plugin.fusion.word_scorer import WordScorer
        from espnet_llm_plugin.fusion.words import Spelling

        text = TextConverter(
            model.token_list,
            args.token_type or train_args.token_type,
            args.bpemodel or train_args.bpemodel,
        )
        llm = WordLM(
            args.fusion_llm,
            end=args.lm_eos or "eos",
            lowercase=args.lm_lowercase,
            temperature=args.lm_temperature,
            device=speech2text.device,
            dtype=args.fusion_llm_dtype,
        )
        spelling = Spelling(model.token_list, text.token_type, text.text)
        ngram = None
        if args.fusion_ngram:
            require_file(args.fusion_ngram, "--fusion_ngram", "n-gram LM over the model's tokens")
            ngram = load_ngram(args.fusion_ngram, model.token_list)
        found["lm"] = WordScorer(llm, spelling, len(model.token_list), ngram)
    if args.ilm in ATTENTION_ILMS:
        found["ilm"] = attention_ilm(args.ilm, args.ilm_file, model)
    return found


@contextmanager
def speech2text_changed(module: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """Within it ESPnet's ``Speech2Text.from_pretrained`` returns what ``change`` makes of its own.

    ``inference`` of ESPnet takes no scorers and keeps no times: this is where it builds the search.
    """
    cls = module.Speech2Text
    build = cls.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return change(build(*args, **kwargs))

    cls.from_pretrained = staticmethod(from_pretrained)
    try:
        yield
    finally:
        cls.from_pretrained = staticmethod(build)


def search_with(speech2text: Any, added: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The label-synchronous search of ``speech2text`` with more scorers and other weights.

    Args:
        speech2text: ESPnet's.
        added: Scorers by name.
        weights: By name, of all scorers; one without or of 0 is left out.

    Raises:
        UserError: Another kind of search.
    """
    import torch
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet.nets.beam_search import BeamSearch

    search = speech2text.beam_search
    if type(search) not in (BeamSearch, BatchBeamSearch):
        raise UserError(
            "--fusion_llm and --ilm belong to ESPnet's label-synchronous search of "
            f"CTC and attention models, not to {type(search or speech2text).__name__}: leave out "
            "time_sync, streaming and partial_ar; transducers have `--search ours`"
        )
    new = type(search)(
        scorers={**search.scorers, **added},
        weights=dict(weights),
        beam_size=search.beam_size,
        vocab_size=search.n_vocab,
        sos=search.sos,
        eos=search.eos,
        token_list=search.token_list,
        pre_beam_score_key=search.pre_beam_score_key,
        hyp_primer=search.hyp_primer,
        normalize_length=search.normalize_length,
    )
    return new.to(device=speech2text.device, dtype=getattr(torch, speech2text.dtype)).eval()
