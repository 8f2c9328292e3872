"""Trained ASR and language models from their files, for decoding."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence, Union

import torch
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.model_parts import without_training_parts

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.label_ngram import LabelNgram

PathLike = Union[str, Path]


class TextConverter:
    """Token ids to tokens and text, by ESPnet's tokenizers.

    Args:
        token_list: V tokens.
        token_type: ``bpe``, ``char``, ``word``, ... or None (tokens only, no text).
        bpemodel: SentencePiece model of token type ``bpe``; LLM of ``hugging_face``.
    """

    def __init__(
        self, token_list: Sequence[str], token_type: Optional[str], bpemodel: Optional[PathLike]
    ):
        from espnet2.text.build_tokenizer import build_tokenizer

        self.token_list = list(token_list)
        self.token_type = token_type
        self._tokenizer = None
        if token_type == "bpe":
            if bpemodel is None:
                raise UserError("token_type bpe needs --bpemodel, the SentencePiece model")
            require_file(bpemodel, "--bpemodel", "the SentencePiece model of the token list")
            self._tokenizer = build_tokenizer(token_type="bpe", bpemodel=str(bpemodel))
        elif token_type == "hugging_face":
            if bpemodel is None:
                raise UserError("token_type hugging_face needs --bpemodel, the LLM's directory")
            self._tokenizer = build_tokenizer(token_type=token_type, bpemodel=str(bpemodel))
        elif token_type is not None:
            self._tokenizer = build_tokenizer(token_type=token_type)

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens of ids."""
        return [self.token_list[i] for i in token_ids]

    def text(self, tokens: Sequence[str]) -> Optional[str]:
        """Text of tokens, or None without a tokenizer."""
        return None if self._tokenizer is None else self._tokenizer.tokens2text(list(tokens))


@dataclass(frozen=True)
class LoadedASR:
    """A model ready to decode.

    Attributes:
        model: In evaluation mode.
        train_args: Its training configuration.
        text: Converter of token ids.
        is_ctc: CTC-only ESPnet model; otherwise a transducer or speech LLM of this package.
        sample_rate: Hz, or None where the input is no waveform.
        is_speech_llm: A speech LLM of this package.
    """

    model: torch.nn.Module
    train_args: argparse.Namespace
    text: TextConverter
    is_ctc: bool
    sample_rate: Optional[int]
    is_speech_llm: bool = False


def load_asr(
    config: PathLike,
    model_file: PathLike,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    predictor: Optional[str] = None,
    predictor_conf: Optional[Mapping[str, Any]] = None,
    predictor_file: Optional[PathLike] = None,
    token_type: Optional[str] = None,
    bpemodel: Optional[PathLike] = None,
) -> LoadedASR:
    """Load what :mod:`espnet_llm_plugin.bin.asr_inference` decodes.

    Args:
        config: ``config.yaml`` of the training.
        model_file: Checkpoint.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``float64``.
        predictor: Replaces the predictor of a factorized transducer (LM swap), with
            ``predictor_conf`` and, if it has weights of its own, ``predictor_file``.
        token_type: Instead of the training configuration's.
        bpemodel: Instead of the training configuration's.

    Raises:
        UserError: A file is missing or broken, the checkpoint does not fit the configuration, or
            the model is of a kind that only ESPnet's own decoding handles.
    """
    registry.register()
    from espnet2.asr.espnet_model import ESPnetASRModel
    from espnet2.tasks.asr import ASRTask

    from espnet_llm_plugin.speech_llm.model import SpeechLLMModel
    from espnet_llm_plugin.transducer.base_model import AbsTransducerModel
    from espnet_llm_plugin.transducer.swap import swap_predictor

    model, train_args = _build(ASRTask, "asr", config, model_file, device)
    is_speech_llm = isinstance(model, SpeechLLMModel)
    is_ctc = not isinstance(model, AbsTransducerModel) and not is_speech_llm
    if is_ctc:
        if not isinstance(model, ESPnetASRModel) or model.ctc is None or model.ctc_weight != 1.0:
            raise UserError(
                f"{config} describes a {type(model).__name__} with an attention or transducer "
                "decoder of ESPnet. This command decodes transducer, factorized_transducer, "
                "speech_llm and CTC-only (ctc_weight: 1.0) models; use `--search espnet` for this "
                "one"
            )
        _check_complete(model, model_file)
    if predictor is not None:
        swap_predictor(model, predictor, predictor_conf, predictor_file)
    elif predictor_conf or predictor_file:
        raise UserError("--predictor_conf and --predictor_file need --predictor")
    bpemodel = bpemodel if bpemodel is not None else train_args.bpemodel
    return LoadedASR(
        model=model.to(device=device, dtype=getattr(torch, dtype)).eval(),
        train_args=train_args,
        text=TextConverter(
            model.token_list,
            token_type if token_type is not None else train_args.token_type,
            bpemodel,
        ),
        is_ctc=is_ctc,
        sample_rate=sample_rate(train_args),
        is_speech_llm=is_speech_llm,
    )


def load_model(
    config: PathLike, model_file: PathLike, device: str = "cpu"
) -> tuple[torch.nn.Module, argparse.Namespace]:
    """Any ASR model of ESPnet or this package for scoring, not for our searches.

    Returns:
        The model in evaluation mode, and its training configuration.

    Raises:
        UserError: A file is missing or broken, or the checkpoint does not fit the configuration.
    """
    registry.register()
    from espnet2.asr.espnet_model import ESPnetASRModel
    from espnet2.tasks.asr import ASRTask

    model, train_args = _build(ASRTask, "asr", config, model_file, device)
    if type(model) is ESPnetASRModel:
        _check_complete(model, model_file)
    return model.to(device).eval(), train_args


def load_lm(
    config: PathLike,
    model_file: PathLike,
    token_list: Sequence[str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> torch.nn.Module:
    """Load an ESPnet LM (``LMTask``) as external LM of a model with ``token_list``.

    Raises:
        UserError: A file is missing or broken, or the LM was trained on other tokens.
    """
    registry.register()
    from espnet2.tasks.lm import LMTask

    model, train_args = _build(LMTask, "lm", config, model_file, device)
    theirs = list(train_args.token_list)
    if theirs != list(token_list):
        where = next(
            (i for i, (a, b) in enumerate(zip(theirs, token_list)) if a != b),
            min(len(theirs), len(token_list)),
        )
        raise UserError(
            f"the LM of {config} has other tokens than the ASR model ({len(theirs)} and "
            f"{len(token_list)} tokens, first difference at id {where}). Train the LM on the ASR "
            "model's token list"
        )
    return model.lm.to(device=device, dtype=getattr(torch, dtype)).eval()


def load_ilm(
    ilm: str, ilm_file: Optional[PathLike], token_list: Sequence[str]
) -> Optional["LabelNgram"]:
    """The bigram of ``--ilm bigram``; None for the model's own estimate.

    Raises:
        UserError: One of the two options without the other, a bigram of other tokens, or the
            internal LM of an attention decoder, which our searches do not decode.
    """
    if ilm in ("zero_context", "mini_lstm"):
        raise UserError(
            f"--ilm {ilm} is of an attention decoder, decoded by `asr_inference --search "
            "espnet`; an RNN-T has zero_encoder and bigram"
        )
    if ilm != "bigram":
        if ilm_file:
            raise UserError(f"--ilm_file {ilm_file} needs --ilm bigram")
        return None
    from espnet_llm_plugin.fusion.label_ngram import LabelNgram

    path = require_file(ilm_file, "--ilm_file", "bigram written by estimate_ngram --order 2")
    ngram = LabelNgram.load(path, token_list)
    if ngram.order != 2:
        raise UserError(
            f"--ilm_file {path} is an n-gram of order {ngram.order}; --ilm bigram needs one of "
            "estimate_ngram --order 2"
        )
    return ngram


def require_file(path: Optional[PathLike], option: str, what: str) -> Path:
    """``path`` if it is a file.

    Raises:
        UserError: It is not given, or there is no such file.
    """
    if path is None:
        raise UserError(f"{option} is missing: {what}")
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: there is no such file ({what})")
    return Path(path)


def read_train_config(config: PathLike) -> dict[str, Any]:
    """The options of a training, from the ``config.yaml`` that ESPnet wrote.

    Raises:
        UserError: It is something else.
    """
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is not a YAML file: {error}") from error
    if not isinstance(content, dict) or "token_list" not in content:
        raise UserError(
            f"{config} is not the configuration of a training: expected the config.yaml that "
            "ESPnet writes into the experiment directory"
        )
    return content


def has_attention_decoder(config: Optional[PathLike]) -> bool:
    """Whether a training configuration is of an ESPnet model with an attention decoder.

    False where there is no such file, which loading the model reports.
    """
    if not config or not Path(config).is_file():
        return False
    content = read_train_config(config)
    ctc_weight = (content.get("model_conf") or {}).get("ctc_weight", 0.5)
    decoder = content.get("decoder", "transformer")
    return (
        content.get("model", "espnet") == "espnet" and ctc_weight != 1.0 and decoder != "transducer"
    )


def _build(task: Any, kind: str, config: PathLike, model_file: PathLike, device: str):
    config = require_file(config, f"--{kind}_train_config", "config.yaml of the training")
    model_option = "--asr_model_file" if kind == "asr" else "--lm_file"
    model_file = require_file(model_file, model_option, "the checkpoint, a .pth file")
    read_train_config(config)
    try:
        with without_training_parts():
            return task.build_model_from_file(str(config), str(model_file), device)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        # torch.load and load_state_dict raise many kinds: the file is cut, empty, of other shapes.
        logging.debug("loading failed", exc_info=True)
        raise UserError(f"cannot load {model_file} with {config}: {error}") from error


def _check_complete(model: torch.nn.Module, model_file: PathLike) -> None:
    # ESPnet loads with strict=False: a checkpoint of another model would leave random weights.
    checkpoint = torch.load(model_file, map_location="cpu", weights_only=False, mmap=True)
    checkpoint = checkpoint.get("module", checkpoint)
    missing = [name for name, _ in model.named_parameters() if name not in checkpoint]
    # A CTC-only model never uses a decoder.
    missing = [name for name in missing if not name.startswith("decoder.")]
    if missing:
        raise UserError(
            f"{model_file} lacks {len(missing)} parameters of the model, e.g. {missing[0]}: it is "
            "the checkpoint of another model"
        )


def sample_rate(train_args: argparse.Namespace) -> Optional[int]:
    """Hz of the waveforms that a model was trained on; None where it reads no waveform."""
    if getattr(train_args, "frontend", None) is None:
        return None
    rate = (train_args.frontend_conf or {}).get("fs", 16000)
    if isinstance(rate, str):
        import humanfriendly

        rate = humanfriendly.parse_size(rate)
    return int(rate)
