"""A frozen large language model as the factorized transducer's predictor.

B utterances, U labels, N prefixes, V token ids (the rows of the adapted LLM), L = V - 2 labels.
"""

from typing import Any, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import FrozenLLM, LLMIdentity
from espnet_llm_plugin.llm.context import context_of, context_windows
from espnet_llm_plugin.llm.directory import check_llm_tokens
from espnet_llm_plugin.llm.state import PrefixLM
from espnet_llm_plugin.transducer.abs_predictor import AbsPredictor


class LLMPredictor(AbsPredictor):
    """Frozen causal LM over the ASR token ids; prefixes start with ``<sos/eos>`` = V - 1.

    [Transducer-Llama, arXiv 2412.16464]

    The LLM is no part of the module tree: it is in no checkpoint, no optimizer, no count of
    parameters, and is loaded when it is first used. What a checkpoint holds is the LLM's
    fingerprint, and loading one that was made with another LLM is an error.

    Args:
        num_labels: L.
        llm: directory of an LLM adapted to the ASR token list (``bin.adapt_vocabulary`` or
            ``bin.export_llm``).
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored).
    """

    def __init__(self, num_labels: int, llm: str, dtype: str = "float32"):
        super().__init__(num_labels)
        self.llm = FrozenLLM(llm, dtype=dtype)
        if self.llm.vocab_size != num_labels + 2:
            raise UserError(
                f"the LLM {llm} has {self.llm.vocab_size} tokens, but the token list has "
                f"{num_labels + 2}: adapt the LLM to this token list "
                "(python -m espnet_llm_plugin.bin.adapt_vocabulary --help)"
            )
        self.identity = LLMIdentity(self.llm)
        self._prefix_lm: PrefixLM | None = None

    def check_token_list(self, token_list: Sequence[str]) -> None:
        super().check_token_list(token_list)
        check_llm_tokens(self.llm.directory, token_list)

    @torch.no_grad()
    def forward(self, labels: Tensor) -> Tensor:
        tokens = torch.nn.functional.pad(labels + 1, (1, 0), value=self.num_labels + 1)
        model = self.llm.model(labels.device)
        parts = []
        # usually one: all of it
        for skipped, begin, end in context_windows(tokens.size(1), context_of(model)):
            window = torch.cat([tokens[:, :1], tokens[:, 1 + skipped : end]], 1)
            # rows are padded on the right, which a causal model does not see
            logits = model(input_ids=window, use_cache=False).logits
            parts.append(self._log_probs(logits[:, begin - skipped :]))
        return torch.cat(parts, 1)

    def start(self, device: torch.device) -> tuple[Tensor, Any]:
        model = self.llm.model(device)
        if self._prefix_lm is None or self._prefix_lm.model is not model:
            self._prefix_lm = PrefixLM(model)
        begin = torch.tensor([self.num_labels + 1], device=device)
        logits, states = self._prefix_lm.step(begin, [None])
        return self._log_probs(logits)[0], states[0]

    def extend(self, labels: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        logits, states = self._prefix_lm.step(labels + 1, states)
        return self._log_probs(logits), states

    @property
    def use(self) -> tuple[int, int]:
        """Calls of the LLM in searches so far, and tokens that it has read in them."""
        lm = self._prefix_lm
        return (0, 0) if lm is None else (lm.num_forwards, lm.num_token_forwards)

    @staticmethod
    def _log_probs(logits: Tensor) -> Tensor:
        """Normalise over the labels alone: <blank> and <sos/eos> are never predicted."""
        return logits[..., 1:-1].float().log_softmax(dim=-1)

    def __getstate__(self) -> dict:
        # a copy of this module shares the LLM, not the key/value pool of running searches
        return {**self.__dict__, "_prefix_lm": None}
