"""Which models have a :class:`~espnet_llm_plugin.llm.fast_decoder.FastDecoder`."""

from typing import Any, Optional

from espnet_llm_plugin.llm import fast_bloom, fast_llama
from espnet_llm_plugin.llm.fast_decoder import FastDecoder


def why_not_fast(model: Any) -> Optional[str]:
    """Why there is none for the model; None: there is one.

    What a structure does not tell (the meaning of its options) is left to a numeric comparison.
    """
    return _of(model).why_not_fast(model)


def fast_decoder(model: Any) -> FastDecoder:
    """That of a model for which :func:`why_not_fast` has no reason."""
    module = _of(model)
    return module.FastBloom(model) if module is fast_bloom else module.FastLlama(model)


def _of(model: Any) -> Any:
    config = getattr(model, "config", None)
    return fast_bloom if getattr(config, "model_type", None) == "bloom" else fast_llama
