"""CTC prefix scores for the label-synchronous search.

B utterances, N hypotheses, T frames, V tokens, K of them kept by the CTC scorer.
"""

from typing import Optional

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_prefix_scorer import CTCPrefixScorer, CTCPrefixState


class JointCTC:
    """A ``PartialScorer`` over CTC posteriors, as ``VocabularyCTC.log_softmax`` gives them.

    Args:
        log_probs: CTC log-posteriors of the tokens (B, T, V), column 0 the blank.
        lengths: Frames (B,).
        vocab_size: V.
        eos: End symbol, a token.
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
        top_k: Optional[int] = None,
        compress_threshold: Optional[float] = None,
    ):
        if log_probs.size(2) != vocab_size:
            raise UserError(
                f"the CTC head has {log_probs.size(2)} labels, the decoder {vocab_size} tokens: a "
                "CTC weight needs a CTC head over the decoder's own tokens"
            )
        self.scorer = CTCPrefixScorer(
            log_probs,
            lengths,
            blank=0,
            eos=eos,
            top_k=top_k,
            compress_threshold=compress_threshold,
        )
        self.state: CTCPrefixState = self.scorer.initial_state()
        reduced = self.scorer.labels.size(1) < vocab_size
        self.candidates = self.scorer.labels if reduced else None

    def score(self) -> torch.Tensor:
        """Log-probability of each candidate after each hypothesis: (N, C)."""
        return self.scorer.next_log_probs(self.state)

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """Go on with the hypotheses ``parents`` (M,) and one of ``tokens`` (M,) more."""
        self.state = self.scorer.extend(self.state, parents, tokens)
