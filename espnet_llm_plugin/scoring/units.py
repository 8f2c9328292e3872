"""Scoring units: transcripts as words, characters or sub-words, exactly as ESPnet's asr.sh does.

ESPnet's own tokenizers are used, so that ``ref.trn`` and ``hyp.trn`` equal those of its stage 13.
"""

from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Optional

from espnet_llm_plugin.errors import UserError

WER, CER, TER = "wer", "cer", "ter"

Tokenizer = Callable[[str], list[str]]


def build_tokenizers(
    bpemodel: Optional[str] = None, non_linguistic_symbols: Optional[str] = None
) -> dict[str, Tokenizer]:
    """Make the tokenizer of each error rate.

    Args:
        bpemodel: SentencePiece model; without it there is no token error rate (as in ESPnet).
        non_linguistic_symbols: File of symbols, one a line, that do not count as words or
            characters (they do count as tokens).

    Returns:
        ``wer``, ``cer`` and, with ``bpemodel``, ``ter``: functions from text to tokens. A space
        between words is the character ``<space>``.
    """
    from espnet2.text.char_tokenizer import CharTokenizer
    from espnet2.text.word_tokenizer import WordTokenizer

    if non_linguistic_symbols is not None and not Path(non_linguistic_symbols).is_file():
        raise UserError(f"--non_linguistic_symbols {non_linguistic_symbols}: no such file")
    options = dict(
        non_linguistic_symbols=non_linguistic_symbols, remove_non_linguistic_symbols=True
    )
    tokenizers = {
        WER: WordTokenizer(**options).text2tokens,
        CER: CharTokenizer(**options).text2tokens,
    }
    if bpemodel is not None:
        tokenizers[TER] = _piece_tokenizer(bpemodel)
    return tokenizers


def _piece_tokenizer(bpemodel: str) -> Tokenizer:
    from espnet2.text.sentencepiece_tokenizer import SentencepiecesTokenizer

    if not Path(bpemodel).is_file():
        raise UserError(f"--bpemodel {bpemodel}: no such file")
    tokenize = SentencepiecesTokenizer(bpemodel).text2tokens
    try:
        tokenize("a")
    except (OSError, RuntimeError) as error:
        raise UserError(f"--bpemodel {bpemodel} is not a SentencePiece model") from error
    return tokenize


def unknown_tokens(
    texts: Iterable[str],
    token_list: str,
    token_type: str,
    bpemodel: Optional[str] = None,
    non_linguistic_symbols: Optional[str] = None,
) -> tuple[Counter, int]:
    """Count the tokens that a model with this token list can never recognise.

    Args:
        texts: Transcripts.
        token_list: File of tokens, one a line.
        token_type: How the model cuts text into tokens: one of ``token_list.TOKEN_TYPES``.
        bpemodel: SentencePiece model of ``bpe``.
        non_linguistic_symbols: File of symbols that stay whole.

    Returns:
        How often each unknown token occurs, and the number of all tokens.
    """
    from espnet2.text.char_tokenizer import CharTokenizer

    path = Path(token_list)
    if not path.is_file():
        raise UserError(f"--token_list {token_list}: no such file")
    known = set(path.read_text(encoding="utf-8").split("\n"))
    if token_type == "bpe":
        if bpemodel is None:
            raise UserError("--token_type bpe needs --bpemodel")
        tokenize = _piece_tokenizer(bpemodel)
    elif token_type == "char":
        tokenize = CharTokenizer(non_linguistic_symbols).text2tokens
    else:
        tokenize = str.split
    tokens = Counter(token for text in texts for token in tokenize(text))
    unknown = Counter({token: number for token, number in tokens.items() if token not in known})
    return unknown, tokens.total()
