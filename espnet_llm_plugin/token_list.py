"""ESPnet's token lists: their special symbols, their form, their files.

V tokens, one a line: ``<blank>`` is 0, ``<unk>`` is 1, then text, and ``<sos/eos>`` is V-1.
"""

from pathlib import Path
from typing import Sequence, Union

from espnet_llm_plugin.errors import UserError

BLANK, UNK, SOS_EOS = "<blank>", "<unk>", "<sos/eos>"
SPACE = "<space>"  # the text token of a space in lists of characters
TOKEN_TYPES = ("bpe", "char", "word")


def read_token_list(path: Union[str, Path]) -> list[str]:
    """Read an ESPnet token list and check its form.

    Raises:
        UserError: Missing, not UTF-8, without ``<blank>`` first, ``<unk>`` second or ``<sos/eos>``
            last, or with a repeated token.
    """
    path = Path(path)
    try:
        # rstrip() without arguments, as ESPnet's tasks read it
        tokens = [line.rstrip() for line in path.open(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token list {path} cannot be read ({error}).") from None
    check_tokens(tokens, str(path))
    return tokens


def check_tokens(tokens: Sequence[str], name: str) -> None:
    """Check the form of a token list; ``name`` is for the message."""
    for index, expected in ((0, BLANK), (1, UNK), (-1, SOS_EOS)):
        if len(tokens) < 4 or tokens[index] != expected:
            found = repr(tokens[index]) if len(tokens) >= 4 else f"{len(tokens)} tokens"
            raise UserError(
                f"token list {name}: expected {BLANK} first, {UNK} second, text tokens, and "
                f"{SOS_EOS} last, as ESPnet writes it; found {found} in place of {expected}."
            )
    first_line: dict[str, int] = {}
    for line, token in enumerate(tokens, start=1):
        if token in first_line:
            raise UserError(
                f"token list {name}: token {token!r} is on line {first_line[token]} and again on "
                f"line {line}; every token must be there once."
            )
        first_line[token] = line


def guess_token_type(tokens: Sequence[str]) -> str:
    """``bpe`` if any token has a sentencepiece space, ``char`` if they are characters, or word."""
    text = [t for t in tokens if t not in (BLANK, UNK, SOS_EOS)]
    if any("\u2581" in t for t in text):
        return "bpe"
    if SPACE in text or all(len(t) == 1 for t in text):
        return "char"
    return "word"
