"""The language of an utterance, from what the encoder makes of it.

B utterances, T frames, E encoder width, L languages.
"""

import torch
from torch import Tensor

from espnet_llm_plugin.speech_llm.languages import LanguageRows, Languages
from espnet_llm_plugin.speech_llm.sequence import length_mask


class LanguageHead(LanguageRows):
    """Mean of the encoder's output over time -> linear layer, a row with bias for each language.

    Args:
        languages: L of them.
        size: E.
    """

    def __init__(self, languages: Languages, size: int):
        super().__init__(
            {
                code: torch.nn.functional.pad(torch.randn(size) * size**-0.5, (0, 1))
                for code in languages.codes
            }
        )

    def forward(self, encoder_out: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, L) of outputs (B, T, E) of lengths (B,)."""
        inside = length_mask(lengths.to(encoder_out.device), encoder_out.size(1))[..., None]
        total = encoder_out.float().masked_fill(~inside, 0.0).sum(dim=1)
        mean = total / inside.sum(dim=1).clamp(min=1)
        rows = self.rows().float()
        return mean @ rows[:, :-1].T + rows[:, -1]

    def loss(
        self, encoder_out: Tensor, lengths: Tensor, languages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats) and accuracy, means over the utterances whose language is known.

        Args:
            encoder_out, lengths: See :meth:`forward`.
            languages: Numbers (B,).

        Returns:
            Two scalars; 0 (with a gradient) and NaN where no language is known.
        """
        logits = self(encoder_out, lengths)
        known = (languages >= 0) & (languages < logits.size(1))
        if not bool(known.any()):
            return logits.sum() * 0.0, logits.new_tensor(float("nan"))
        logits, languages = logits[known], languages[known]
        loss = torch.nn.functional.cross_entropy(logits, languages)
        return loss, (logits.argmax(dim=1) == languages).float().mean()

    def predict(self, encoder_out: Tensor, lengths: Tensor) -> Tensor:
        """Numbers (B,) of the likeliest languages."""
        return self(encoder_out, lengths).argmax(dim=1)
