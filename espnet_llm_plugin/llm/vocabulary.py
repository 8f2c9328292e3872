"""Vocabulary adaptation: an LLM over the tokens of an ASR model (Transducer-Llama, 2412.16464).

V: ASR tokens, R: rows of the LLM's own tables, D: embedding dimension.

An ASR token whose text is a token of the LLM takes that token's rows; any other takes the mean (or
another ``oov_init``) of the rows of the sub-tokens into which the LLM's tokenizer splits its text.
This holds for the input table and, if it is not tied to it, for the output table and its bias.

Scripts that the LLM has no tokens for are written in its byte tokens (``<0xE0> <0xA4> <0x95>``; in
GPT-2's style likewise): their rows are means over these bytes, which say little. The report counts
such pieces, and names those whose means are equal.

Three rows are not text:

* ``<blank>`` (0): zeros. An LLM has no use for it, and most output layers have no bias that could
  mask it: everything here that reads such an LLM (the ``llm`` predictor, ``causal_llm``, the
  perplexities of the report) masks blank before the softmax. An output bias, where the family has
  one, is set to -1e4 for blank.
* ``<sos/eos>`` (V-1): input row of the LLM's BOS, output row of its EOS. A tied table has one row
  for both, and takes BOS: every sentence is conditioned on it (LLMs rely on it as attention sink),
  while the end of sentence is not scored by transducers and is the first thing fine-tuning learns.
* ``<unk>`` (1): the row of the LLM's unknown token if it has one, else the mean of all rows.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.token_list import (
    BLANK,
    SOS_EOS,
    SPACE,
    TOKEN_TYPES,
    UNK,
    guess_token_type,
)

OOV_INITS = ("mean", "length_weighted_mean", "first", "random")
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_META = "\u2581"  # sentencepiece's visible space
_BLANK_BIAS = -1e4


class SubwordVocabulary:
    """The vocabulary of an LLM's tokenizer, asked for *pieces* of text instead of sentences.

    ``tokenizer.encode`` is the wrong question for a piece: sentencepiece-style tokenizers put a
    space before it, so that the continuation ``ing`` would become `` ing``. The piece is brought
    to the form in which the tokenizer's own model sees text, and that model is asked:
    sentencepiece style ``▁ing``, byte-level style (GPT-2, Qwen, Llama 3) ``Ġing``, else plain.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the LLM's tokenizer ({type(tokenizer).__name__}) has no `tokenizers` backend; "
                "expected a directory with a tokenizer.json (save it once with a fast tokenizer)."
            )
        self.tokenizer = tokenizer
        self._model = backend.model
        self._normalizer = backend.normalizer
        # as JSON, because the repr() of these objects may be abridged
        whole = json.loads(backend.to_str())
        parts = [whole[key] for key in ("normalizer", "pre_tokenizer", "decoder")]
        steps = json.dumps(parts, ensure_ascii=False)
        if "ByteLevel" in steps:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self.style = "byte_level"
            self._byte_letters = bytes_to_unicode()
            self._letter_bytes = {letter: byte for byte, letter in self._byte_letters.items()}
        elif _META in steps or "Metaspace" in steps:
            self.style = "sentencepiece"
        else:
            self.style = "plain"
        self._special = set(tokenizer.all_special_ids)

    def _surface(self, text: str) -> str:
        if self.style == "sentencepiece":
            return text.replace(" ", _META)
        if self.style == "byte_level":
            if self._normalizer is not None:
                text = self._normalizer.normalize_str(text)  # NFC; adds no prefix here
            return "".join(self._byte_letters[byte] for byte in text.encode("utf-8"))
        return text.strip()

    def exact(self, text: str) -> Optional[int]:
        """Id of the token whose text is exactly ``text``, or ``None``."""
        found = self._model.token_to_id(self._surface(text))
        return None if found is None or found in self._special else found

    def exact_byte(self, value: int) -> Optional[int]:
        """Id of the token for one byte that is no complete character."""
        if self.style == "byte_level":
            return self._model.token_to_id(self._byte_letters[value])
        return self._model.token_to_id(f"<0x{value:02X}>")

    def split(self, text: str) -> list[int]:
        """Ids of the sub-tokens of ``text``; empty if the tokenizer only has its unknown token."""
        surface = self._surface(text)
        if not surface:
            return []
        ids = [token.id for token in self._model.tokenize(surface)]
        return [i for i in ids if i not in self._special]

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a part of a character's UTF-8, of no meaning by itself."""
        token = self._model.id_to_token(token_id)
        if self.style != "byte_level":
            return bool(_BYTE.match(token))
        if not all(letter in self._letter_bytes for letter in token):  # added tokens
            return False
        try:
            bytes(self._letter_bytes[letter] for letter in token).decode("utf-8")
        except UnicodeDecodeError:
            return True
        return False

    def weight(self, token_id: int) -> int:
        """How much text a sub-token stands for: its characters (byte-level: bytes)."""
        token = self._model.id_to_token(token_id)
        return 1 if _BYTE.match(token) else len(token)


@dataclass
class Mapping:
    """Which LLM rows make up each ASR token.

    Attributes:
        tokens: The V ASR tokens.
        sources: Per ASR token the LLM ids (V lists); empty for special tokens and where nothing
            was found.
        exact: Per ASR token whether its single source is its exact match.
        in_bytes: Per ASR token whether bytes that are no characters are among its sources.
    """

    tokens: list[str]
    sources: list[list[int]]
    exact: list[bool]
    in_bytes: list[bool]

    @property
    def text_ids(self) -> list[int]:
        """ASR ids of tokens that stand for text."""
        return [i for i, t in enumerate(self.tokens) if t not in (BLANK, UNK, SOS_EOS)]

    @property
    def not_found(self) -> list[str]:
        """Text tokens for which the LLM has nothing at all."""
        return [self.tokens[i] for i in self.text_ids if not self.sources[i]]

    @property
    def alike(self) -> list[str]:
        """Text tokens that are no exact match and have the sub-tokens of another in another order.

        A mean cannot tell them apart. Bytes do it across scripts: Telugu ma is ``E0 B0 AE``, Tamil
        ra ``E0 AE B0``.
        """
        groups: dict[tuple[int, ...], list[str]] = {}
        for i in self.text_ids:
            if self.sources[i] and not self.exact[i]:
                groups.setdefault(tuple(sorted(self.sources[i])), []).append(self.tokens[i])
        return [token for group in groups.values() if len(group) > 1 for token in group]

    def statistics(self) -> dict[str, Any]:
        """The figures of the report (JSON)."""
        ids = self.text_ids
        counts = [len(self.sources[i]) for i in ids if self.sources[i]]
        split = [len(self.sources[i]) for i in ids if self.sources[i] and not self.exact[i]]
        return {
            "text_tokens": len(ids),
            "exact_matches": sum(self.exact),
            "exact_match_share": sum(self.exact) / len(ids),
            "mean_subtokens_per_piece": sum(counts) / max(1, len(counts)),
            "mean_subtokens_per_unmatched_piece": sum(split) / max(1, len(split)),
            "pieces_in_bytes": sum(self.in_bytes[i] for i in ids),
            "alike": self.alike,
            "not_found": self.not_found,
        }


def map_tokens(
    tokens: Sequence[str],
    vocabulary: SubwordVocabulary,
    *,
    token_type: Optional[str] = None,
    exact_match: bool = True,
) -> Mapping:
    """Find the LLM tokens that make up each ASR token.

    Args:
        tokens: The ASR token list (V).
        vocabulary: The LLM's.
        token_type: ``bpe``, ``char`` or ``word``; guessed when ``None``. A ``word`` stands after a
            space, a ``char`` as it is; ``<space>`` is a space.
        exact_match: Look tokens up as a whole first. Without it every token goes through the
            tokenizer's own segmentation and counts as out of vocabulary.
    """
    kind = token_type or guess_token_type(tokens)
    if kind not in TOKEN_TYPES:
        raise UserError(f"unknown token type {kind!r}; expected one of {', '.join(TOKEN_TYPES)}.")
    sources: list[list[int]] = []
    exact: list[bool] = []
    for token in tokens:
        found: Optional[int] = None
        parts: list[int] = []
        byte = _BYTE.match(token)
        if token in (BLANK, UNK, SOS_EOS):
            pass
        elif byte:
            found = vocabulary.exact_byte(int(byte.group(1), 16))
            parts = [] if found is None else [found]
        else:
            text = " " if token == SPACE else token.replace(_META, " ")
            if kind == "word":
                text = " " + text
            found = vocabulary.exact(text)
            parts = vocabulary.split(text)
        is_exact = exact_match and found is not None
        sources.append([found] if is_exact else parts)
        exact.append(is_exact)
    in_bytes = [any(map(vocabulary.is_byte, source)) for source in sources]
    return Mapping(list(tokens), sources, exact, in_bytes)


def special_rows(tokenizer: Any, config: Any) -> tuple[int, int, Optional[int]]:
    """LLM ids of (BOS, EOS, unknown) as the LLM was trained with them.

    Base models without BOS (Qwen) begin documents with what ends them.
    """
    text = config.get_text_config()

    def first(value: Any) -> Optional[int]:
        return value[0] if isinstance(value, (list, tuple)) else value

    ends = (tokenizer.eos_token_id, first(text.eos_token_id))
    eos = next((i for i in ends if i is not None), None)
    candidates = (tokenizer.bos_token_id, first(text.bos_token_id), eos)
    bos = next((i for i in candidates if i is not None), None)
    if bos is None:
        raise UserError(
            "the LLM names neither a BOS nor an EOS token (tokenizer_config.json, config.json), so "
            "there is nothing to begin a sentence with; add one of them."
        )
    eos = bos if eos is None else eos
    unk = tokenizer.unk_token_id
    # GPT-2 and its kin call their end of text "unknown" too
    return bos, eos, None if unk in (bos, eos) else unk


def new_rows(
    table: torch.Tensor,
    mapping: Mapping,
    vocabulary: SubwordVocabulary,
    *,
    sos_eos: int,
    unk: Optional[int],
    oov_init: str,
    generator: torch.Generator,
) -> torch.Tensor:
    """Rows (V, ...) for the ASR tokens from an LLM's ``table`` (R, ...), in its dtype.

    Args:
        table: Input or output embedding (R, D), or output bias (R,).
        mapping: From :func:`map_tokens`.
        vocabulary: For the lengths of sub-tokens.
        sos_eos: LLM id whose row ``<sos/eos>`` takes.
        unk: LLM id whose row ``<unk>`` takes; ``None`` is the mean.
        oov_init: One of :data:`OOV_INITS`.
        generator: For ``random``.
    """
    # Tables are often longer than the vocabulary (Qwen2); the surplus rows were never trained.
    trained = table[: len(vocabulary.tokenizer)].float()
    mean, std = trained.mean(0), trained.std(0)
    rows = torch.empty(len(mapping.tokens), *table.shape[1:], dtype=torch.float32)
    for row, (token, source, exact) in enumerate(
        zip(mapping.tokens, mapping.sources, mapping.exact)
    ):
        if token == BLANK:
            rows[row] = 0.0
        elif token == SOS_EOS:
            rows[row] = table[sos_eos].float()
        elif token == UNK:
            rows[row] = mean if unk is None else table[unk].float()
        elif exact:
            rows[row] = table[source[0]].float()
        elif oov_init == "random":
            rows[row] = mean + std * torch.randn(mean.shape, generator=generator)
        elif not source:
            rows[row] = mean
        elif oov_init == "first":
            rows[row] = table[source[0]].float()
        else:
            parts = table[source].float()
            weights = torch.ones(len(source))
            if oov_init == "length_weighted_mean":
                weights = torch.tensor([float(vocabulary.weight(i)) for i in source])
            rows[row] = torch.tensordot(weights / weights.sum(), parts, dims=1)
    return rows.to(table.dtype)


def adapt(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[str],
    *,
    oov_init: str = "mean",
    exact_match: bool = True,
    token_type: Optional[str] = None,
    seed: int = 0,
) -> Mapping:
    """Replace the tables of ``model`` in place by tables over the ASR ``tokens``.

    Args:
        model: A causal LM with its own tables.
        tokenizer: Its tokenizer.
        tokens: ASR token list (V).
        oov_init: One of :data:`OOV_INITS`, for tokens without exact match.
        exact_match: See :func:`map_tokens`.
        token_type: See :func:`map_tokens`.
        seed: For ``random``.

    Returns:
        What was found for every token.
    """
    if oov_init not in OOV_INITS:
        raise UserError(f"unknown oov_init {oov_init!r}; expected one of {', '.join(OOV_INITS)}.")
    vocabulary = SubwordVocabulary(tokenizer)
    mapping = map_tokens(tokens, vocabulary, token_type=token_type, exact_match=exact_match)
    bos, eos, unk = special_rows(tokenizer, model.config)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    size = inputs.weight.shape[0]
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and module.num_embeddings == size
        and module is not inputs
    ]
    highest = max([bos, eos, *(i for source in mapping.sources for i in source)])
    if highest >= size:
        raise UserError(
            f"the LLM's tokenizer has token {highest}, its embedding only {size} rows; tokenizer "
            "and model do not belong together."
        )
    if others:
        raise UserError(
            f"{type(model).__name__} has further tables over its vocabulary ({', '.join(others)}); "
            "vocabulary adaptation knows one input and one output table only."
        )
    tied = outputs is not None and outputs.weight.data_ptr() == inputs.weight.data_ptr()

    def make(table: torch.Tensor, sos_eos: int) -> torch.Tensor:
        # The same numbers for input and output of one token would tie them by accident, so the
        # generator runs on; within one table the seed decides.
        return new_rows(
            table.detach().cpu(),
            mapping,
            vocabulary,
            sos_eos=sos_eos,
            unk=unk,
            oov_init=oov_init,
            generator=generator,
        )

    generator = torch.Generator().manual_seed(seed)
    new_input = make(inputs.weight, bos)
    new_output = None if tied else make(outputs.weight, eos)
    bias = getattr(outputs, "bias", None)
    new_bias = None if bias is None else make(bias, bos if tied else eos)

    model.resize_token_embeddings(len(tokens), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new_input)
        if new_output is not None:
            model.get_output_embeddings().weight.copy_(new_output)
        if new_bias is not None:
            new_bias[0] = _BLANK_BIAS
            model.get_output_embeddings().bias.copy_(new_bias)
    return mapping
