"""How many tokens an LLM can see, and what it sees of a text that is longer.

A text that has filled the LLM's context of C tokens is cut before it is extended: what the LLM
sees of it from then on is its first token and the last C // 2 - 1 others, at the positions of a
text of that length. Where a text is cut depends on its length alone, so its scores depend on
nothing but its tokens, however a search came to it.
"""

from typing import Any, Optional


def context_of(model: Any) -> Optional[int]:
    """Tokens that an LLM can see; ``None``: any number (state-space models, ALiBi).

    That is how many positions it has learned (GPT-2, OPT: beyond it cannot go), or how far the
    training of its relative positions went (Llama: beyond, its predictions get worse and worse).
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def kept(context: int) -> int:
    """Tokens that are left of a full context, the first included."""
    return max(context // 2, 1)


def context_windows(length: int, context: Optional[int]) -> list[tuple[int, int, int]]:
    """What an LLM sees at each of ``length`` tokens, as :class:`PrefixLM` cuts prefixes.

    Returns:
        (skipped, begin, end): at tokens [begin, end) it sees the first token and those from
        1 + skipped on.
    """
    windows = [(0, 0, length if context is None else min(length, context))]
    while windows[-1][2] < length:
        skipped, _, begin = windows[-1]
        skipped += context - kept(context)
        windows.append((skipped, begin, min(length, skipped + context)))
    return windows
