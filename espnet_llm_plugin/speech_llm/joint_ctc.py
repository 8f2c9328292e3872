"""CTC prefix scores over the tokens of an LLM, for the label-synchronous search.

B utterances, N hypotheses, T frames, V tokens of the LLM, K labels kept by the CTC scorer.
"""

from typing import Optional

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_prefix_scorer import CTCPrefixScorer, CTCPrefixState


class JointCTC:
    """A ``PartialScorer`` over CTC posteriors.

    CTC label 0 is the blank. Label ``i`` is token ``i + shift``: 0 where the CTC head has the ASR
    token list, -1 where its labels are the tokens of an LLM after the blank.

    Args:
        log_probs: CTC log-posteriors (B, T, V - shift).
        lengths: Frames (B,).
        vocab_size: V.
        eos: End symbol, a token.
        shift: 0 or -1.
        top_k: Labels kept of an utterance; see :class:`CTCPrefixScorer`. None: all.
        compress_threshold: Frames of one sure label become one; see :class:`CTCPrefixScorer`.

    Attributes:
        candidates: Tokens that have a score (B, C), or None: all V.

    Raises:
        UserError: The CTC head has other labels.
    """

    def __init__(
        self,
        log_probs: torch.Tensor,
        lengths: torch.Tensor,
        *,
        vocab_size: int,
        eos: int,
        shift: int = 0,
        top_k: Optional[int] = None,
        compress_threshold: Optional[float] = None,
    ):
        if log_probs.size(2) != vocab_size - shift:
            raise UserError(
                f"the CTC head has {log_probs.size(2)} labels, the decoder {vocab_size} tokens: a "
                "CTC weight needs a CTC head over the decoder's own token list (ESPnet's --ctc "
                "head of an adapted LLM, or one trained on the LLM's tokens)"
            )
        self.scorer = CTCPrefixScorer(
            log_probs,
            lengths,
            blank=0,
            eos=eos - shift,
            top_k=top_k,
            compress_threshold=compress_threshold,
        )
        self.state: CTCPrefixState = self.scorer.initial_state()
        self._shift = shift
        # The blank is the first column, kept in any case; a token only where nothing is shifted.
        self._first = 0 if shift == 0 else 1
        reduced = self.scorer.labels.size(1) < log_probs.size(2)
        self.candidates = self.scorer.labels[:, self._first :] + shift if reduced else None

    def score(self) -> torch.Tensor:
        """Log-probability of each candidate after each hypothesis: (N, C)."""
        return self.scorer.next_log_probs(self.state)[:, self._first :]

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """Go on with the hypotheses ``parents`` (M,) and one of ``tokens`` (M,) more."""
        self.state = self.scorer.extend(self.state, parents, tokens - self._shift)
