"""ESPnet's log-mel frontend on samples as they arrive, frame for frame what it gives offline.

Offline, frame f of :class:`DefaultFrontend` is the analysis window around sample ``f * hop``; at
both ends the signal is continued by reflection. Here a frame is computed as soon as the last sample
under its window is there; the frames at the end, when the stream ends.
"""

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.layers.global_mvn import GlobalMVN
from espnet2.layers.stft import Stft
from espnet2.layers.utterance_mvn import UtteranceMVN
from torch import Tensor

from espnet_llm_plugin.errors import UserError


@dataclass(frozen=True)
class FrameGeometry:
    """Where the frames of a frontend lie, in samples.

    Attributes:
        sample_rate: Hz.
        hop_length: from one frame's centre to the next.
        n_fft: length of the transform.
        centre: the middle of frame f is sample ``f * hop_length + centre``.
        look_ahead: frame f depends on samples before ``f * hop_length + look_ahead`` only.
    """

    sample_rate: int
    hop_length: int
    n_fft: int
    centre: int
    look_ahead: int

    @property
    def reach(self) -> float:
        """Samples that a frame depends on after the ``hop_length`` samples it stands for."""
        return self.look_ahead - self.centre - self.hop_length / 2


def frame_geometry(frontend: Any) -> Optional[FrameGeometry]:
    """Geometry of an ESPnet frontend; None if it is no log-mel frontend on samples."""
    if not isinstance(frontend, DefaultFrontend) or frontend.stft is None:
        return None
    stft = frontend.stft
    # torch.stft puts a shorter window into the middle of the transform; what is beside it counts
    # nothing.
    before = (stft.n_fft - stft.win_length) // 2
    after = before + stft.win_length
    half = stft.n_fft // 2
    if stft.center:
        # reflection at the start needs one sample more than the window's left half
        centre, look_ahead = 0, max(after - half, half - before + 1)
    else:
        # without padding there is a frame only where the whole transform fits
        centre, look_ahead = half, stft.n_fft
    sample_rate = int(frontend.logmel.mel_options["sr"])
    return FrameGeometry(sample_rate, stft.hop_length, stft.n_fft, centre, look_ahead)


@dataclass(frozen=True)
class FrontendState:
    """What is kept of one stream of samples; never changed.

    Attributes:
        samples: (n,) the last samples, beginning at sample ``offset``.
        offset: may be negative at the stream's beginning: samples continued by reflection.
        received: samples given so far.
        frames: frames returned so far.
    """

    samples: Tensor
    offset: int
    received: int
    frames: int


class StreamingFrontend:
    """Log-mel frames of one stream, normalised, with the parameters of a trained model.

    Several streams need one state each; their frames can be put into one batch for the encoder.
    SpecAugment, which ESPnet applies in training only, has no part in this.

    Args:
        frontend: ``model.frontend`` of an ESPnet model.
        normalize: ``model.normalize``: ``global_mvn``, or None.

    Attributes:
        geometry: where the frames lie.

    Raises:
        UserError: a frontend that is no log-mel frontend, or that dereverberates or forms beams;
            a normalisation that needs the whole utterance.
    """

    def __init__(self, frontend: Any, normalize: Any = None):
        geometry = frame_geometry(frontend)
        if geometry is None:
            raise UserError(
                f"cannot stream with the frontend {type(frontend).__name__}; expected ESPnet's "
                "`frontend: default` on samples (log-mel filterbank)"
            )
        if frontend.frontend is not None and (
            frontend.frontend.use_wpe or frontend.frontend.use_beamformer
        ):
            raise UserError(
                "cannot stream with dereverberation or beamforming (frontend_conf use_wpe, "
                "use_beamformer): they need the whole utterance"
            )
        if isinstance(normalize, UtteranceMVN):
            raise UserError(
                "cannot stream with `normalize: utterance_mvn`: the mean of the utterance is not "
                "known before its end. Train with `normalize: global_mvn`"
            )
        if normalize is not None and not isinstance(normalize, GlobalMVN):
            raise UserError(
                f"cannot stream with the normalisation {type(normalize).__name__}; expected "
                "global_mvn or none"
            )
        self.geometry = geometry
        self.centred = frontend.stft.center
        self.frontend = frontend
        self.normalize = normalize
        old = frontend.stft
        self._stft = Stft(
            n_fft=old.n_fft,
            win_length=old.win_length,
            hop_length=old.hop_length,
            window=old.window,
            center=False,
            normalized=old.normalized,
            onesided=old.onesided,
        )

    def initial_state(self) -> FrontendState:
        """State before the first sample."""
        like = self.frontend.logmel.melmat
        return FrontendState(like.new_zeros(0), 0, 0, 0)

    @torch.no_grad()
    def infer(self, samples: Tensor, state: FrontendState) -> tuple[Tensor, FrontendState]:
        """The next samples (n,), any n >= 0 -> the frames (T, F) that they complete.

        Raises:
            UserError: not a vector of samples.
        """
        if samples.dim() != 1:
            raise UserError(
                "expected the samples of one channel as a vector, got shape "
                f"{tuple(samples.shape)}; choose a channel"
            )
        kept = torch.cat([state.samples, samples.to(state.samples)])
        state = replace(state, samples=kept, received=state.received + samples.numel())
        look_ahead, hop = self.geometry.look_ahead, self.geometry.hop_length
        ready = (state.received - look_ahead) // hop + 1 if state.received >= look_ahead else 0
        state = self._reflect_start(state) if ready and not state.frames else state
        frames = self._frames(state, ready)
        state = replace(state, frames=max(ready, state.frames))
        return frames, self._forget(state)

    @torch.no_grad()
    def finish(self, state: FrontendState) -> Tensor:
        """The last frames (T, F) of a stream that has ended.

        None for a stream of at most half a transform (n_fft / 2 samples), which ESPnet's frontend
        cannot process at all.
        """
        half, n_fft = self.geometry.n_fft // 2, self.geometry.n_fft
        if self.centred:
            if state.received <= half:
                return self._frames(state, 0)
            state = state if state.frames else self._reflect_start(state)
            end = state.samples[-half - 1 : -1].flip(0)
            state = replace(state, samples=torch.cat([state.samples, end]))
            total = (state.received + 2 * half - n_fft) // self.geometry.hop_length + 1
        else:
            total = (state.received - n_fft) // self.geometry.hop_length + 1
        return self._frames(state, total)

    def _reflect_start(self, state: FrontendState) -> FrontendState:
        """Put the reflection of the first samples before them."""
        if not self.centred:
            return state
        half = self.geometry.n_fft // 2
        start = state.samples[1 : half + 1].flip(0)
        # beside the window, where the first samples may not be there yet, zeros do as well
        missing = start.new_zeros(half - start.numel())
        samples = torch.cat([missing, start, state.samples])
        return replace(state, samples=samples, offset=-half)

    def _left_edge(self, frame: int) -> int:
        half = self.geometry.n_fft // 2 if self.centred else 0
        return frame * self.geometry.hop_length - half

    def _frames(self, state: FrontendState, until: int) -> Tensor:
        """Frames [state.frames, until) from the samples of the state."""
        if until <= state.frames:
            return state.samples.new_zeros(0, self.frontend.output_size())
        begin = self._left_edge(state.frames) - state.offset
        end = self._left_edge(until - 1) - state.offset + self.geometry.n_fft
        window = state.samples[begin:end]
        missing = window.new_zeros(end - begin - window.numel())  # beside the last window
        spectrum, lengths = self._stft(
            torch.cat([window, missing])[None], torch.tensor([end - begin], device=window.device)
        )
        frames, lengths = self.frontend.logmel(spectrum.square().sum(-1), lengths)
        if self.normalize is not None:
            frames, _ = self.normalize(frames, lengths)
        return frames[0]

    def _forget(self, state: FrontendState) -> FrontendState:
        """Drop the samples that no coming frame needs, as part of it or of the reflected end."""
        half = self.geometry.n_fft // 2
        needed = min(self._left_edge(state.frames), state.received - half - 1)
        if needed <= state.offset:
            return state
        return replace(state, samples=state.samples[needed - state.offset :], offset=needed)
