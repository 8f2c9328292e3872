"""What can be wrong with data, collected so that one message names all of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from espnet_llm_plugin.errors import UserError

EXAMPLES = 10


@dataclass(frozen=True)
class Problem:
    """One fault of one utterance (or of one line, where the line names no utterance).

    Args:
        kind: Faults of the same kind are reported together.
        key: Utterance or recording id; ``""`` when the line has none.
        detail: File, line number, value: whatever helps to find it.
    """

    kind: str
    key: str
    detail: str = ""

    def __str__(self) -> str:
        if self.key and self.detail:
            return f"{self.key} ({self.detail})"
        return self.key or self.detail


@dataclass
class Problems:
    """Faults found so far in ``source`` (a directory or file, named in the message)."""

    source: str
    found: list[Problem] = field(default_factory=list)

    def add(self, kind: str, key: str, detail: str = "") -> None:
        """Note a fault."""
        self.found.append(Problem(kind, key, detail))

    @property
    def keys(self) -> set[str]:
        """Ids with at least one fault."""
        return {problem.key for problem in self.found}

    def message(self) -> str:
        """Every kind of fault with its count and the first ten cases."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.found:
            kinds.setdefault(problem.kind, []).append(problem)
        lines = [f"{self.source}: {len(self.found)} problem(s)"]
        for kind, cases in kinds.items():
            names = ", ".join(str(case) for case in cases[:EXAMPLES])
            more = f", ... and {len(cases) - EXAMPLES} more" if len(cases) > EXAMPLES else ""
            lines.append(f"  {kind} ({len(cases)}): {names}{more}")
        return "\n".join(lines)

    def check(self, advice: str) -> None:
        """Raise a :class:`UserError` with :meth:`message` and ``advice`` if anything was found."""
        if self.found:
            raise UserError(f"{self.message()}\n{advice}")


def listing(problems: Iterable[Problem]) -> str:
    """One line a fault, ``<id> <kind>: <detail>``, for files that list what was dropped."""
    rows = [f"{p.key or '-'} {p.kind}" + (f": {p.detail}" if p.detail else "") for p in problems]
    return "".join(row.replace("\n", " ") + "\n" for row in rows)
