"""Audio as keys and values of the LLM's own attention, for text that alone is updated.

B utterances, P embeddings of the audio, Q tokens (prompt and text), U of the text, D width,
J key/value heads.

The prefix without what it spends on the audio: queries are the tokens, keys and values tokens and
audio, all by the LLM's own weights. Layer l projects the audio's embeddings themselves, normalised
as its own input, to keys and values; the audio has no attention, no feed-forward and no outputs
[merged attention of arXiv 2603.15045].
"""

from typing import Any

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.attention import (
    ARGUMENT,
    Weighing,
    check_read,
    install,
    installed,
    sdpa,
)
from espnet_llm_plugin.speech_llm.interface import Interface
from espnet_llm_plugin.speech_llm.llm_parts import (
    ALTERNATIVE,
    layer_input,
    llm_layers,
    llm_logits,
    llm_outputs,
    why_no_layers,
)
from espnet_llm_plugin.speech_llm.sequence import check_length, length_mask
from espnet_llm_plugin.speech_llm.state import ROOM, SharedKeys, SpeechState


class MergedInterface(Interface):
    """Text queries attend to audio and text in one softmax; the audio is not updated.

    [arXiv 2603.15045, merged attention]

    The LLM's attention function becomes ours for good, which without audio is SDPA: gradient
    checkpointing runs the attention again when the forward is long over.

    Args:
        llm: See :class:`Interface`; of a family with rotary or learned positions.
    """

    def __init__(self, llm: Any):
        super().__init__(llm)
        reason = why_no_layers(llm.config)
        if reason is not None:
            raise UserError(f"interface merged: the LLM has {reason}; {ALTERNATIVE}.")

    def forward(self, audio, audio_lengths, text, text_lengths, before=(), after=(), soft=None):
        model = self.llm.model(audio.device)
        install(model)
        audio, lengths = self._audio(audio, audio_lengths)
        tokens, positions, first = self._token_positions(lengths, before, after, soft, text)
        reading = _Merged(self._project(model, audio, first))
        outputs = llm_outputs(
            model,
            tokens,
            mask=self._mask(lengths, audio.size(1), first, tokens.size(1)),
            positions=positions,
            reading=reading,
        )
        check_read(model, reading)
        return llm_logits(model, outputs[:, tokens.size(1) - text.size(1) :]), {}

    @torch.no_grad()
    def attention_mass(
        self, audio, audio_lengths, text, text_lengths, before=(), after=(), soft=None
    ):
        model = self.llm.model(audio.device)
        audio, lengths = self._audio(audio, audio_lengths)
        tokens, positions, first = self._token_positions(lengths, before, after, soft, text)
        queries = length_mask(text_lengths.to(lengths), text.size(1))
        queries = torch.nn.functional.pad(queries, (tokens.size(1) - text.size(1), 0))
        keys = length_mask(lengths, audio.size(1))
        keys = torch.nn.functional.pad(keys, (0, tokens.size(1)))
        with installed(model):
            reading = Weighing(queries, keys, before=self._project(model, audio, first))
            llm_outputs(
                model,
                tokens,
                mask=self._mask(lengths, audio.size(1), first, tokens.size(1)),
                positions=positions,
                reading=reading,
            )
        check_read(model, reading)
        return torch.stack(reading.mass, dim=1)

    def _start(self, audio, audio_lengths, before, after, soft=None):
        model = self.llm.model(audio.device)
        audio, lengths = self._audio(audio, audio_lengths)
        tokens, positions, first = self._token_positions(lengths, before, after, soft)
        frames, columns = audio.size(1), audio.size(1) + tokens.size(1)
        keys = SharedKeys(len(audio), columns + ROOM)
        with installed(model):
            projected = self._project(model, audio, first)
            for layer, (key, value) in enumerate(projected):
                keys.write(layer, 0, key, value)
            if tokens.size(1):
                reading = _Merged(projected, keys)
                llm_outputs(
                    model,
                    tokens,
                    mask=self._mask(lengths, frames, first, tokens.size(1)),
                    positions=positions,
                    reading=reading,
                )
                check_read(model, reading)
        seen = torch.ones(len(audio), columns, dtype=torch.bool, device=audio.device)
        seen[:, :frames] = length_mask(lengths, frames)
        return SpeechState.begin(keys, seen, lengths + tokens.size(1))

    def _audio(self, audio, lengths):
        if not audio.size(1):  # a column that nobody sees
            audio = audio.new_zeros(len(audio), 1, audio.size(2))
        return super()._audio(audio, lengths)

    def _token_positions(self, audio_lengths, before, after, soft, text=None):
        """Embeddings (B, Q, D) of prompt, soft vectors and text; their positions (B, Q); how many
        are before the audio."""
        batch, device = len(audio_lengths), audio_lengths.device
        parts = [self._before(before, soft, batch, device)[0]]
        first = parts[0].size(1)
        parts.append(self._tokens(after, batch, device)[0])
        if text is not None:
            parts.append(self.llm.embed(text))
        tokens = torch.cat(parts, dim=1)
        columns = torch.arange(tokens.size(1), device=device)
        positions = columns + audio_lengths[:, None] * (columns >= first)
        longest = int(audio_lengths.max()) + tokens.size(1)
        check_length(longest, self.llm.context, "audio, prompt and text")
        return tokens, positions, first

    def _mask(self, audio_lengths: Tensor, frames: int, before: int, tokens: int) -> Tensor:
        """What each token sees (B, 1, Q, P + Q)."""
        columns = torch.arange(tokens, device=audio_lengths.device)
        past = (columns <= columns[:, None]).expand(len(audio_lengths), -1, -1)
        audio = length_mask(audio_lengths, frames)[:, None] & (columns >= before)[:, None]
        return torch.cat([audio, past], dim=2)[:, None]

    def _project(self, model: Any, audio: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, J, P, .) of the audio in each layer, at positions from ``first``."""
        positions = torch.arange(first, first + audio.size(1), device=audio.device)
        audio, known = layer_input(model, audio, positions[None])
        projected = []
        for layer in llm_layers(model):
            reading = _Projected()
            layer.attention(layer.norm(audio), attention_mask=None, **known, **{ARGUMENT: reading})
            projected.append(reading.found)
        return projected


class _Merged:
    """A reading: audio (per layer keys and values) before the tokens.

    Args:
        audio: Per layer keys and values (B, J, P, .).
        keys: Where those of the tokens are kept, after those of the audio.
    """

    def __init__(self, audio: list, keys: Any = None):
        self.calls, self.audio, self.keys = 0, audio, keys

    def attend(self, module, query, key, value, mask, scaling, dropout):
        first_key, first_value = self.audio[module.layer_idx]
        if self.keys is not None:
            self.keys.write(module.layer_idx, first_key.size(2), key, value)
        key, value = torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2)
        return sdpa(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=False
        )


class _Projected:
    """A reading that only looks at keys and values, ``found``."""

    def __init__(self):
        self.calls = 0

    def attend(self, module, query, key, value, mask, scaling, dropout):
        self.found = key, value
        return query.transpose(1, 2)
