"""Options of the decoding command lines: ESPnet's, and ours beside them."""

import argparse
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import yaml

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.endpoint import EndpointRule, endpoint_rules
from espnet_llm_plugin.inference.fusion_options import add_fusion_options
from espnet_llm_plugin.inference.loading import read_train_config
from espnet_llm_plugin.inference.speech_llm_options import add_speech_llm_options

_ESPNET = "espnet2.bin.asr_inference"
_ESPNET_STREAMING = "espnet2.bin.asr_inference_streaming"

# ESPnet's options that our search cannot honour, with what to do instead.
_UNSUPPORTED = {
    "time_sync": "the search is time-synchronous as it is",
    "word_lm_train_config": "word LMs are not supported",
    "word_lm_file": "word LMs are not supported",
    "model_tag": "download the model and give --asr_train_config and --asr_model_file",
    "enh_s2t_task": "enhancement models are not supported",
    "multi_asr": "multi-speaker models are not supported",
    "quantize_asr_model": "quantisation is not supported",
    "quantize_lm": "quantisation is not supported",
    "quantize_modules": "quantisation is not supported",
    "quantize_dtype": "quantisation is not supported",
    "streaming": "use espnet_llm_plugin.bin.asr_inference_streaming",
    "hugging_face_decoder": "Hugging Face decoders are not supported",
    "hugging_face_decoder_conf": "Hugging Face decoders are not supported",
    "transducer_conf": "it configures ESPnet's transducer searches; ours has "
    "--max_symbols_per_frame and --normalize_length",
    "lang_prompt_token": "prompts are not supported",
    "nlp_prompt_token": "prompts are not supported",
    "prompt_token_file": "prompts are not supported",
    "partial_ar": "partially autoregressive decoding is not supported",
    "threshold_probability": "partially autoregressive decoding is not supported",
    "max_seq_len": "partially autoregressive decoding is not supported",
    "max_mask_parallel": "partially autoregressive decoding is not supported",
    "allow_variable_data_keys": "decoding reads `speech` only",
    "disable_repetition_detection": "it belongs to ESPnet's block-synchronous search",
    "encoded_feat_length_limit": "it belongs to ESPnet's block-synchronous search; ours keeps no "
    "encoder output, and left_context limits the encoder's",
    "decoder_text_length_limit": "it belongs to ESPnet's block-synchronous search; an LLM's full "
    "context is cut by itself",
}


# Those that a time-synchronous search (transducers, CTC) has no use for.
_LABEL_SYNCHRONOUS = {
    "maxlenratio": "a time-synchronous search has no output length limit",
    "minlenratio": "a time-synchronous search has no output length limit",
}


def espnet_parser() -> argparse.ArgumentParser:
    """A fresh parser of ``espnet2.bin.asr_inference``."""
    return import_quietly(_ESPNET).get_parser()


def espnet_streaming_parser() -> argparse.ArgumentParser:
    """A fresh parser of ``espnet2.bin.asr_inference_streaming``."""
    return import_quietly(_ESPNET_STREAMING).get_parser()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The LM swap."""
    from espnet2.utils.nested_dict_action import NestedDictAction

    group = parser.add_argument_group("LM swap (factorized_transducer)")
    group.add_argument(
        "--predictor",
        choices=["stateless", "lstm", "llm"],
        help="Replace the trained predictor by this one",
    )
    group.add_argument(
        "--predictor_conf",
        action=NestedDictAction,
        default=dict(),
        help="Its options, e.g. --predictor_conf llm=exp/llm_adapted",
    )
    group.add_argument(
        "--predictor_file", help="Checkpoint of a transducer that has such a predictor"
    )


def add_chunk_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--chunk_ms``."""
    group.add_argument(
        "--chunk_ms",
        type=float,
        help="Chunk of a streaming encoder in milliseconds; inf: whole utterances (default: the "
        "model's)",
    )


def add_search_options(
    parser: argparse.ArgumentParser, espnet_search: bool = True, chunk: bool = True
) -> None:
    """Options of our search; with the choice of ESPnet's, and of the encoder's chunk."""
    group = parser.add_argument_group("Search of espnet_llm_plugin")
    if espnet_search:
        group.add_argument(
            "--search",
            choices=["ours", "espnet"],
            default="ours",
            help="espnet: run espnet2.bin.asr_inference, unmodified, with its own options",
        )
    if chunk:
        add_chunk_option(group)
    group.add_argument(
        "--alpha",
        type=float,
        help="Scale of the predictor LM inside the label softmax (default: the model's)",
    )
    group.add_argument(
        "--beta",
        type=float,
        help="Scale of the predictor LM added to the label score (default: the model's)",
    )
    group.add_argument(
        "--label_bonus",
        type=float,
        help="Added to the score of every label; ESPnet's --penalty is the same "
        "(default: the model's)",
    )
    group.add_argument(
        "--ilm_weight",
        type=float,
        default=0.0,
        help="Weight of the internal LM, which is subtracted: the predictor LM of a "
        "factorized_transducer, the estimate of --ilm of an RNN-T or attention decoder",
    )
    add_ilm_options(group)
    group.add_argument(
        "--blank_scale", type=float, default=1.0, help="Factor of the blank's log-probability"
    )
    group.add_argument(
        "--max_symbols_per_frame",
        type=int,
        default=3,
        help="Labels a transducer may emit in one encoder frame",
    )
    add_fusion_options(parser)


def add_ilm_options(group: Any) -> None:
    """Which internal LM is subtracted; ``group``: of options."""
    group.add_argument(
        "--ilm",
        choices=["zero_encoder", "bigram", "zero_context", "mini_lstm"],
        default="zero_encoder",
        help="Internal LM of an RNN-T: its own estimate without encoder, or a bigram of its "
        "labels; of an attention decoder (--search espnet): zero_context or mini_lstm",
    )
    group.add_argument(
        "--ilm_file",
        help="Bigram written by estimate_ngram --order 2, mini-LSTM written by train_ilm",
    )


def add_endpoint_options(parser: argparse.ArgumentParser, default: bool) -> None:
    """Kaldi's endpoint rules; on by default or not."""
    from espnet2.utils.types import str2bool

    group = parser.add_argument_group("Endpoints (seconds; `inf` switches a rule off)")
    group.add_argument(
        "--endpoint",
        type=str2bool,
        default=default,
        help="End segments by the rules below; the search and its LMs begin anew after each",
    )
    group.add_argument(
        "--rule1_min_trailing_silence",
        type=float,
        default=2.4,
        help="A segment without a label ends after so much silence",
    )
    group.add_argument(
        "--rule2_min_trailing_silence",
        type=float,
        default=1.2,
        help="A segment ends after so much silence behind its last label",
    )
    group.add_argument(
        "--rule3_min_utterance_length",
        type=float,
        default=20.0,
        help="A segment of this length ends, wherever that is",
    )
    group.add_argument(
        "--min_segment_length",
        type=float,
        default=0.0,
        help="No segment ends by rule 1 or 2 before",
    )


def endpoint_rules_of(args: argparse.Namespace) -> tuple[EndpointRule, ...]:
    """The rules that the options ask for; none without ``--endpoint true``."""
    if not args.endpoint:
        return ()
    return endpoint_rules(
        args.rule1_min_trailing_silence,
        args.rule2_min_trailing_silence,
        args.rule3_min_utterance_length,
        args.min_segment_length,
    )


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """ESPnet's names of models, device and search, for commands of ours that decode."""
    types = import_quietly("espnet2.utils.types")
    parser.add_argument("--config", help="Options in YAML; may be given several times")
    parser.add_argument(
        "--log_level",
        type=lambda x: x.upper(),
        default="INFO",
        choices=("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET"),
    )
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU; 1: one GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])

    group = parser.add_argument_group("Models")
    group.add_argument("--asr_train_config", help="config.yaml of the ASR training")
    group.add_argument("--asr_model_file", help="ASR checkpoint")
    group.add_argument("--lm_train_config", help="config.yaml of an external LM's training")
    group.add_argument("--lm_file", help="LM checkpoint")
    group.add_argument("--token_type", type=types.str_or_none)
    group.add_argument("--bpemodel", type=types.str_or_none)

    group = parser.add_argument_group("Search")
    group.add_argument("--beam_size", type=int, default=4)
    group.add_argument("--lm_weight", type=float, default=1.0)
    group.add_argument("--normalize_length", type=types.str2bool, default=False)
    parser.set_defaults(nbest=1, penalty=0.0, batch_size=1)


def parse_with_configs(
    parser: argparse.ArgumentParser, cmd: Optional[Sequence[str]] = None
) -> argparse.Namespace:
    """Parse; ``--config`` may be given several times, later files and the command line win.

    Raises:
        UserError: A configuration is missing, is no YAML mapping, or has an unknown key.
    """
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    configs.add_argument("--config", action="append", default=[])
    found, rest = configs.parse_known_args(cmd)
    known = {action.dest for action in parser._actions} - {"help", "config"}
    for path in found.config:
        if not Path(path).is_file():
            raise UserError(f"--config {path}: there is no such file")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"--config {path} is not a YAML file: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"--config {path} has no `option: value` lines")
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"--config {path}: unknown option {', '.join(map(str, unknown))}")
        parser.set_defaults(**values)
    return parser.parse_args(rest)


def changed_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Options of a (fresh) parser that have another value than its default."""
    return [
        action.dest
        for action in parser._actions
        if action.dest not in ("help", "config")
        and getattr(args, action.dest, action.default) != action.default
    ]


def refuse_unsupported(
    args: argparse.Namespace,
    is_ctc: Optional[bool] = None,
    streaming: bool = False,
    is_speech_llm: bool = False,
) -> None:
    """Refuse options of ESPnet without a meaning here, rather than ignore them.

    Args:
        args: Parsed options.
        is_ctc: Whether the model is CTC-only; None if not known yet.
        streaming: Whether they are those of ``asr_inference_streaming``.
        is_speech_llm: Whether the model is a speech LLM.

    Raises:
        UserError: Names the option, why, and what to do.
    """
    changed = changed_options(args, espnet_streaming_parser() if streaming else espnet_parser())
    unsupported = dict(_UNSUPPORTED)
    if streaming or (is_ctc is not None and not is_speech_llm):
        unsupported.update(_LABEL_SYNCHRONOUS)
    for name in changed:
        if name in unsupported:
            advice = "leave it out" if streaming else "leave it out, or use `--search espnet`"
            raise UserError(f"--{name} {getattr(args, name)}: {unsupported[name]} ({advice})")
    if streaming and args.batch_size > 1:
        raise UserError(f"--batch_size {args.batch_size}: streams are decoded one by one; use 1")
    if streaming and args.sim_chunk_length < 0:
        raise UserError(f"--sim_chunk_length {args.sim_chunk_length}: give samples, or 0 for all")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: at least one utterance is needed")
    if args.ngpu > 1:
        raise UserError(f"--ngpu {args.ngpu}: decoding uses one GPU; run more jobs instead")
    if args.dtype == "float16":
        raise UserError("--dtype float16 is not supported: use float32")
    if "ngram_weight" in changed and not args.ngram_file:
        raise UserError(f"--ngram_weight {args.ngram_weight} needs --ngram_file")
    if args.lm_file and not args.lm_train_config:
        raise UserError("--lm_file needs --lm_train_config")
    if is_speech_llm:
        _refuse_changed(
            args,
            (add_model_options, add_search_options),
            "it belongs to the search of transducers, and this model is a speech_llm",
            allowed=("search", "label_bonus", "chunk_ms"),
        )
        return
    if is_ctc is not None and not streaming:
        _refuse_changed(
            args, (add_speech_llm_options,), "it belongs to the search of a speech_llm model"
        )
    if is_ctc is False and "ctc_weight" in changed:
        raise UserError(
            f"--ctc_weight {args.ctc_weight}: a transducer's search has no CTC score; leave it out"
        )
    if is_ctc and "ctc_weight" in changed and args.ctc_weight != 1.0:
        raise UserError(f"--ctc_weight {args.ctc_weight}: the weight of a CTC-only model is 1")


def _refuse_changed(
    args: argparse.Namespace,
    groups: Sequence[Callable[[argparse.ArgumentParser], None]],
    why: str,
    allowed: Sequence[str] = (),
) -> None:
    """Refuse the options of some groups that have another value than the default."""
    parser = argparse.ArgumentParser()
    for add in groups:
        add(parser)
    for name in changed_options(args, parser):
        if name not in allowed:
            raise UserError(f"--{name} {getattr(args, name)}: {why} (leave it out)")


def device_of(args: argparse.Namespace) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        UserError: A GPU is asked for and there is none.
    """
    import torch

    if args.ngpu == 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"--ngpu {args.ngpu}, but PyTorch sees no GPU; use --ngpu 0")
    return "cuda"


def bonus_of(args: argparse.Namespace) -> Optional[float]:
    """``--label_bonus``, or ESPnet's name for it, ``--penalty``."""
    if args.penalty and args.label_bonus is not None and args.penalty != args.label_bonus:
        raise UserError(
            f"--label_bonus {args.label_bonus} and --penalty {args.penalty} are two names of one "
            "number: give one"
        )
    return args.penalty or None if args.label_bonus is None else args.label_bonus


def identity(args: argparse.Namespace, files: Sequence[Optional[str]]) -> dict[str, Any]:
    """What a result depends on: options, size and time of the model files, and frozen LLMs.

    A missing file is left out: loading the model reports it.
    """
    from espnet_llm_plugin.llm.backbone import FrozenLLM

    options = {
        name: value
        for name, value in sorted(vars(args).items())
        if name not in ("output_dir", "log_level", "num_workers", "nj", "config")
    }
    stats = {str(path): Path(path).stat() for path in files if path and Path(path).is_file()}
    return {
        "options": options,
        "files": {path: [stat.st_size, stat.st_mtime] for path, stat in stats.items()},
        "llms": {llm: FrozenLLM(llm).fingerprint.hex() for llm in llms_of(args)},
    }


def llms_of(args: argparse.Namespace) -> list[str]:
    """LLMs that the models read from their own directories: predictor, speech LLM, LM."""

    def part(path: Optional[str], *keys: str) -> Any:
        found = read_train_config(path) if path and Path(path).is_file() else {}
        for key in keys:
            found = found.get(key) or {}
        return found

    if args.predictor is None:
        predictor = part(args.asr_train_config, "decoder_conf", "predictor_conf")
    else:
        predictor = args.predictor_conf
    speech_llm = part(args.asr_train_config, "decoder_conf")
    lm = part(args.lm_train_config, "lm_conf")
    named = [conf["llm"] for conf in (predictor, speech_llm, lm) if conf.get("llm")]
    fusion = getattr(args, "fusion_llm", None)
    return [*named, fusion] if fusion else named
