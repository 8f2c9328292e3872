"""Errors of the file system as messages."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

from espnet_llm_plugin.errors import UserError


def explain(error: OSError, place: Union[str, Path]) -> str:
    """What went wrong while writing to ``place``, and that a second run continues."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else error.strerror
    return (
        f"cannot write {error.filename or place}: {reason}. What was finished is kept: mend this "
        "and run the same command again to continue"
    )


@contextmanager
def writing(place: Union[str, Path]) -> Iterator[None]:
    """Turn a full disk, a missing permission, ... inside the block into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(explain(error, place)) from error
