"""Audio as a prefix of the text: every layer updates both.

B utterances, P embeddings of the audio, U tokens, L positions, D width, N rows.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.attention import (
    Weighing,
    check_read,
    installed,
    why_no_reading,
)
from espnet_llm_plugin.speech_llm.interface import Interface
from espnet_llm_plugin.speech_llm.llm_parts import llm_logits, llm_outputs
from espnet_llm_plugin.speech_llm.sequence import (
    PADDINGS,
    Composed,
    check_length,
    compose,
    length_mask,
    take,
)
from espnet_llm_plugin.speech_llm.state import ROOM, Packed, Recording, SharedKeys, SpeechState

MASKS = ("causal", "bidirectional")


class PrefixInterface(Interface):
    """Audio embeddings stand where token embeddings could [arXiv 2307.11795; PLLM of 2603.15045].

    Takes any causal LM. One that cannot share keys and values (sliding windows, ALiBi unless it is
    BLOOM's) is recomputed from the audio on at every step, which is slow.

    Args:
        llm: See :class:`Interface`.
        mask: What the audio, with the soft vectors right before it, sees of itself: ``causal``
            (what comes before) or ``bidirectional`` (all of it).
        padding: Where utterances of a batch are padded: ``right`` or ``left``. The result is the
            same; only ``right`` with the causal mask needs no mask, which flash kernels want.
    """

    def __init__(self, llm: Any, mask: str = "causal", padding: str = "right"):
        super().__init__(llm)
        for name, value, known in (("mask", mask, MASKS), ("padding", padding, PADDINGS)):
            if value not in known:
                raise UserError(f"interface_conf: {name} {value!r}; expected {' or '.join(known)}.")
        self.mask, self.padding = mask, padding
        self.needs_masks = (mask, padding) != ("causal", "right")
        self._shares = True
        if mask == "bidirectional":
            reason = why_no_reading(llm.config)
            if reason is not None:
                raise UserError(f"interface_conf: mask bidirectional: the LLM has {reason}.")

    def forward(self, audio, audio_lengths, text, text_lengths, before=(), after=(), soft=None):
        sequence, lengths = self._compose(
            audio, audio_lengths, before, after, soft, text, text_lengths
        )
        model = self.llm.model(audio.device)
        outputs = llm_outputs(model, sequence.embeddings, **self._masked(sequence, lengths, soft))
        logits = llm_logits(model, take(outputs, sequence.starts[3], text.size(1)))
        return logits, {"audio": take(outputs, sequence.starts[1], audio.size(1))}

    def attention_mass(
        self, audio, audio_lengths, text, text_lengths, before=(), after=(), soft=None
    ):
        with torch.no_grad():
            sequence, lengths = self._compose(
                audio, audio_lengths, before, after, soft, text, text_lengths
            )
            model = self.llm.model(audio.device)
            reading = Weighing(
                sequence.span(3, text_lengths.to(lengths)), sequence.span(1, lengths)
            )
            with installed(model):
                masked = self._masked(sequence, lengths, soft)
                llm_outputs(model, sequence.embeddings, **masked, reading=reading)
            check_read(model, reading)
        return torch.stack(reading.mass, dim=1)

    def _start(self, audio, audio_lengths, before, after, soft=None):
        model = self.llm.model(audio.device)
        if not self._shares or (model.training and any(fast.alone for fast in self._fast)):
            number = len(before) + len(after) + (0 if soft is None else soft.size(1))
            lengths = audio_lengths.to(audio.device) + number
            rows = torch.arange(len(audio), device=audio.device)
            empty = rows.new_zeros(len(audio), 0)
            longest = int(lengths.max())
            check_length(longest, self.llm.context, "audio and prompt")
            known = (audio, audio_lengths, before, after, soft)
            return _Recomputed(rows, lengths, longest, *known, empty)
        sequence, lengths = self._compose(audio, audio_lengths, before, after, soft)
        columns = sequence.embeddings.size(1)
        keys = SharedKeys(len(audio), columns + ROOM)
        seen = length_mask(sequence.lengths, columns)
        if self.padding == "left":
            seen = ~length_mask(sequence.first, columns)
        masked = self._masked(sequence, lengths, soft)
        if columns and self._fast and not model.training:
            rows = Packed(keys, seen, masked.get("mask"))
            self._fast[0].fill(
                rows.packed(sequence.embeddings),
                rows.packed(sequence.positions),
                columns,
                rows.write,
                rows.attend,
            )
        elif columns:
            reading = Recording(keys)
            with installed(model):
                llm_outputs(model, sequence.embeddings, **masked, reading=reading)
            check_read(model, reading)
        return SpeechState.begin(keys, seen, sequence.lengths)

    def _step(self, tokens, state, parents):
        if isinstance(state, SpeechState):
            return super()._step(tokens, state, parents)
        state = state.extend(tokens, parents)
        logits, _ = self(
            state.audio[state.utterance],
            state.audio_lengths[state.utterance],
            state.tokens,
            torch.full_like(tokens, state.tokens.size(1)),
            before=state.before,
            after=state.after,
            soft=None if state.soft is None else state.soft[state.utterance],
        )
        return logits[:, -1], state

    def _check(self, model, device):
        self._shares = True
        reason = self._why_no_steps(model, device)
        if reason is not None:
            self._shares = False
            logging.warning(
                "%s keeps no keys and values that hypotheses can share (%s): every step computes "
                "audio and text again.",
                type(model).__name__,
                reason,
            )

    def _compose(
        self, audio, audio_lengths, before, after, soft, text=None, text_lengths=None
    ) -> tuple[Composed, Tensor]:
        """All parts side by side, and the lengths of the audio."""
        audio, lengths = self._audio(audio, audio_lengths)
        parts = [
            self._before(before, soft, len(audio), audio.device),
            (audio, lengths),
            self._tokens(after, len(audio), audio.device),
        ]
        if text is not None:
            parts.append((self.llm.embed(text), text_lengths.to(lengths)))
        sequence = compose(parts, self.padding)
        what = "audio and prompt" if text is None else "audio, prompt and text"
        check_length(sequence.embeddings.size(1), self.llm.context, what)
        return sequence, lengths

    def _masked(
        self, sequence: Composed, audio_lengths: Tensor, soft: Optional[Tensor]
    ) -> dict[str, Optional[Tensor]]:
        """Mask and positions for the LLM."""
        if not self.needs_masks:
            return {}  # the padding comes after everything that is used
        columns = torch.arange(sequence.embeddings.size(1), device=audio_lengths.device)
        end = sequence.first + sequence.lengths
        valid = (columns >= sequence.first[:, None]) & (columns < end[:, None])
        visible = (columns <= columns[:, None]) & valid[:, None]
        if self.mask == "bidirectional":
            audio = sequence.span(1, audio_lengths, 0 if soft is None else soft.size(1))
            visible = visible | (audio[:, :, None] & audio[:, None, :])
        visible = visible | torch.eye(len(columns), dtype=torch.bool, device=columns.device)
        return {"mask": visible[:, None], "positions": sequence.positions}


@dataclass(frozen=True)
class _Recomputed:
    """State of N rows of an LLM that shares nothing; see :class:`SpeechState`."""

    utterance: Tensor  # (N,)
    positions: Tensor  # (N,)
    length: int
    audio: Tensor  # (B, P, D)
    audio_lengths: Tensor  # (B,)
    before: tuple[int, ...]
    after: tuple[int, ...]
    soft: Optional[Tensor]  # (B, n, D)
    tokens: Tensor  # (N, t)

    def extend(self, tokens: Tensor, parents: Tensor) -> "_Recomputed":
        return replace(
            self,
            utterance=self.utterance[parents],
            positions=self.positions[parents] + 1,
            length=self.length + 1,
            tokens=torch.cat([self.tokens[parents], tokens[:, None]], dim=1),
        )
