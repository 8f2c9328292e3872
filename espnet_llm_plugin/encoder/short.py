"""Audio that is too short for the encoder, in batches of training and evaluation.

ESPnet's subsampling refuses an input of fewer frames than its convolutions need, but looks at the
longest of a batch: a shorter one gets frames that are made of padding. In batches of this mixin
such utterances, and those without a sample, have no frame, and no batch is refused.

B utterances, T encoder frames, D encoder width.
"""

import torch
from espnet.nets.pytorch_backend.transformer.subsampling import check_short_utt
from espnet2.asr.espnet_model import ESPnetASRModel
from torch import Tensor


def shortest_audio(frontend: torch.nn.Module | None) -> int:
    """Samples that the frontend needs at least: its STFT mirrors half a window at the ends."""
    stft = getattr(frontend, "stft", None)
    return stft.n_fft // 2 + 1 if getattr(stft, "center", False) else 1


def shortest_input(encoder: torch.nn.Module | None) -> int:
    """Frames that the encoder's input layer needs at least."""
    too_short, limit = check_short_utt(getattr(encoder, "embed", None), 0)
    return limit if too_short else 1


class ShortUtterances(ESPnetASRModel):
    """An ESPnet model whose :meth:`encode_frames` takes audio of any length.

    ``encode`` is ESPnet's: in decoding an utterance that is too short is an error, and its name is
    reported.
    """

    _too_short: Tensor | None = None  # (B,) of the batch being encoded, if of any length

    def encode_frames(self, speech: Tensor, speech_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder output (B, T, D) and lengths (B,): 0 where the audio is too short for a frame.

        Outputs of intermediate layers are left out.
        """
        shortest = shortest_audio(self.frontend)
        self._too_short = speech_lengths < shortest
        try:
            speech, speech_lengths = _lengthened(speech, speech_lengths, shortest)
            encoder_out, lengths = self.encode(speech, speech_lengths)
            lengths = lengths.masked_fill(self._too_short.to(lengths.device), 0)
        finally:
            self._too_short = None
        if isinstance(encoder_out, tuple):
            encoder_out = encoder_out[0]
        return encoder_out, lengths

    def _extract_feats(self, speech: Tensor, speech_lengths: Tensor) -> tuple[Tensor, Tensor]:
        feats, lengths = super()._extract_feats(speech, speech_lengths)
        if self._too_short is not None:
            shortest = shortest_input(self.encoder)
            self._too_short = self._too_short.to(lengths.device) | (lengths < shortest)
            feats, lengths = _lengthened(feats, lengths, shortest)
        return feats, lengths


def _lengthened(values: Tensor, lengths: Tensor, shortest: int) -> tuple[Tensor, Tensor]:
    """(B, N, ...) with zeros up to ``shortest``, and lengths (B,) of at least that."""
    missing = shortest - values.size(1)
    if missing > 0:
        values = torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], 1)
    return values, lengths.clamp(min=shortest)
