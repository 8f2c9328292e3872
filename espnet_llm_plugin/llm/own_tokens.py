"""An LLM's own tokens in ESPnet's LM task (``token_type: hugging_face``).

ESPnet begins and ends every sentence with token V-1. An LLM has other ids for that: here position 0
of the input becomes its BOS, and its EOS and row V-1 change places in the output. Row V-1 is a row
without a token in most LLMs; a text that has the token there cannot be told from its end, and is
refused.

B sentences, L tokens of the longest, V rows of the LLM.
"""

from pathlib import Path
from typing import Sequence, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import load_config, resolve_llm
from espnet_llm_plugin.llm.directory import TOKENS_FILE, llm_tokens
from espnet_llm_plugin.llm.vocabulary import special_rows


def has_own_tokens(llm: Union[str, Path]) -> bool:
    """Whether an LLM's rows are its own tokens rather than those of an ASR token list."""
    return not (resolve_llm(llm) / TOKENS_FILE).is_file()


def check_vocab_size(llm: Union[str, Path], vocab_size: int) -> None:
    """Refuse an LLM with another number of rows than LMTask's token list.

    LMTask passes no more than the size; ``check_llm_tokens`` compares the tokens of adapted LLMs.
    """
    if has_own_tokens(llm):
        rows = int(load_config(resolve_llm(llm)).get_text_config().vocab_size)
        if rows != vocab_size:
            raise UserError(
                f"LLM {llm} has {rows} tokens of its own, the token list has {vocab_size}. Run "
                "`python -m espnet_llm_plugin.bin.adapt_vocabulary` with this token list, or train "
                "on the LLM's own tokens (`--token_type hugging_face`, token list by `python -m "
                f"espnet_llm_plugin.bin.make_token_list --token_type hugging_face --llm {llm}`)."
            )
        return
    tokens = llm_tokens(llm)
    if len(tokens) != vocab_size:
        raise UserError(
            f"LLM {llm} is over {len(tokens)} tokens, the token list has {vocab_size}. Run "
            "`python -m espnet_llm_plugin.bin.adapt_vocabulary` with this token list."
        )


class OwnTokens:
    """ESPnet's ids and an LLM's.

    Args:
        llm: Directory or hub id.
        vocab_size: V.
    """

    def __init__(self, llm: Union[str, Path], vocab_size: int):
        directory = resolve_llm(llm)
        tokenizer = load_tokenizer(directory)
        self.bos, self.eos, _ = special_rows(tokenizer, load_config(directory))
        self._last = vocab_size - 1
        self._name = str(llm)

    def inputs(self, ids: torch.Tensor) -> torch.Tensor:
        """ESPnet's ids (B, L), sos first, as the LLM's.

        Raises:
            UserError: A sentence has the token V-1.
        """
        if bool((ids[:, 1:] == self._last).any()):
            raise UserError(
                f"a sentence has token {self._last} of LLM {self._name}, which ESPnet's LM task "
                "takes for the end of a sentence: leave out the text that has it."
            )
        return torch.cat([torch.full_like(ids[:, :1], self.bos), ids[:, 1:]], dim=1)

    def prefix(self, row: Sequence[int]) -> list[int]:
        """A prefix as ESPnet's searches give it (padded on the left with 0), as the LLM's."""
        if self._last not in row:
            raise ValueError("a prefix without sos")
        begin = list(row).index(self._last)
        return [self.bos, *row[begin + 1 :]]

    def outputs(self, logits: torch.Tensor) -> torch.Tensor:
        """The LLM's logits (..., V) with EOS at V-1."""
        if self.eos == self._last:
            return logits
        order = torch.arange(logits.shape[-1], device=logits.device)
        order[self._last], order[self.eos] = self.eos, self._last
        return logits[..., order]
