"""An LLM's own vocabulary as an ASR token list (``token_type: hugging_face``): token id = LLM row.

R: rows of the LLM's tables, often more than its tokenizer has tokens.
"""

from pathlib import Path
from typing import Any, Sequence, Union

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import load_config, resolve_llm
from espnet_llm_plugin.llm.directory import TOKENS_FILE


def native_token_list(llm: Union[str, Path]) -> list[str]:
    """The R tokens of an LLM in the order of their ids, fit for ESPnet's token list files.

    White space and unprintable characters, which a line of a file cannot hold, are written as
    ``<U+000A>``; rows without a token as ``<unused_R>``.

    Args:
        llm: Directory or hub id of an LLM with its own tokenizer.

    Raises:
        UserError: No tokenizer, a tokenizer of another model, or an LLM that is adapted already.
    """
    directory = resolve_llm(llm)
    if (directory / TOKENS_FILE).is_file():
        raise UserError(
            f"LLM {llm} is adapted to an ASR token list ({TOKENS_FILE}); use that list with its "
            "own token type instead of token_type hugging_face."
        )
    rows = int(load_config(directory).get_text_config().vocab_size)
    tokenizer = load_tokenizer(directory)
    check_rows(tokenizer, rows, str(llm))
    return [*_visible(tokenizer), *(f"<unused_{i}>" for i in range(len(tokenizer), rows))]


def check_rows(tokenizer: Any, rows: int, llm: str) -> None:
    """Refuse a tokenizer with more tokens than the LLM has rows."""
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of LLM {llm} has {len(tokenizer)} tokens, its embedding only {rows} "
            "rows; tokenizer and model do not belong together."
        )


def check_native_token_list(
    tokenizer: Any, rows: int, token_list: Sequence[str], llm: str, needed: Sequence[int]
) -> None:
    """Check that an ASR token list is the LLM's own, in whole or from its beginning.

    ESPnet's own ``hugging_face_export_vocabulary`` writes the tokens as they are and may leave out
    the last ones; both is accepted here.

    Args:
        tokenizer: The LLM's.
        rows: R.
        token_list: V <= R tokens.
        llm: Its name, for the message.
        needed: Ids that must be in the list, such as that of EOS.

    Raises:
        UserError: It is another list.
    """
    remedy = (
        f"make it by `python -m espnet_llm_plugin.bin.make_token_list --token_type hugging_face "
        f"--llm {llm}`, or adapt the LLM to the list by `... .bin.adapt_vocabulary`."
    )
    if not max(needed) < len(token_list) <= rows:
        raise UserError(
            f"the token list has {len(token_list)} tokens, LLM {llm} has {rows} rows and needs "
            f"those up to {max(needed)}: the list is not this LLM's; {remedy}"
        )
    raw = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for i, (found, token, shown) in enumerate(zip(token_list, raw, _visible(tokenizer))):
        if found not in (shown, (token or "").rstrip()):
            raise UserError(
                f"token {i} of the token list is {found!r}, that of LLM {llm} is {shown!r}: the "
                f"list is not this LLM's; {remedy}"
            )


def _visible(tokenizer: Any) -> list[str]:
    seen: set[str] = set()
    shown = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        text = "".join(
            c if c.isprintable() and not c.isspace() else f"<U+{ord(c):04X}>" for c in token or ""
        )
        text = text or f"<unused_{i}>"
        if text in seen:
            text += f"<{i}>"
        seen.add(text)
        shown.append(text)
    return shown
