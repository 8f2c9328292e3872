"""What our ESPnet ASR models have in common: arguments, weights, skips, whole checkpoints."""

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Iterator, Mapping, Sequence

import torch

from espnet_llm_plugin.errors import UserError

# what ASRTask.build_model passes itself, and no model_conf may set
TASK_ARGUMENTS = (
    "self",
    "vocab_size",
    "token_list",
    "frontend",
    "specaug",
    "normalize",
    "preencoder",
    "encoder",
    "postencoder",
    "decoder",
    "ctc",
    "joint_network",
)

# Of a batch of which nothing is left. ESPnet's distributed training divides losses and statistics
# by the sum of the weights over all processes: zero would make them NaN if no process had a usable
# utterance, and one would pull the means of an epoch (and the choice of the best) towards zero.
NO_WEIGHT = 1e-20


_TRAINS: ContextVar[bool] = ContextVar("_TRAINS", default=True)


@contextmanager
def without_training_parts() -> Iterator[None]:
    """Models that are built here lack what training alone needs, and the files it is made from."""
    token = _TRAINS.set(False)
    try:
        yield
    finally:
        _TRAINS.reset(token)


def builds_training_parts() -> bool:
    """Whether a model is to have what training alone needs."""
    return _TRAINS.get()


def zero_loss(model: torch.nn.Module) -> torch.Tensor:
    """Zero with a gradient for every trained parameter, as distributed training expects."""
    return sum((p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(()))


def refuse_incomplete(model: torch.nn.Module, state_dict: Mapping[str, Any], hint: str) -> None:
    """Refuse a checkpoint that lacks tensors of the model or has them in another shape.

    ESPnet's inference loads with ``strict=False``, which leaves tensors that the checkpoint lacks
    at their random initial values.

    Args:
        model: Before loading.
        state_dict: The checkpoint.
        hint: What else may be wrong about a tensor's shape, for the message.

    Raises:
        UserError: With names of the tensors.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's {len(own)} tensors: "
            f"{_some(missing)}. Is it of another model or predictor than the configuration's? "
            "(to start training from parts of a checkpoint use --init_param)"
        )
    wrong = [
        f"{key} (checkpoint {tuple(state_dict[key].shape)}, model {tuple(own[key].shape)})"
        for key in own
        if state_dict[key].shape != own[key].shape
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the checkpoint's tensors have another shape than the model's: "
            f"{_some(wrong)}. {hint}"
        )


class SkipLog:
    """Warns of each utterance that is left out once in a run."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def warn(self, name: str, why: str) -> None:
        """Log that utterance ``name`` is skipped, unless that is known."""
        if name not in self._reported:
            self._reported.add(name)
            logging.warning(f"skipped {name}: {why}")


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
