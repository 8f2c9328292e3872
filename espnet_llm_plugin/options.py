"""Refuse misspelt configuration keys with a message that names the valid ones."""

import inspect
from typing import Any, Callable, Mapping

from espnet_llm_plugin.errors import UserError


def valid_options(target: Callable, reserved: tuple[str, ...] = ()) -> list[str]:
    """Keyword arguments of ``target`` that a configuration may set."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in named and name not in reserved
    ]


def refuse_unknown(
    where: str, given: Mapping[str, Any], target: Callable, reserved: tuple[str, ...] = ()
) -> None:
    """Raise :class:`UserError` if ``given`` has keys that ``target`` does not take.

    ``where`` is the configuration key that holds the options, ``reserved`` are the arguments
    that the program itself passes.
    """
    valid = valid_options(target, reserved)
    unknown = sorted(set(given) - set(valid))
    if unknown:
        raise UserError(
            f"{where}: unknown option{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; "
            f"valid options: {', '.join(valid) or 'none'}"
        )
