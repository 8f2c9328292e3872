"""The auxiliary losses of a speech LLM: which there are, where they listen, what they weigh.

B utterances, T frames, E width, U tokens.

``model_conf: auxiliary`` is a list of ``{loss: ctc | rnnt, tap: encoder | adapter | llm_prefix,
weight, vocabulary, name, ...}``, where ``...`` are options of the loss. The heads are trained with
the model and dropped afterwards: nothing reads them in decoding.

[Speech Prefix-Tuning with RNNT Loss, arXiv 2406.14701; LLMs and Speech, arXiv 2603.15045]
"""

import re
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.heads.abs_head import LabelHead, LabelLoss
from espnet_llm_plugin.speech_llm.heads.ctc import VocabularyCTC
from espnet_llm_plugin.speech_llm.heads.rnnt import RNNTHead
from espnet_llm_plugin.speech_llm.heads.vocabulary import label_vocabulary
from espnet_llm_plugin.speech_llm.units import LabelUnits

LOSSES = {"ctc": VocabularyCTC, "rnnt": RNNTHead}
TAPS = ("encoder", "adapter", "llm_prefix")
DEFAULT_WEIGHT = 0.3
# Names of losses and statistics that a head would be confused with.
_TAKEN = ("ctc", "ce", "llm", "language")


class Tap(NamedTuple):
    """What a head listens to."""

    outputs: Tensor  # (B, T, E)
    lengths: Tensor  # (B,)


class Entry(NamedTuple):
    """A head's place in the model."""

    name: str
    tap: str
    weight: float


class AuxiliaryHeads(torch.nn.Module):
    """Any number of heads by name.

    Args:
        confs: ``model_conf: auxiliary``.
        units: The decoder's.
        widths: E of every tap that there is.

    Attributes:
        entries: Of the heads, in the order of ``confs``.
    """

    def __init__(
        self,
        confs: Optional[Sequence[Mapping[str, Any]]],
        units: LabelUnits,
        widths: Mapping[str, int],
    ):
        super().__init__()
        self.entries: list[Entry] = []
        if confs is not None and not isinstance(confs, (list, tuple)):
            raise UserError(
                f"model_conf: auxiliary is {confs!r}; expected a list, of one mapping for each "
                "auxiliary loss"
            )
        for number, conf in enumerate(confs or (), start=1):
            entry, head = _build(f"model_conf: auxiliary, number {number}", conf, units, widths)
            if hasattr(self, entry.name):
                raise UserError(
                    f"model_conf: auxiliary, number {number}: the name {entry.name!r} is taken; "
                    "give the head another one (name)"
                )
            self.entries.append(entry)
            self.add_module(entry.name, head)

    def __len__(self) -> int:
        return len(self.entries)

    def head(self, entry: Entry) -> LabelHead:
        """The head of an entry."""
        return self._modules[entry.name]

    def stat_names(self) -> list[str]:
        """Names of what :meth:`loss` reports."""
        return [name for entry in self.entries for name in loss_stats(entry.name)]

    def loss(
        self,
        taps: Mapping[str, Optional[Tap]],
        text: Tensor,
        lengths: Tensor,
        by_length: bool,
        stats: dict[str, Any],
    ) -> Tensor:
        """Weighted sum of all losses; ``stats`` gets those of each.

        Args:
            taps: What there is to listen to.
            text: (B, U) token ids.
            lengths: (B,) their numbers.
            by_length: Means per label; otherwise per utterance.
            stats: See :func:`report`.
        """
        total = torch.zeros((), device=text.device)
        for entry in self.entries:
            losses = self.head(entry).loss(*taps[entry.tap], text, lengths)
            total = total + entry.weight * report(entry.name, losses, by_length, stats)
        return total


def loss_stats(name: str) -> list[str]:
    """Names of what :func:`report` reports."""
    return [f"loss_{name}", f"{name}_per_label", f"num_{name}_skipped"]


def report(name: str, losses: LabelLoss, by_length: bool, stats: dict[str, Any]) -> Tensor:
    """The mean of ``losses``; ``stats`` gets it, nats per label, and the utterances left out."""
    loss = losses.reduced(by_length)
    values = (loss.detach(), losses.reduced(by_length=True).detach(), losses.num_skipped)
    stats.update(zip(loss_stats(name), values))
    return loss


def _build(
    where: str, conf: Any, units: LabelUnits, widths: Mapping[str, int]
) -> tuple[Entry, torch.nn.Module]:
    if not isinstance(conf, Mapping):
        raise UserError(f"{where} is {conf!r}; expected a mapping with loss, tap, weight")
    conf = dict(conf)
    loss, tap = conf.pop("loss", None), conf.pop("tap", None)
    for key, value, known in (("loss", loss, LOSSES), ("tap", tap, TAPS)):
        if value not in known:
            raise UserError(f"{where}: {key} is {value!r}; expected one of {', '.join(known)}")
    if tap not in widths:
        raise UserError(
            f"{where}: tap llm_prefix needs the LLM's outputs at the audio, which the interfaces "
            "merged and cross_attention do not compute; use tap adapter"
        )
    weight = conf.pop("weight", DEFAULT_WEIGHT)
    if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise UserError(f"{where}: weight must be above 0, got {weight!r}")
    name = conf.pop("name", f"{tap}_{loss}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in _TAKEN:
        raise UserError(
            f"{where}: name is {name!r}; expected letters, digits and _, and none of "
            f"{', '.join(_TAKEN)}"
        )
    vocabulary = label_vocabulary(f"{where}: vocabulary", conf.pop("vocabulary", None), units)
    kind = LOSSES[loss]
    refuse_unknown(f"{where} (loss {loss})", conf, kind.__init__, ("self", "vocabulary", "width"))
    return Entry(name, tap, float(weight)), kind(vocabulary, widths[tap], **conf)
