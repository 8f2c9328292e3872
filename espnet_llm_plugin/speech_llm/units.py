"""Label units of a speech LLM: token ids are rows of the LLM, whichever vocabulary it has.

V tokens of the token list, R rows of the LLM's tables (R >= V).

* *Adapted*: the LLM was made for the ASR token list (``bin.adapt_vocabulary``): ``<blank>`` 0,
  ``<sos/eos>`` V - 1.
* *Native*: the token list is the LLM's (``token_type: hugging_face``); BOS and EOS are its own.

[LLMs and Speech, arXiv 2603.15045, compares both; the ASR vocabulary was better.]
"""

from abc import ABC, abstractmethod
from typing import Any, Optional, Sequence

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import load_config, resolve_llm
from espnet_llm_plugin.llm.directory import (
    BPE_FILE,
    TOKENS_FILE,
    check_llm_tokens,
    llm_tokens,
)
from espnet_llm_plugin.llm.native import check_native_token_list, check_rows
from espnet_llm_plugin.llm.perplexity import asr_tokenizer
from espnet_llm_plugin.llm.vocabulary import special_rows
from espnet_llm_plugin.token_list import UNK, guess_token_type


class LabelUnits(ABC):
    """What the token ids of a speech LLM mean.

    Attributes:
        llm: Name of the LLM.
        vocab_size: V.
        rows: R.
        sos: Id that a text begins with.
        eos: Id that ends it.
        unk: Id of the unknown token, or None.
    """

    def __init__(
        self, llm: str, vocab_size: int, rows: int, sos: int, eos: int, unk: Optional[int]
    ):
        self.llm = str(llm)
        self.vocab_size = vocab_size
        self.rows = rows
        self.sos = sos
        self.eos = eos
        self.unk = unk

    @property
    @abstractmethod
    def scored_range(self) -> tuple[int, int]:
        """First id, and the one after the last, of tokens that can come next in a text."""

    @property
    def scored(self) -> torch.Tensor:
        """(V,) bool: the tokens that can come next in a text, EOS among them."""
        ids, (begin, end) = torch.arange(self.vocab_size), self.scored_range
        return (ids >= begin) & (ids < end)

    @property
    @abstractmethod
    def spare_row(self) -> Optional[int]:
        """A row that stands for nothing, or None."""

    @abstractmethod
    def id_of(self, token: str) -> Optional[int]:
        """Id of a token, or None if there is no such token."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text to ids, without BOS and EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""

    @abstractmethod
    def check_token_list(self, token_list: Sequence[str]) -> None:
        """Raise :class:`UserError` if a token list is not the LLM's."""

    def mask_token(self, token: Optional[str] = None) -> int:
        """Id that replaces masked input tokens.

        Args:
            token: This one; by default the unknown token, or a row without token in an LLM that
                has no unknown token.

        Raises:
            UserError: There is none.
        """
        if token is not None:
            found = self.id_of(token)
            if found is None or found >= self.rows:
                raise UserError(
                    f"model_conf: text_mask_token {token!r} is not a token of LLM {self.llm}"
                )
            return found
        found = self._filler()
        if found is None:
            raise UserError(
                f"text masking replaces tokens by the unknown token, but LLM {self.llm} has none, "
                "and no spare row; give model_conf text_mask_token, a token that no transcript has"
            )
        return found

    def silence_token(self) -> int:
        """Id whose embedding stands for audio without a label: as that of masked text, or EOS."""
        found = self._filler()
        return self.eos if found is None else found

    def _filler(self) -> Optional[int]:
        return self.spare_row if self.unk is None else self.unk


class AdaptedUnits(LabelUnits):
    """The ASR token list; the LLM directory was made for it."""

    def __init__(self, llm: str, vocab_size: int):
        self.tokens = llm_tokens(llm)
        if len(self.tokens) != vocab_size:
            raise UserError(
                f"LLM {llm} is over {len(self.tokens)} tokens, the token list has {vocab_size}: "
                "adapt the LLM to this token list "
                "(python -m espnet_llm_plugin.bin.adapt_vocabulary --help)"
            )
        last, unk = vocab_size - 1, self.tokens.index(UNK)
        super().__init__(llm, vocab_size, vocab_size, last, last, unk)
        self._kind = guess_token_type(self.tokens)
        bpemodel = resolve_llm(llm) / BPE_FILE
        self._bpemodel = str(bpemodel) if bpemodel.is_file() else None

    @property
    def scored_range(self) -> tuple[int, int]:
        return 1, self.vocab_size

    @property
    def spare_row(self) -> None:
        return None

    def id_of(self, token: str) -> Optional[int]:
        return self.tokens.index(token) if token in self.tokens else None

    def encode(self, text: str) -> list[int]:
        return asr_tokenizer(self.tokens, self._kind, self._bpemodel)(text) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        from espnet2.text.build_tokenizer import build_tokenizer

        tokenizer = build_tokenizer(self._kind, bpemodel=self._bpemodel)
        return tokenizer.tokens2text([self.tokens[i] for i in ids])

    def check_token_list(self, token_list: Sequence[str]) -> None:
        check_llm_tokens(self.llm, token_list)


class NativeUnits(LabelUnits):
    """The LLM's own vocabulary.

    Attributes:
        tokenizer: The Hugging Face tokenizer.
    """

    def __init__(self, llm: str, vocab_size: int):
        directory = resolve_llm(llm)
        config = load_config(directory)
        rows = int(config.get_text_config().vocab_size)
        self.tokenizer: Any = load_tokenizer(directory)
        check_rows(self.tokenizer, rows, llm)
        bos, eos, unk = special_rows(self.tokenizer, config)
        if not max(bos, eos) < vocab_size <= rows:
            raise UserError(
                f"the token list has {vocab_size} tokens; LLM {llm} has {rows} rows and needs "
                f"those up to {max(bos, eos)}. For the LLM's own tokens (token_type hugging_face) "
                "make the list by `python -m espnet_llm_plugin.bin.make_token_list`; for an ASR "
                "token list adapt the LLM by `python -m espnet_llm_plugin.bin.adapt_vocabulary`."
            )
        super().__init__(llm, vocab_size, rows, bos, eos, unk)
        # sentencepiece-style tokenizers put a space before a text themselves
        self._adds_space = self.tokenizer.tokenize("a") not in ([], ["a"])

    @property
    def scored_range(self) -> tuple[int, int]:
        return 0, min(len(self.tokenizer), self.vocab_size)

    @property
    def spare_row(self) -> Optional[int]:
        return len(self.tokenizer) if len(self.tokenizer) < self.rows else None

    def id_of(self, token: str) -> Optional[int]:
        return self.tokenizer.get_vocab().get(token)

    def encode(self, text: str) -> list[int]:
        if self._adds_space:
            text = text.removeprefix(" ")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def check_token_list(self, token_list: Sequence[str]) -> None:
        needed = (self.sos, self.eos)
        check_native_token_list(self.tokenizer, self.rows, token_list, self.llm, needed)


def label_units(llm: str, vocab_size: int) -> LabelUnits:
    """The units of an LLM (directory or hub id) for a token list of ``vocab_size`` tokens.

    Raises:
        UserError: LLM and token list cannot belong together, or the LLM has no usable tokenizer,
            neither BOS nor EOS, or fewer rows than tokens.
    """
    adapted = (resolve_llm(llm) / TOKENS_FILE).is_file()
    return AdaptedUnits(llm, vocab_size) if adapted else NativeUnits(llm, vocab_size)
