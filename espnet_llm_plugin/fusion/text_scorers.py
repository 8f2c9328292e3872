"""Language models that score whole hypotheses: an LLM in its own tokens, or an LM in the ASR's.

Both are asked with *keys*, what the score of a hypothesis depends on, so that each distinct one is
scored once however many n-best lists it is in.

N keys, V tokens.
"""

from abc import ABC, abstractmethod
from typing import Any, Callable, Generic, Iterator, Optional, Protocol, Sequence, TypeVar

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.context import context_of
from espnet_llm_plugin.llm.sequence_scores import length_sorted_batches, sequence_log_probs
from espnet_llm_plugin.llm.vocabulary import special_rows

Key = TypeVar("Key")
ENDS = ("eos", "newline", "none")


class Scored(Protocol):
    """What is scored: an entry of an n-best list, for instance."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]: ...


class TextScorer(ABC, Generic[Key]):
    """Log-probabilities of hypotheses, natural logarithms.

    Args:
        forward: Token ids (B, L) to logits (B, L, V).
        vocab_size: V.
        device: Where the LM lives.
        temperature: Divides the logits.
        context: Tokens the LM can see; None: any number.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        vocab_size: int,
        device: torch.device,
        temperature: float,
        context: Optional[int],
    ):
        if temperature <= 0:
            raise UserError(f"LM temperature {temperature}: expected a number above 0")
        self._forward, self._vocab_size, self._device = forward, vocab_size, device
        self._temperature, self._context = temperature, context

    @abstractmethod
    def key(self, entry: Scored) -> Key:
        """What the score of ``entry`` depends on."""

    @abstractmethod
    def sequence(self, key: Key) -> list[int]:
        """Token ids that begin with BOS, the end included if it is scored."""

    def score_batches(
        self, keys: Sequence[Key], batch_size: int = 16
    ) -> Iterator[list[tuple[Key, float]]]:
        """Scores of N distinct keys, batch by batch, the longest first.

        Raises:
            UserError: One is longer than the LM's context.
        """
        sequences = [self.sequence(key) for key in keys]
        lengths = list(map(len, sequences))
        # the last token is not an input
        if self._context is not None and max(lengths, default=0) > self._context + 1:
            long = max(range(len(keys)), key=lengths.__getitem__)
            raise UserError(
                f"a hypothesis has {lengths[long]} tokens, the LM sees {self._context}: "
                f"{str(keys[long])[:60]}..."
            )
        for batch in length_sorted_batches(lengths, self._vocab_size, batch_size):
            scores = sequence_log_probs(
                self._forward,
                [sequences[i] for i in batch],
                device=self._device,
                temperature=self._temperature,
            )
            yield [(keys[i], score) for i, score in zip(batch, scores)]


class LLMTextScorer(TextScorer[str]):
    """An LLM in its own vocabulary: hypotheses are tokenised anew.

    Args:
        model: Causal LM, in evaluation mode.
        tokenizer: Its own.
        name: Of the LLM, for messages.
        end: What is scored after the text: ``eos``, the LLM's end token; ``newline``, for LLMs
            whose training text had lines rather than ends; ``none``.
        lowercase: Score in lower case.
        temperature: Divides the logits.

    Raises:
        UserError: An LLM without EOS, or whose tokenizer drops line ends, if these are asked for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        end: str = "eos",
        lowercase: bool = False,
        temperature: float = 1.0,
    ):
        config = model.config
        super().__init__(
            lambda ids: (
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            ),
            int(config.get_text_config().vocab_size),
            model.device,
            temperature,
            context_of(model),
        )
        self._tokenizer = tokenizer
        self._lowercase = lowercase
        self._bos = special_rows(tokenizer, config)[0]
        self._end = end_tokens(tokenizer, config, end, name)

    def key(self, entry: Scored) -> str:
        """Its words, in lower case if that is wanted."""
        text = " ".join(entry.text.split())
        return text.lower() if self._lowercase else text

    def words(self, key: str) -> list[int]:
        """Token ids of a text, without BOS and end."""
        return list(self._tokenizer(key, add_special_tokens=False)["input_ids"])

    def sequence(self, key: str) -> list[int]:
        """See :class:`TextScorer`."""
        return [self._bos, *self.words(key), *self._end]


def end_tokens(tokenizer: Any, config: Any, end: str, name: str) -> list[int]:
    """Token ids that end a text: see :class:`LLMTextScorer`."""
    if end == "none":
        return []
    others = " or ".join(f"--eos {other}" for other in ENDS if other != end)
    if end == "eos":
        eos = tokenizer.eos_token_id
        if eos is None:
            eos = config.get_text_config().eos_token_id
        if eos is None:
            raise UserError(
                f"LLM {name} has no EOS token (tokenizer_config.json, config.json); use {others}"
            )
        return [eos[0] if isinstance(eos, (list, tuple)) else eos]
    if end != "newline":
        raise UserError(f"unknown end of text {end!r}; expected one of {', '.join(ENDS)}")
    # The new line as it follows text: by itself some tokenizers put a space before it.
    text, line = (list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("a", "a\n"))
    if line[: len(text)] != text or len(line) == len(text):
        raise UserError(f"the tokenizer of LLM {name} has no line ends; use {others}")
    return line[len(text) :]


class LabelTextScorer(TextScorer[tuple[int, ...]]):
    """An LM over the token list of the recogniser: an ESPnet LM, an adapted LLM, an internal LM.

    Args:
        forward: Token ids (B, L) beginning with sos to logits (B, L, V) of the next tokens.
        vocab_size: V; sos and eos are V - 1.
        device: Where the LM lives.
        end: ``eos`` or ``none``.
        temperature: Divides the logits.
        context: Tokens the LM can see; None: any number.

    Raises:
        UserError: ``newline``, which such a token list has not.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        vocab_size: int,
        device: torch.device,
        *,
        end: str = "eos",
        temperature: float = 1.0,
        context: Optional[int] = None,
    ):
        if end not in ("eos", "none"):
            raise UserError(
                f"--eos {end}: an LM over the ASR tokens ends a text with <sos/eos>; use --eos eos "
                "or --eos none"
            )
        super().__init__(forward, vocab_size, device, temperature, context)
        self._sos = vocab_size - 1
        self._ends = [self._sos] if end == "eos" else []

    def key(self, entry: Scored) -> tuple[int, ...]:
        """Its token ids."""
        return tuple(entry.token_ids)

    def sequence(self, key: tuple[int, ...]) -> list[int]:
        """See :class:`TextScorer`."""
        return [self._sos, *key, *self._ends]


def label_scorer(lm: Any, vocab_size: int, device: torch.device, **options: Any) -> LabelTextScorer:
    """A :class:`LabelTextScorer` of ``LMTask``'s ``model.lm``; options as there."""
    model = getattr(lm, "model", None)
    context = context_of(model(device)) if callable(model) else None
    return LabelTextScorer(
        lambda ids: lm(ids, None)[0], vocab_size, device, context=context, **options
    )
