"""Replace the predictor of a trained factorized transducer: the weak-to-strong LM swap.

In a training configuration the same is ``decoder_conf: {predictor: llm, ...}`` together with
``--init_param weak.pth:::decoder.predictor``, which loads everything but the predictor.
"""

from pathlib import Path
from typing import Any, Mapping, Optional, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.abs_predictor import AbsPredictor
from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder
from espnet_llm_plugin.transducer.predictors import build_predictor

_PREFIX = "decoder.predictor."


def swap_predictor(
    model: torch.nn.Module,
    name: str,
    conf: Optional[Mapping[str, Any]] = None,
    weights: Optional[Union[str, Path]] = None,
) -> AbsPredictor:
    """Give ``model`` another predictor, in place; everything else stays as it is.

    Args:
        model: a ``FactorizedTransducerModel``, or its decoder.
        name: the new predictor: ``stateless``, ``lstm`` or ``llm``.
        conf: its options, as in ``predictor_conf``.
        weights: checkpoint of a factorized transducer whose predictor's weights to take; needed
            by every predictor but ``llm``, which brings its own.

    Returns:
        The predictor that was replaced.

    Raises:
        UserError: not a factorized transducer; unknown predictor or option; weights missing or of
            another predictor; an LLM of another token list.
    """
    decoder = getattr(model, "decoder", model)
    if not isinstance(decoder, FactorizedTransducerDecoder):
        raise UserError(
            "only a factorized_transducer has a predictor to swap, got "
            f"{type(model).__name__} with decoder {type(decoder).__name__}"
        )
    new = build_predictor(name, decoder.num_labels, **(conf or {}))
    token_list = getattr(model, "token_list", None)
    if token_list is not None:
        new.check_token_list(token_list)
    if weights is not None:
        _load(new, name, Path(weights))
    elif any(True for _ in new.parameters()):
        raise UserError(
            f"predictor {name!r} has weights of its own to load: give the checkpoint of a "
            "factorized transducer that has such a predictor"
        )
    new.to(decoder.acoustic_output.weight)
    new.train(decoder.training)
    old, decoder.predictor = decoder.predictor, new
    return old


def _load(predictor: AbsPredictor, name: str, weights: Path) -> None:
    if not weights.is_file():
        raise UserError(f"no checkpoint {weights} to take the predictor's weights from")
    checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
    found = {k[len(_PREFIX) :]: v for k, v in checkpoint.items() if k.startswith(_PREFIX)}
    own = {key: tuple(value.shape) for key, value in predictor.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in found.items()}
    if own != given:
        raise UserError(
            f"{weights} has no weights for predictor {name!r} with these options: needed "
            f"{own}, found {given or 'none'}"
        )
    predictor.load_state_dict(found)
