"""The language models that a rescoring command is given: LLMs, ESPnet LMs, internal LMs."""

import argparse
from pathlib import Path
from typing import Any, Optional

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.text_scorers import (
    LabelTextScorer,
    LLMTextScorer,
    TextScorer,
    label_scorer,
)
from espnet_llm_plugin.inference.loading import load_lm, load_model, read_train_config, require_file
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import FrozenLLM, resolve_llm
from espnet_llm_plugin.llm.directory import TOKENS_FILE, llm_tokens

ATTENTION_ILMS = ("zero_context", "mini_lstm")


def load_text_scorer(
    args: argparse.Namespace, device: torch.device
) -> tuple[TextScorer, Optional[list[str]], dict[str, Any]]:
    """The LM of ``--llm``, or of ``--lm_train_config`` and ``--lm_file``.

    Returns:
        The scorer; the token list it is over, None for an LLM in its own tokens; and what its
        scores depend on.

    Raises:
        UserError: None or both are given, or options that do not fit it.
    """
    if not (args.llm and not is_adapted(args.llm)):
        lm, tokens, same = load_label_lm(args, device)
        if args.lm_lowercase:
            raise UserError(
                "--lm_lowercase true: an LM over the ASR tokens scores these tokens; it is for an "
                "LLM in its own tokens"
            )
        same.update(eos=args.eos, lm_temperature=args.lm_temperature)
        options = dict(end=args.eos, temperature=args.lm_temperature)
        return label_scorer(lm, len(tokens), device, **options), tokens, same
    _one_lm(args)
    llm = FrozenLLM(args.llm, dtype=args.llm_dtype)
    names = ("eos", "lm_temperature", "lm_lowercase", "llm_dtype")
    same = {"lm": llm.fingerprint.hex(), **{name: getattr(args, name) for name in names}}
    scorer = LLMTextScorer(
        llm.model(device),
        load_tokenizer(llm.directory),
        llm.name,
        end=args.eos,
        lowercase=args.lm_lowercase,
        temperature=args.lm_temperature,
    )
    return scorer, None, same


def load_label_lm(
    args: argparse.Namespace, device: torch.device
) -> tuple[Any, list[str], dict[str, Any]]:
    """An LM over ASR tokens: ``LMTask``'s ``model.lm``, its token list, and what identifies it.

    Raises:
        UserError: None or two are given, or an LLM that is not adapted.
    """
    _one_lm(args)
    if args.lm_train_config:
        config = require_file(args.lm_train_config, "--lm_train_config", "config.yaml of the LM")
        tokens = list(read_train_config(config)["token_list"])
        lm = load_lm(config, args.lm_file, tokens, device=str(device))
        return lm, tokens, {"lm": _stamp(args.lm_file)}
    from espnet_llm_plugin.llm.causal_llm import CausalLLM

    tokens = llm_tokens(args.llm)
    lm = CausalLLM(len(tokens), llm=args.llm, frozen=True, dtype=args.llm_dtype).eval()
    return lm, tokens, {"lm": FrozenLLM(args.llm).fingerprint.hex(), "llm_dtype": args.llm_dtype}


def is_adapted(llm: str) -> bool:
    """Whether the rows of an LLM are the tokens of an ASR token list."""
    return (resolve_llm(llm) / TOKENS_FILE).is_file()


def _one_lm(args: argparse.Namespace) -> None:
    if bool(args.llm) == bool(args.lm_train_config):
        raise UserError(
            "give one LM: --llm (a Hugging Face LLM in its own tokens, or one adapted to the ASR "
            "tokens), or --lm_train_config and --lm_file (an ESPnet LM)"
        )


def _stamp(path: str) -> list:
    stat = Path(path).stat()
    return [str(path), stat.st_size, stat.st_mtime]


def attention_ilm(ilm: str, ilm_file: Optional[str], model: torch.nn.Module) -> Any:
    """The internal LM of an attention decoder: a scorer of ESPnet's search, and of whole sequences.

    Args:
        ilm: One of ``ATTENTION_ILMS``.
        ilm_file: Of ``mini_lstm``.
        model: ESPnet model.

    Raises:
        UserError: A model or file that does not fit.
    """
    if ilm == "mini_lstm":
        from espnet_llm_plugin.fusion.mini_lstm import MiniLSTMILM

        return MiniLSTMILM.load(
            require_file(ilm_file, "--ilm_file", "mini-LSTM written by train_ilm"), model
        )
    if ilm_file:
        raise UserError(f"--ilm_file {ilm_file} is for --ilm mini_lstm, not {ilm}")
    from espnet_llm_plugin.fusion.attention_ilm import ZeroContextILM

    return ZeroContextILM.of(model)


def internal_lm(
    args: argparse.Namespace, device: torch.device
) -> tuple[LabelTextScorer, list[str], dict[str, Any]]:
    """The internal LM of ``--ilm``, its token list, and what its scores depend on.

    Raises:
        UserError: Options that are missing, or another kind of model.
    """
    end = "none" if args.eos == "none" else "eos"
    model, _ = load_model(args.asr_train_config, args.asr_model_file, str(device))
    ilm = attention_ilm(args.ilm, args.ilm_file, model)
    same = {"ilm": _stamp(args.asr_model_file), "end": end}
    if args.ilm_file:
        same["ilm_file"] = _stamp(args.ilm_file)
    tokens = list(model.token_list)
    scorer = LabelTextScorer(lambda ids: ilm(ids, None)[0], len(tokens), device, end=end)
    return scorer, tokens, same
