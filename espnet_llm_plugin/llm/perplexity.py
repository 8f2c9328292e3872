"""Word-level perplexity of a text under a causal LM, comparable across vocabularies.

B: sentences in a batch, L: tokens of the longest, V: vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.sequence_scores import length_sorted_batches, sequence_log_probs
from espnet_llm_plugin.token_list import SOS_EOS, SPACE, UNK, guess_token_type


@dataclass
class TextScore:
    """Log-probability of a text.

    Attributes:
        log_prob: Sum over all text tokens, natural logarithm; ends of sentences do not count.
        tokens: Text tokens.
        words: Words separated by white space.
    """

    log_prob: float
    tokens: int
    words: int

    @property
    def word_perplexity(self) -> float:
        """exp(-log_prob / words)."""
        return math.exp(min(700.0, -self.log_prob / max(1, self.words)))

    @property
    def token_perplexity(self) -> float:
        """exp(-log_prob / tokens)."""
        return math.exp(min(700.0, -self.log_prob / max(1, self.tokens)))


@torch.no_grad()
def score_text(
    model: Any,
    sentences: Sequence[Sequence[int]],
    words: int,
    *,
    bos: int,
    blank: Optional[int] = None,
    batch_size: int = 16,
) -> TextScore:
    """Sum log P(tokens | BOS) over sentences.

    The end of a sentence is left out: native and adapted LLM know different ones, and the text is
    the same without it.

    Args:
        model: Causal LM.
        sentences: Token ids without BOS and EOS.
        words: Number of words of the text.
        bos: Id that every sentence begins with.
        blank: Id that is never text, masked before the softmax.
        batch_size: B.
    """
    model.eval()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits.float()
        if blank is not None:
            logits[..., blank] = -torch.inf
        return logits

    rows = [[bos, *ids] for ids in sentences if len(ids)]
    total = 0.0
    vocab_size = model.config.get_text_config().vocab_size
    for batch in length_sorted_batches([len(row) for row in rows], vocab_size, batch_size):
        some = [rows[i] for i in batch]
        total += sum(sequence_log_probs(forward, some, device=model.device))
    return TextScore(total, sum(map(len, rows)) - len(rows), words)


def read_text(
    path: Union[str, Path], *, has_ids: bool = False, max_lines: Optional[int] = None
) -> list[str]:
    """Sentences of a text file, one a line, empty lines left out.

    Args:
        path: UTF-8 file.
        has_ids: Kaldi's form: the first field of a line is the utterance id.
        max_lines: Read so many sentences at most.

    Raises:
        UserError: Unreadable or empty.
    """
    lines: list[str] = []
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                fields = line.split()[1 if has_ids else 0 :]
                if fields:
                    lines.append(" ".join(fields))
                if max_lines is not None and len(lines) >= max_lines:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {path} cannot be read ({error}).") from None
    if not lines:
        raise UserError(f"text {path} has no sentences; expected one a line.")
    return lines


def asr_tokenizer(
    tokens: Sequence[str], token_type: str, bpemodel: Optional[Union[str, Path]]
) -> Callable[[str], list[int]]:
    """The tokenisation of the ASR model: text to token ids, unknown tokens to ``<unk>``."""
    from espnet_llm_plugin.llm.tokenizer import load_sentencepiece

    if token_type == "hugging_face":
        from espnet_llm_plugin.llm.adaptation import load_tokenizer
        from espnet_llm_plugin.llm.backbone import resolve_llm

        if bpemodel is None:
            raise UserError("the tokens are an LLM's own; give it as --bpemodel.")
        native = load_tokenizer(resolve_llm(bpemodel))
        return lambda text: native(text, add_special_tokens=False)["input_ids"]
    index = {token: i for i, token in enumerate(tokens)}
    unk = index[UNK]
    if token_type == "bpe":
        if bpemodel is None:
            raise UserError(
                "the token list holds sentencepiece pieces; give --bpemodel to tokenise text with."
            )
        processor = load_sentencepiece(bpemodel)
        return lambda text: [index.get(p, unk) for p in processor.encode(text, out_type=str)]
    if token_type == "char":
        return lambda text: [index.get(SPACE if c == " " else c, unk) for c in text]
    return lambda text: [index.get(word, unk) for word in text.split()]


def adapted_tokenizer(llm_dir: Union[str, Path]) -> tuple[Callable[[str], list[int]], list[str]]:
    """The tokenisation of an LLM whose rows are the tokens of an ASR list, and those tokens.

    Args:
        llm_dir: Directory as ``adapt_vocabulary`` and ``export_llm`` write it.

    Raises:
        UserError: Not such a directory.
    """
    from espnet_llm_plugin.llm.directory import BPE_FILE, llm_tokens

    tokens = llm_tokens(llm_dir)
    bpemodel = Path(llm_dir) / BPE_FILE
    pieces = bpemodel if bpemodel.is_file() else None
    return asr_tokenizer(tokens, guess_token_type(tokens), pieces), tokens


def score_adapted(llm_dir: Union[str, Path], sentences: Sequence[str]) -> TextScore:
    """Score sentences under an LLM whose rows are the tokens of an ASR token list.

    Args:
        llm_dir: Directory as ``adapt_vocabulary`` and ``export_llm`` write it.
        sentences: Words separated by spaces.

    Raises:
        UserError: Not such a directory.
    """
    from espnet_llm_plugin.llm.backbone import load_causal_lm

    encode, tokens = adapted_tokenizer(llm_dir)
    return score_text(
        load_causal_lm(llm_dir),
        [encode(sentence) for sentence in sentences],
        sum(len(sentence.split()) for sentence in sentences),
        bos=tokens.index(SOS_EOS),
        blank=0,
    )


def score_llm(llm: Union[str, Path], sentences: Sequence[str]) -> TextScore:
    """Score sentences under an LLM in the tokens it has, its own or those of an ASR list.

    Args:
        llm: Directory or hub id.
        sentences: Words separated by spaces.

    Raises:
        UserError: No LLM, or no tokenizer.
    """
    from espnet_llm_plugin.llm.adaptation import load_tokenizer
    from espnet_llm_plugin.llm.backbone import load_causal_lm, quiet_transformers, resolve_llm
    from espnet_llm_plugin.llm.own_tokens import has_own_tokens
    from espnet_llm_plugin.llm.vocabulary import special_rows

    if not has_own_tokens(llm):
        return score_adapted(llm, sentences)
    tokenizer = load_tokenizer(resolve_llm(llm))
    model = load_causal_lm(llm)
    with quiet_transformers():  # it warns of sentences longer than the model
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sentences]
    words = sum(len(sentence.split()) for sentence in sentences)
    return score_text(model, ids, words, bos=special_rows(tokenizer, model.config)[0])
