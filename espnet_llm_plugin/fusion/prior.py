"""Priors of the labels of a CTC model, to be subtracted where a language model is added.

A CTC model is trained on P(labels | speech); a language model adds P(labels) a second time. Scores
are therefore combined as ``log P(y | speech) + lm_weight * log P_LM - prior_weight * log prior``.
Two forms [LLMs and Speech: Integration vs. Combination, arXiv 2603.15045; Revisiting PPL vs WER,
arXiv 2607.05612]:

``label``: subtracted once for each emitted label, at the same moment as the language model's score
is added. The mean of the softmax over training frames without blank, renormalised, or the labels'
share of the transcripts.

``frame``: subtracted at every frame for what the path emits there, blank and repetitions included.
The mean of the softmax over training frames.

B utterances, T frames, V tokens in the order of the token list (blank 0, sos/eos V-1).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence, Union

import torch
from torch import Tensor

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.token_list import BLANK, SOS_EOS

MODES = ("label", "frame")
# Below any probability that matters; keeps logarithms finite.
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Prior:
    """Log-probabilities to subtract.

    Attributes:
        mode: ``label`` or ``frame``.
        log_prior: Natural logarithms (V,), float32, in the order of the token list. In ``label``
            mode that of the blank, which is no label, is 0: subtracting it changes nothing.

    Raises:
        UserError: Another mode, or not a vector of finite numbers.
    """

    mode: str
    log_prior: Tensor

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r} of a prior; expected label or frame")
        if self.log_prior.dim() != 1 or not bool(self.log_prior.isfinite().all()):
            raise UserError(
                f"a prior is one finite number for each token; got shape "
                f"{tuple(self.log_prior.shape)}, finite: {bool(self.log_prior.isfinite().all())}"
            )

    def of(self, labels: Sequence[int]) -> float:
        """Sum over token ids; what is subtracted for a hypothesis in ``label`` mode."""
        return float(self.log_prior[list(labels)].double().sum())


def label_prior(probabilities: Tensor, smoothing: float = 0.0) -> Prior:
    """A ``label`` prior from weights (V,) that need not sum to one; blank's is ignored.

    Args:
        probabilities: Mean posteriors, or counts.
        smoothing: Share of a uniform distribution over the labels that is mixed in: labels that
            training has hardly seen would otherwise be favoured without limit.

    Raises:
        UserError: Nothing but blank, or a smoothing outside of [0, 1].
    """
    weights = probabilities.double().clone()
    weights[0] = 0.0
    mixed = _mixed(weights, smoothing, len(weights) - 1)
    mixed[0] = 1.0
    return Prior("label", mixed.log().float())


def frame_prior(probabilities: Tensor, smoothing: float = 0.0) -> Prior:
    """A ``frame`` prior from weights (V,); arguments of :func:`label_prior`."""
    mixed = _mixed(probabilities.double(), smoothing, len(probabilities))
    return Prior("frame", mixed.log().float())


def _mixed(weights: Tensor, smoothing: float, number: int) -> Tensor:
    if not 0 <= smoothing <= 1:
        raise UserError(f"smoothing {smoothing}: expected a share between 0 and 1")
    total = float(weights.sum())
    if not total > 0:
        raise UserError("a prior cannot be estimated: no label has any probability")
    return ((1 - smoothing) * weights / total + smoothing / number).clamp(min=_TINY)


def count_labels(sequences: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """How often each token occurs in sequences of token ids: (V,) float64."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for ids in sequences:
        if ids:
            counts += torch.bincount(torch.tensor(list(ids)), minlength=vocab_size)
    return counts


class PosteriorMean:
    """Mean of CTC's softmax over frames, utterance by utterance, in double precision.

    Attributes:
        frames: Frames so far.
    """

    def __init__(self, vocab_size: int):
        self.frames = 0
        self._sum = torch.zeros(vocab_size, dtype=torch.float64)

    def add(self, log_probs: Tensor, lengths: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: (B, T, V).
            lengths: Frames of each utterance (B,); those behind do not count.
        """
        real = torch.arange(log_probs.size(1)) < lengths.cpu()[:, None]
        rows = log_probs[real.to(log_probs.device)]
        # sums of a batch in single precision are exact enough, those of a corpus are not
        self._sum += rows.float().exp().sum(dim=0).double().cpu()
        self.frames += len(rows)

    @property
    def mean(self) -> Tensor:
        """(V,), float64.

        Raises:
            UserError: No frame.
        """
        if self.frames == 0:
            raise UserError("a prior cannot be estimated: there is not one frame of speech")
        return self._sum / self.frames


def save_prior(prior: Prior, path: Union[str, Path], tokens: Sequence[str], source: str) -> None:
    """Write one JSON file with the mode, the token list and what it was estimated from."""
    if len(tokens) != len(prior.log_prior):
        raise ValueError(f"{len(tokens)} tokens, a prior of {len(prior.log_prior)}")
    content = {
        "mode": prior.mode,
        "source": source,
        "tokens": list(tokens),
        "log_prior": [round(value, 6) for value in prior.log_prior.tolist()],
    }
    with atomic_write(path) as stream:
        json.dump(content, stream, ensure_ascii=False)
        stream.write("\n")


def read_prior(path: Union[str, Path]) -> tuple[Prior, list[str]]:
    """A prior and the tokens it is of, as :func:`save_prior` wrote them.

    Raises:
        UserError: Missing or malformed.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        tokens = [str(token) for token in content["tokens"]]
        prior = Prior(content["mode"], torch.tensor(content["log_prior"]).float())
        if len(tokens) != len(prior.log_prior):
            raise ValueError(f"{len(tokens)} tokens, {len(prior.log_prior)} numbers")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a prior as `python -m espnet_llm_plugin.bin.estimate_prior` writes it "
            f"({error})"
        ) from None
    return prior, tokens


def load_prior(
    path: Union[str, Path], tokens: Sequence[str], name: str = "the ASR model's token list"
) -> Prior:
    """A prior that must be of a token list.

    Args:
        path: File of :func:`save_prior`.
        tokens: V tokens that it must be of.
        name: What these are, for the message.

    Raises:
        UserError: Missing or malformed, or of another token list.
    """
    prior, theirs = read_prior(path)
    if theirs != list(tokens):
        place = next((i for i, (a, b) in enumerate(zip(theirs, tokens)) if a != b), None)
        where = (
            f"{len(theirs)} tokens against {len(tokens)}"
            if place is None
            else f"token {place} is {theirs[place]!r} against {tokens[place]!r}"
        )
        raise UserError(
            f"prior {path} ({len(theirs)} tokens, mode {prior.mode}) is of another token list than "
            f"{name} ({len(tokens)} tokens): {where}. Estimate it again with this model by "
            "`python -m espnet_llm_plugin.bin.estimate_prior`"
        )
    return prior


def most_and_least(prior: Prior, tokens: Sequence[str], number: int = 5) -> str:
    """The most and the least probable tokens, for a log."""
    special = {0: BLANK, len(tokens) - 1: SOS_EOS}
    order = [i for i in prior.log_prior.argsort(descending=True).tolist() if i not in special]
    named = [f"{tokens[i]} {prior.log_prior[i]:.2f}" for i in order]
    return f"most {', '.join(named[:number])}; least {', '.join(named[-number:])}"
