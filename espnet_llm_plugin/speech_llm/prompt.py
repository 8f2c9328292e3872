"""Prompts: the text before and after the audio.

The LLM reads ``[before; audio; after; BOS; text]``. A prompt is part of the model: it is stored in
the configuration, and what it was in training is recorded in the checkpoint.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Union

import torch

from espnet_llm_plugin.compat import same_day_in_chat_templates
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.units import LabelUnits, NativeUnits

INSTRUCTION = "Transcribe speech to text."
# (before, after)
TEMPLATES = {
    "none": ("", ""),
    # lower case and no punctuation, which most ASR token lists can write
    "short": ("", " transcribe speech to text"),
    # arXiv 2603.15045
    "long": ("USER: ", f" {INSTRUCTION} ASSISTANT:"),
}
CHAT = "chat"
_AUDIO = "@audio@"


@dataclass(frozen=True)
class Prompt:
    """Token ids around the audio.

    Attributes:
        before: Ids before the audio.
        after: Ids between audio and text.
        sos: Id that the text begins with; the LLM reads it right after ``after``.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    sos: int

    @property
    def length(self) -> int:
        """Tokens around the audio, the one that begins the text included."""
        return len(self.before) + len(self.after) + 1


def make_prompt(
    prompt: Union[str, Mapping[str, Any]],
    units: LabelUnits,
    context: Optional[int] = None,
    soft: int = 0,
) -> Prompt:
    """The ids of a prompt.

    Args:
        prompt: A name (``none``, ``short``, ``long``; ``chat``: one turn of a user in the format
            of the LLM's chat template, the answer begins without BOS), or a mapping with
            ``before`` and ``after`` (texts, which may name special tokens of the LLM) and ``bos``
            (default true; false: no BOS, the last token of ``after`` takes its place).
        units: The LLM's.
        context: Tokens that the LLM can see.
        soft: Of these, those that a soft prompt takes.

    Raises:
        UserError: An unknown name or key, text that the token list cannot write, a tokenizer
            without chat template, or a prompt that leaves no room for audio and text.
    """
    before, after, bos = _texts(prompt, units)
    ids = []
    for name, text in (("before", before), ("after", after)):
        encoded = units.encode(text)
        if units.unk is not None and units.unk in encoded:
            raise UserError(
                f"decoder_conf: the prompt's text {name!r}, {text!r}, has characters or words that "
                f"the token list of LLM {units.llm} cannot write; give decoder_conf prompt as "
                "{before: ..., after: ...} in the token list's characters and case, or `none`"
            )
        ids.append(tuple(encoded))
    if not bos and not ids[1]:
        raise UserError(
            "decoder_conf: a prompt with `bos: false` needs a text `after` the audio, whose last "
            "token the transcript follows"
        )
    made = Prompt(*ids, units.sos) if bos else Prompt(ids[0], ids[1][:-1], ids[1][-1])
    if context is not None and made.length + soft + 1 >= context:
        raise UserError(
            f"decoder_conf: the prompt has {made.length + soft} tokens, LLM {units.llm} sees "
            f"{context}: nothing is left for audio and text; shorten the prompt"
        )
    return made


def _texts(prompt: Union[str, Mapping[str, Any]], units: LabelUnits) -> tuple[str, str, bool]:
    if isinstance(prompt, Mapping):
        unknown = sorted(set(prompt) - {"before", "after", "bos"})
        values = {"before": "", "after": "", "bos": True, **prompt}
        right = all(isinstance(values[k], str) for k in ("before", "after"))
        if unknown or not right or not isinstance(values["bos"], bool):
            raise UserError(
                f"decoder_conf: prompt {dict(prompt)!r}; expected the keys before and after "
                "(texts) and bos (true or false)"
            )
        return values["before"], values["after"], values["bos"]
    if prompt == CHAT:
        return (*_chat(units), False)
    if prompt not in TEMPLATES:
        raise UserError(
            f"decoder_conf: unknown prompt {prompt!r}; expected {', '.join(TEMPLATES)}, {CHAT}, or "
            "{before: ..., after: ...}"
        )
    return (*TEMPLATES[prompt], True)


def _chat(units: LabelUnits) -> tuple[str, str]:
    """What the chat template writes around the audio of the user's only turn."""
    if not isinstance(units, NativeUnits) or not units.tokenizer.chat_template:
        raise UserError(
            f"decoder_conf: prompt chat needs an LLM with a chat template and its own tokenizer; "
            f"{units.llm} has none. Give the texts as {{before: ..., after: ...}}"
        )
    with same_day_in_chat_templates():
        text = units.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{_AUDIO}{INSTRUCTION}"}],
            tokenize=False,
            add_generation_prompt=True,
            # of templates that know it (Qwen3): the answer is the transcript
            enable_thinking=False,
        )
    parts = text.split(_AUDIO)
    if len(parts) != 2:
        raise UserError(
            f"decoder_conf: the chat template of {units.llm} writes the user's turn "
            f"{len(parts) - 1} times; expected once. Give the texts as {{before: ..., after: ...}}"
        )
    return parts[0], parts[1]


class PromptRecord(torch.nn.Module):
    """Records the prompt in checkpoints, and refuses those of another.

    Its one buffer holds the 32 bytes of a digest as floats, which ESPnet's averaging of checkpoints
    and half precision leave as they are.
    """

    def __init__(self, prompt: Prompt):
        super().__init__()
        text = json.dumps([prompt.before, prompt.after, prompt.sos])
        digest = hashlib.sha256(text.encode()).digest()
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.float32))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        recorded = state_dict.get(prefix + "digest")
        if recorded is not None and not torch.equal(recorded.float().cpu(), self.digest.cpu()):
            raise UserError(
                "the checkpoint was trained with another prompt than this configuration's: set "
                "decoder_conf prompt to what it was in the config.yaml of the training"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
