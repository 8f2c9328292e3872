"""How much time one frame of a model stands for, from its configuration."""

import inspect
from typing import Any, Mapping, Optional

from espnet_llm_plugin.encoder.adapters_postencoder import FrameStackingPostEncoder
from espnet_llm_plugin.encoder.emformer import EmformerEncoder
from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder

# Time reduction of ESPnet's input layers
_INPUT_LAYERS = {
    None: 1,
    "linear": 1,
    "conv1d1": 1,
    "conv1d2": 2,
    "conv1d3": 3,
    "conv2d": 4,
    "conv2d1": 1,
    "conv2d2": 2,
    "conv2d6": 6,
    "conv2d8": 8,
}
_ESPNET_ENCODERS = (
    "branchformer",
    "conformer",
    "contextual_block_conformer",
    "contextual_block_transformer",
    "e_branchformer",
    "longformer",
    "multiconv_conformer",
    "transformer",
)
_OUR_ENCODERS = {"emformer": EmformerEncoder, "streaming_conformer": StreamingConformerEncoder}


def encoder_frame_ms(config: Mapping[str, Any]) -> Optional[float]:
    """Milliseconds per frame that encoder and post-encoder put out.

    Args:
        config: ESPnet's training configuration (``config.yaml`` of an experiment).

    Returns:
        None if that cannot be told: features instead of samples as input, a pre-encoder, or an
        encoder with a time reduction of its own (``rnn``, ``whisper``, ...).
    """
    shift = _frontend_ms(config)
    factors = (_encoder_factor(config), _postencoder_factor(config))
    if shift is None or config.get("preencoder") is not None or None in factors:
        return None
    return shift * factors[0] * factors[1]


def _frontend_ms(config: Mapping[str, Any]) -> Optional[float]:
    if config.get("frontend", "default") != "default" or config.get("input_size") is not None:
        return None
    # ESPnet's default frontend: 16 kHz, a hop of 128 samples
    conf = config.get("frontend_conf") or {}
    rate = conf.get("fs", 16000)
    if isinstance(rate, str):
        from humanfriendly import parse_size

        rate = parse_size(rate)
    return 1000 * conf.get("hop_length", 128) / rate


def _encoder_factor(config: Mapping[str, Any]) -> Optional[int]:
    name, conf = config.get("encoder", "rnn"), config.get("encoder_conf") or {}
    if name in _OUR_ENCODERS:
        return conf.get("subsampling", _default(_OUR_ENCODERS[name], "subsampling"))
    if name in _ESPNET_ENCODERS:
        return _INPUT_LAYERS.get(conf.get("input_layer", "conv2d"))
    return None


def _postencoder_factor(config: Mapping[str, Any]) -> Optional[int]:
    name, conf = config.get("postencoder"), config.get("postencoder_conf") or {}
    if name is None:
        return 1
    if name == "frame_stacking":
        return conf.get("stack", _default(FrameStackingPostEncoder, "stack"))
    if name == "length_adaptor":
        return 2 ** conf.get("length_adaptor_n_layers", 0)
    return None


def _default(cls: type, option: str) -> Any:
    return inspect.signature(cls).parameters[option].default
