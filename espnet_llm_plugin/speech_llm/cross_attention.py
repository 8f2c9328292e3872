"""Gated cross-attention to the audio, added to the layers of an LLM.

B rows, L tokens, P embeddings of the audio, D their width, E width of the LLM's layers, H heads,
A utterances, W hypotheses of an utterance, K LLM layers.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.attention import ARGUMENT, Plain, check_read, installed
from espnet_llm_plugin.speech_llm.interface import Interface
from espnet_llm_plugin.speech_llm.llm_parts import (
    ALTERNATIVE,
    llm_layers,
    llm_logits,
    llm_outputs,
    why_no_layers,
)
from espnet_llm_plugin.speech_llm.sequence import check_length, length_mask
from espnet_llm_plugin.speech_llm.state import ROOM, Recording, SharedKeys, SpeechState, Step


class GatedCrossAttention(torch.nn.Module):
    """x + tanh(gate) * attention(norm(x), norm(audio)), as an update of x [Flamingo,
    arXiv 2204.14198, without its second feed-forward: the LLM's own follows].

    Args:
        size: E.
        audio_size: D.
        heads: H.
        dropout: Of the attention weights.
    """

    def __init__(self, size: int, audio_size: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if size % heads:
            raise UserError(f"interface_conf: {heads} heads do not divide the LLM's width {size}.")
        self.heads, self.dropout = heads, dropout
        self.norm = torch.nn.LayerNorm(size)
        self.audio_norm = torch.nn.LayerNorm(audio_size)
        self.query = torch.nn.Linear(size, size)
        self.key_value = torch.nn.Linear(audio_size, 2 * size)
        self.out = torch.nn.Linear(size, size)
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def project(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, P, .) of audio (B, P, D)."""
        both = self.key_value(self.audio_norm(audio.to(self.audio_norm.weight.dtype)))
        key, value = both.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """What is added to x (B, L, E).

        Args:
            x: Input of an LLM layer.
            key: (B, H, P, .).
            value: (B, H, P, .).
            mask: Valid columns (B, P); a row without any gets 0.
        """
        query = self.query(self.norm(x.to(self.norm.weight.dtype)))
        query = query.unflatten(2, (self.heads, -1)).transpose(1, 2)
        some = mask.any(dim=1)
        # an empty row looks at its padding, and is dropped below
        seen = (mask | ~some[:, None])[:, None, None]
        if not key.size(2):
            return torch.zeros_like(x)
        found = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=self.dropout if self.training else 0.0
        )
        update = self.gate.tanh() * self.out(found.transpose(1, 2).flatten(2))
        return (update * some[:, None, None]).to(x.dtype)


class CrossAttentionInterface(Interface):
    """Text attends to audio by layers of its own before layers of the LLM, which is a plain text
    LM at first: gates start at 0 [AED-style interface of arXiv 2603.15045].

    Args:
        llm: See :class:`Interface`.
        every: Before every so many layers of the LLM, the first included.
        heads: H; by default the LLM's.
        dropout: Of the cross-attention weights.
    """

    needs_masks = False  # of the LLM's own attention
    audio_takes_positions = False
    _only_attention = False

    def __init__(self, llm: Any, every: int = 1, heads: Optional[int] = None, dropout: float = 0.0):
        super().__init__(llm)
        config = llm.config.get_text_config()
        if every < 1 or every > config.num_hidden_layers:
            raise UserError(
                f"interface_conf: every {every}; expected 1 to {config.num_hidden_layers}, the "
                "LLM's number of layers."
            )
        reason = why_no_layers(llm.config)
        if reason is not None:
            raise UserError(f"interface cross_attention: the LLM has {reason}; {ALTERNATIVE}.")
        self.every = every
        self.layers = torch.nn.ModuleList(
            GatedCrossAttention(
                config.hidden_size, llm.hidden_size, heads or config.num_attention_heads, dropout
            )
            for _ in range(0, config.num_hidden_layers, every)
        )

    def gates(self) -> Tensor:
        """How much each cross-attention layer adds, tanh(gate): (layers,), 0 at first."""
        return torch.stack([layer.gate for layer in self.layers]).detach().tanh()

    def forward(self, audio, audio_lengths, text, text_lengths, before=(), after=(), soft=None):
        model = self.llm.model(audio.device)
        audio, lengths = self._audio(audio, audio_lengths)
        prompt = self._prompt(audio, before, soft, after)
        tokens = torch.cat([prompt, self.llm.embed(text)], dim=1)
        check_length(tokens.size(1), self.llm.context, "prompt and text")
        _hook(model)
        reading = _Crossing(self, self._project(audio), length_mask(lengths, audio.size(1)))
        outputs = llm_outputs(model, tokens, reading=reading)
        reading.check()
        return llm_logits(model, outputs[:, tokens.size(1) - text.size(1) :]), {}

    def _prompt(self, audio: Tensor, before: tuple, soft: Optional[Tensor], after: tuple) -> Tensor:
        """Embeddings (B, n, D) of what comes before the text."""
        first, _ = self._before(before, soft, len(audio), audio.device)
        return torch.cat([first, self._tokens(after, len(audio), audio.device)[0]], dim=1)

    def _project(self, audio: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [layer.project(audio) for layer in self.layers]

    def _start(self, audio, audio_lengths, before, after, soft=None):
        model = self.llm.model(audio.device)
        _hook(model)
        audio, lengths = self._audio(audio, audio_lengths)
        tokens = self._prompt(audio, before, soft, after)
        token_lengths = torch.full((len(audio),), tokens.size(1), device=audio.device)
        check_length(tokens.size(1), self.llm.context, "the prompt's tokens")
        keys = SharedKeys(len(audio), tokens.size(1) + ROOM)
        keys.cross, keys.audio = self._project(audio), length_mask(lengths, audio.size(1))
        if tokens.size(1):
            reading = _CrossRecording(self, keys)
            with installed(model):
                llm_outputs(model, tokens, reading=reading)
            check_read(model, reading)
            reading.crossing.check()
        seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=audio.device)
        return SpeechState.begin(keys, seen, token_lengths)

    def _reading(self, state, parents):
        return _CrossStep(self, state, parents)


class _Crossing(Plain):
    """What the cross-attention layers of one forward read: audio of each row."""

    def __init__(self, interface: CrossAttentionInterface, audio: list, valid: Tensor):
        super().__init__()
        self.layers, self.every = interface.layers, interface.every
        self.audio, self.valid = audio, valid
        self.crossed = 0

    def cross(self, layer: int, x: Tensor) -> Tensor:
        """What LLM layer ``layer`` gets instead of x (B, L, E)."""
        if layer % self.every:
            return x
        self.crossed += 1
        number = layer // self.every
        return x + self.layers[number](x, *self.audio[number], self.valid)

    def check(self) -> None:
        if self.crossed != len(self.layers):
            raise UserError(
                f"{self.crossed} of {len(self.layers)} cross-attention layers have run: the LLM "
                "does not hand its arguments to its layers; use `interface: prefix`."
            )


class _CrossRecording(Recording):
    """Also keeps what the prompt's self-attention read."""

    def __init__(self, interface: CrossAttentionInterface, keys: SharedKeys):
        super().__init__(keys)
        self.crossing = _Crossing(interface, keys.cross, keys.audio)

    def cross(self, layer: int, x: Tensor) -> Tensor:
        return self.crossing.cross(layer, x)


class _CrossStep(Step):
    """The hypotheses of an utterance are queries of its audio."""

    def __init__(self, interface: CrossAttentionInterface, state: SpeechState, parents: Tensor):
        super().__init__(state, parents)
        self._crossing = _Crossing(interface, self.keys.cross, self.keys.audio)

    def cross(self, layer: int, x: Tensor) -> Tensor:
        if layer % self._crossing.every:
            return x
        return self.ungrouped(self._crossing.cross(layer, self.grouped(x[:, 0])))[:, None]

    def state(self) -> SpeechState:
        self._crossing.check()
        return super().state()


class _Hook:
    """Forward pre-hook of LLM layer ``layer``: its input after cross-attention."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> Optional[tuple[tuple, dict]]:
        reading = kwargs.get(ARGUMENT)
        if not hasattr(reading, "cross"):
            return None
        return (reading.cross(self.layer, args[0]), *args[1:]), kwargs


def _hook(model: Any) -> None:
    """Hooks on the layers of an LLM, once; without a reading that crosses they do nothing."""
    for number, layer in enumerate(llm_layers(model)):
        hooks = layer.whole._forward_pre_hooks.values()
        if not any(isinstance(hook, _Hook) for hook in hooks):
            layer.whole.register_forward_pre_hook(_Hook(number), with_kwargs=True)
