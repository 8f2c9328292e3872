"""Token scorers of the label-synchronous search.

N rows (hypotheses), V tokens.
"""

from typing import Any, Optional, Protocol

import torch
from espnet.nets.scorer_interface import BatchScorerInterface

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.external_lm import ExternalLM


class Stepping(Protocol):
    """A decoder with a state for all rows; see :mod:`espnet_llm_plugin.speech_llm.interface`."""

    def step(
        self, tokens: torch.Tensor, state: Any, parents: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Logits (N, V) after ``tokens`` (N,) that follow rows ``parents`` (N,) of a state."""
        ...


class LLMScorer:
    """A ``TokenScorer``: an LLM with the audio of a batch, or without.

    Args:
        decoder: What makes the steps.
        state: Of the batch, before the start symbol.
        scored: Tokens that may come next (V,) bool; the others share in no probability.
    """

    def __init__(self, decoder: Stepping, state: Any, scored: Optional[torch.Tensor] = None):
        self.decoder = decoder
        self.state = state
        self._unscored = None if scored is None or bool(scored.all()) else ~scored

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        logits, self.state = self.decoder.step(tokens, self.state, parents)
        logits = logits.float()
        if self._unscored is not None:
            logits = logits.masked_fill(self._unscored, -torch.inf)
        return logits.log_softmax(dim=-1)


class ESPnetLM:
    """A ``TokenScorer``: an LM of ESPnet's ``LMTask`` over the token list of the ASR model.

    Blank is impossible; the other log-probs are the LM's, as in ESPnet's shallow fusion.

    Args:
        lm: ``LMTask``'s ``model.lm``.
        vocab_size: V; sos/eos is V - 1.
        eos: The end symbol of the search.
        device: Where the LM lives.

    Raises:
        UserError: The search ends its hypotheses with another token than the LM.
    """

    def __init__(self, lm: BatchScorerInterface, vocab_size: int, eos: int, device: torch.device):
        if eos != vocab_size - 1:
            raise UserError(
                f"an external LM ends a text with the last token ({vocab_size - 1}), the LLM of "
                f"this model with token {eos}: use --textlm_weight, the LLM without audio, instead"
            )
        self._lm = ExternalLM(lm, vocab_size, vocab_size - 1, device)
        self._states: Optional[list] = None

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        if self._states is None:
            row, state = self._lm.start()
            rows, self._states = row.expand(len(tokens), -1), [state] * len(tokens)
        else:
            before = [self._states[parent] for parent in parents.tolist()]
            # ESPnet's LMs score labels, which are tokens without the blank.
            rows, self._states = self._lm.extend((tokens - 1).tolist(), before)
        return torch.nn.functional.pad(rows, (1, 0), value=-torch.inf)
