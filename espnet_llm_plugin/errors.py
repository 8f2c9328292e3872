"""Errors a user can mend, and how the command lines show them."""

import sys
from typing import Callable, NoReturn, Optional, Sequence


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do."""


class UtteranceError(UserError):
    """One utterance cannot be processed; nothing is wrong with the others."""


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type's name if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_cli(main: Callable[[Optional[Sequence[str]]], Optional[int]]) -> NoReturn:
    """Run a command line's ``main`` and exit; a :class:`UserError` becomes one line on stderr.

    Exit codes: 0 success (or what ``main`` returns), 2 for a :class:`UserError`.
    """
    try:
        sys.exit(main(None) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
