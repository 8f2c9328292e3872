"""The internal LM of an attention decoder: the decoder with an encoder output of zeros.

What the decoder has learned of the text alone, to be subtracted where a language model is added:
``log P_AED + lm_weight * log P_LM - ilm_weight * log P_ILM``. [Internal LM estimation, arXiv
2011.01991; zero context, arXiv 2104.05544] For n-best lists (``rescore``) and for ESPnet's beam
search (``asr_inference --search espnet``). A better estimate, which is trained: ``mini_lstm.py``.

B sequences, L tokens, N prefixes, V tokens of the list, D encoder width.
"""

from typing import Any, Optional, Sequence

import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from torch import Tensor

from espnet_llm_plugin.errors import UserError


def attention_decoder(model: torch.nn.Module, ilm: str) -> torch.nn.Module:
    """The attention decoder of an ESPnet model, in evaluation mode.

    Args:
        model: Trained model.
        ilm: What needs it, for the message.

    Raises:
        UserError: A model without attention decoder.
    """
    from espnet2.asr.espnet_model import ESPnetASRModel

    decoder = getattr(model, "decoder", None)
    if type(model) is not ESPnetASRModel or decoder is None or model.use_transducer_decoder:
        raise UserError(
            f"--ilm {ilm} is for ESPnet models with an attention decoder; this is a "
            f"{type(model).__name__}"
            + ("" if decoder is not None else " without decoder (CTC only)")
        )
    return decoder.eval()


class ZeroContextILM(BatchScorerInterface):
    """An ESPnet attention decoder whose memory is one frame of zeros.

    The log-probs are the decoder's own, blank included: they are made to be subtracted, with a
    negative weight in ESPnet's beam search, so no token may have one of minus infinity.

    Args:
        decoder: ``model.decoder`` of an attention model.
        encoder_size: D.
    """

    def __init__(self, decoder: torch.nn.Module, encoder_size: int):
        self.decoder = decoder
        self._zeros = next(decoder.parameters()).new_zeros(1, 1, encoder_size)

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ZeroContextILM":
        """Of a trained ESPnet model.

        Raises:
            UserError: A model without attention decoder.
        """
        return cls(attention_decoder(model, "zero_context"), model.encoder.output_size())

    def __call__(self, ids: Tensor, hidden: None = None) -> tuple[Tensor, None]:
        """Logits of a whole sequence.

        Args:
            ids: Token ids (B, L) beginning with sos; padding is at the right.
            hidden: Unused.

        Returns:
            Logits (B, L, V) and None.
        """
        rows, length = ids.shape
        memory = self._zeros.expand(rows, -1, -1)
        ones = torch.ones(rows, dtype=torch.long, device=ids.device)
        return self.decoder(memory, ones, ids, ones * length)[0], None

    def init_state(self, x: Any) -> Any:
        """State of the empty prefix."""
        return self.decoder.init_state(self._zeros[0])

    def score(self, y: Tensor, state: Any, x: Any) -> tuple[Tensor, Any]:
        """Log-probs (V,) of the token after prefix ``y`` (L,), and its state; ``x`` is not used."""
        if hasattr(self.decoder, "batch_score"):  # whose states are other ones than score's
            rows, states = self.batch_score(y[None], [state], None)
            return rows[0], states[0]
        with torch.no_grad():
            return self.decoder.score(y, state, self._zeros[0])

    def batch_score(
        self, ys: Tensor, states: Sequence[Optional[Any]], xs: Any
    ) -> tuple[Tensor, list]:
        """As :meth:`score` for N prefixes (N, L)."""
        with torch.no_grad():
            return self.decoder.batch_score(ys, list(states), self._zeros.expand(len(ys), -1, -1))
