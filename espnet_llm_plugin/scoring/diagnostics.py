"""What kind of errors: by length, by word, and for words of interest."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.alignment import CORRECT, DELETION, INSERTION, SUBSTITUTION, pairs
from espnet_llm_plugin.scoring.hallucination import Hallucination, named_values
from espnet_llm_plugin.scoring.report import percentage_cells, round_half_up
from espnet_llm_plugin.scoring.table import plain
from espnet_llm_plugin.scoring.wer import Scored, Summary, fold_case

# Reference lengths in words: up to 5, 6 to 10, ... An utterance of no word counts as short.
LENGTHS = (5, 10, 15, 20, 30)
TOP = 10


def by_length(scored: Scored) -> dict[str, Summary]:
    """Sums over the utterances of similar reference length; only lengths that occur.

    Deletions that grow with the length point at lost sentence ends, insertions at loops.
    """
    edges = [0, *LENGTHS]
    names = [f"{low + 1}-{high}" for low, high in zip(edges, LENGTHS)] + [f"{LENGTHS[-1] + 1}-"]
    buckets: dict[str, list[int]] = {name: [] for name in names}
    for row, words in enumerate(scored.words):
        buckets[names[sum(words > high for high in LENGTHS)]].append(row)
    return {name: scored.summary(rows) for name, rows in buckets.items() if rows}


def length_ratio(scored: Scored) -> float:
    """Words of all hypotheses over words of all references."""
    return sum(map(len, scored.hypotheses)) / sum(map(len, scored.references))


def confusions(scored: Scored) -> dict[str, Counter]:
    """Count substituted pairs ``(reference, hypothesis)``, deleted and inserted words."""
    tables: dict[str, Counter] = {kind: Counter() for kind in (SUBSTITUTION, DELETION, INSERTION)}
    for steps, ref, hyp in zip(scored.steps, scored.references, scored.hypotheses):
        for kind, left, right in pairs(steps, ref, hyp):
            if kind == SUBSTITUTION:
                tables[kind][left, right] += 1
            elif kind != CORRECT:
                tables[kind][left or right] += 1
    return tables


@dataclass(frozen=True)
class WordGroup:
    """How one group of words (e.g. homophones of each other) was recognised."""

    words: tuple[str, ...]
    reference: int  # occurrences in the references
    hypothesis: int  # occurrences in the hypotheses
    correct: int
    within: int  # one word of the group recognised as another of the group

    @property
    def recall(self) -> Optional[float]:
        """Per cent of the references' words that were recognised; None if there are none."""
        return 100 * self.correct / self.reference if self.reference else None

    @property
    def precision(self) -> Optional[float]:
        """Per cent of the hypotheses' words that are right; None if there are none."""
        return 100 * self.correct / self.hypothesis if self.hypothesis else None


def read_word_groups(path: Union[str, Path]) -> list[tuple[str, ...]]:
    """Read groups of words, one group a line, e.g. ``there their they're``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--words {path}: no such file")
    groups = [tuple(line.split()) for line in path.read_text(encoding="utf-8").split("\n")]
    groups = [group for group in groups if group]
    if not groups:
        raise UserError(f"--words {path}: no word in it")
    seen = Counter(word for group in groups for word in set(group))
    double = [word for word, number in seen.items() if number > 1]
    if double:
        raise UserError(f"--words {path}: {double[0]} is in more than one line")
    return groups


def word_groups(scored: Scored, groups: list[tuple[str, ...]]) -> list[WordGroup]:
    """Count how the words of each group were recognised."""
    group_of = {
        word: number
        for number, group in enumerate(groups)
        for word in fold_case(group, scored.case_sensitive)
    }
    counts = [[0, 0, 0, 0] for _ in groups]
    for steps, ref, hyp in zip(scored.steps, scored.references, scored.hypotheses):
        for kind, left, right in pairs(steps, ref, hyp):
            wanted, found = group_of.get(left), group_of.get(right)
            if wanted is not None:
                counts[wanted][0] += 1
                counts[wanted][2] += kind == CORRECT
                counts[wanted][3] += kind == SUBSTITUTION and wanted == found
            if found is not None:
                counts[found][1] += 1
    return [WordGroup(group, *numbers) for group, numbers in zip(groups, counts)]


def total_group(groups: list[WordGroup]) -> WordGroup:
    """The sum over all groups; ``within`` still means within one group."""
    sums = (
        sum(getattr(g, f) for g in groups) for f in ("reference", "hypothesis", "correct", "within")
    )
    return WordGroup(tuple(word for group in groups for word in group.words), *sums)


def diagnostics_text(
    scored: Scored,
    groups: Optional[list[WordGroup]] = None,
    signs: Optional[Hallucination] = None,
) -> str:
    """A page for the reader: errors by length and kind, hallucination, words of interest."""
    header = ["ref. words", "Snt", "Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err"]
    rows = [[name, *percentage_cells(summary)] for name, summary in by_length(scored).items()]
    text = [
        "Errors by length of the reference (per cent)\n" + plain(header, rows),
        f"hypothesis / reference words: {length_ratio(scored):.3f}\n",
    ]
    names = {SUBSTITUTION: "substitutions", DELETION: "deletions", INSERTION: "insertions"}
    for kind, table in confusions(scored).items():
        # Equal numbers in alphabetical order, so that the page is the same each time.
        top = sorted(table.items(), key=lambda item: (-item[1], item[0]))[:TOP]
        lines = [
            f"{number:5d}  {' -> '.join(words) if kind == SUBSTITUTION else words}\n"
            for words, number in top
        ]
        text.append(f"Most frequent {names[kind]} ({table.total()} in all)\n{''.join(lines)}")
    if signs is not None:
        lines = [f"{name:<46}  {value}\n" for name, value in named_values(signs)]
        lines += [
            f"{utterance} says {copies:g} times: {phrase}\n"
            for utterance, phrase, copies in signs.examples
        ]
        text.append(f"Signs of hallucination\n{''.join(lines)}")
    if groups:
        header = ["words", "ref", "hyp", "correct", "within", "recall %", "precision %"]
        rows = [_group_cells(" ".join(group.words), group) for group in groups]
        rows.append(_group_cells("all", total_group(groups)))
        text.append("Words of interest\n" + plain(header, rows))
    return "\n".join(text)


def _group_cells(name: str, group: WordGroup) -> list[str]:
    shares = (
        "-" if share is None else round_half_up(share) for share in (group.recall, group.precision)
    )
    numbers = (group.reference, group.hypothesis, group.correct, group.within)
    return [name, *map(str, numbers), *shares]
