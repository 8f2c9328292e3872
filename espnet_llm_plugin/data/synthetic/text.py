"""English sentences from a probabilistic grammar in which long context decides.

Every utterance has a topic, people, numbers and places. Its first clause shows the topic and
introduces the entities; its second clause speaks about a *homophone* of that topic ("flour" after a
baker, "flower" after a gardener) and comes back to the entities. The words next to the homophone
are drawn independently of the topic, so neither a bigram nor the sound decides the spelling.
Names, numbers and towns return ("... lona met davin ... but lona ..."), pronouns agree with the
gender and verbs with the number of a noun some words before.

The probability of a derivation is known, which bounds the entropy of the language from above.
"""

import math
import random
import re
from bisect import bisect
from itertools import accumulate
from typing import Generic, NamedTuple, Optional, Sequence, TypeVar

from espnet_llm_plugin.data.synthetic import lexicon

T = TypeVar("T")

MIN_WORDS = 7
MAX_WORDS = 16
RARE_NAME_PROBABILITY = 0.06


class Weighted(Generic[T]):
    """A finite distribution."""

    def __init__(self, items: Sequence[T], weights: Sequence[float]):
        total = sum(weights)
        self.items = list(items)
        self.log_probs = [math.log(weight / total) for weight in weights]
        self._cumulative = list(accumulate(weight / total for weight in weights))

    def draw(self, rng: random.Random) -> int:
        """Index of a random item. Only ``rng.random()``, whose sequence Python guarantees."""
        return min(bisect(self._cumulative, rng.random()), len(self.items) - 1)


def zipf(items: Sequence[T], offset: float = 3.0) -> Weighted[T]:
    """Weights 1 / (rank + offset): the Zipf-Mandelbrot law with exponent 1."""
    return Weighted(items, [1.0 / (rank + offset) for rank in range(len(items))])


class Sentence(NamedTuple):
    """One utterance."""

    text: str
    # Natural logarithm of the derivation's probability (<= that of the text); None if unknown.
    log_prob: Optional[float]
    topic: str


class _Clause(NamedTuple):
    parts: list[str]
    weight: float
    kind: str
    entities: frozenset[str]


# Slots that name an entity: drawn at the first use, the same word afterwards.
_ENTITIES = ("X", "Y", "role", "roles", "place", "town", "num", "day", "their", "rhis")
# A second clause may use a word only if the first one introduced its entity.
_REFERS = {"he": "X", "him": "X", "they": "their", "them": "their", "rhe": "rhis"}

# Rows: weight, kind (a second clause continues a first one of its kind), template, and entities
# that the clause introduces besides its slots (_FIRST) or may introduce itself (_SECOND).
_FIRST = [
    (4, "main", "{X} the {role} {got} the {thing}", ""),
    (3, "main", "{X} met {Y} near the {place}", "their"),
    (2, "main", "the {role} lost {rhis} {thing}", ""),
    (2, "main", "the {role} left {rhis} {thing} at the {place}", ""),
    (3, "main", "{num} {roles} came to the {place} from {town}", "their"),
    (2, "main", "the {role} sold {num} {things} to {X}", ""),
    (2, "main", "{X} carried {num} {things} to the {place}", ""),
    (2, "main", "{X} and {Y} {got} the {thing}", "their"),
    (3, "main", "{X} drove from {town} to the {place}", ""),
    (1, "main", "nobody at the {place} knew {X}", ""),
    (2, "main", "{X} stayed at the {place} with {Y} until {day}", "their"),
    (2, "main", "the {role} told {X} to bring the {thing}", ""),
    (1, "main", "there were {num} {things} in the {place} when {X} came", ""),
    (2, "main", "on {day} the {roles} {got} the {thing}", "their"),
    (2, "main", "{X} rode to {town} to buy a {adj} {thing}", ""),
    (1, "main", "the {role} would not sell {X} the {adj} {thing}", ""),
    (3, "sub", "after {X} {got} the {adj} {thing}", ""),
    (3, "sub", "when {X} was a {role} in {town}", ""),
    (2, "sub", "because {X} had no {thing} for the {role}", ""),
    (2, "sub", "while {X} and {Y} worked at the {place}", "their"),
    (1, "sub", "before the {place} in {town} was {adj}", ""),
    (2, "if", "if the {role} from {town} calls {X}", ""),
    (2, "if", "as soon as {X} gets to the {place} in {town}", ""),
    (2, "sg", "the {role} near the {place} in {town}", ""),
    (2, "sg", "the {role} with the {num} {adj} {things}", ""),
    (1, "sg", "the {role} who sold {X} the {thing}", ""),
    (2, "pl", "the {roles} near the {place} in {town}", "their"),
    (2, "pl", "the {roles} with the {adj} {thing}", "their"),
    (1, "pl", "the {num} {roles} who met {X}", "their"),
    (4, "short", "{X} the {role}", ""),
    (3, "short", "the {role} from {town}", ""),
    (3, "short", "at the {place} {X}", ""),
    (2, "late", "{X} {mentioned} the {word} when {he} met", ""),
    (2, "late", "{N} {mentioned} the {word} and the {word} of", ""),
]
_SECOND = [
    (2, "main", "and later {he} {mentioned} the {word}{time}", ""),
    (4, "main", "but only {X} {mentioned} the {word}{time}", ""),
    (5, "main", "so {X} {mentioned} the {word}{time}", ""),
    (5, "main", "and then went back to {town} for the {word}", ""),
    (5, "main", "but {Y} {mentioned} the {word} before {X}", ""),
    (4, "main", "and nobody but {X} {mentioned} the {word}", ""),
    (6, "main", "and {Y} told {X} about the {word}{time}", ""),
    (3, "main", "but {rhe} {mentioned} the {word}{time}", ""),
    (2, "main", "so {rhe} never {mentioned} the {word}{time}", ""),
    (2, "main", "and a {adj} {thing} and then {rhe} {mentioned} the {word}", ""),
    (3, "main", "and they {mentioned} the {word}{time}", ""),
    (2, "main", "and {N} {mentioned} their {word}{time}", ""),
    (3, "main", "but before {day} {he} {mentioned} the {word}", ""),
    (3, "main", "and the same {day} they {mentioned} the {word}", ""),
    (2, "main", "but the {role} {mentioned} the {word} without {him}", ""),
    (2, "main", "and the {role} gave {him} the {word}{time}", ""),
    (4, "main", "and everyone in {town} {mentioned} the {word}", ""),
    (2, "main", "then {he} left with the {word} and the {word}", ""),
    (3, "main", "but {num} were not enough for the {word}", ""),
    (3, "main", "and all {num} of {them} {mentioned} the {word}", ""),
    (2, "main", "and {num} more for {N} who {mentioned} the {word}", ""),
    (1, "main", "while {N} {mentioned} the {word}{time}", ""),
    (2, "sub", "{he} {mentioned} the {word}{time}", ""),
    (3, "sub", "{N} {mentioned} the {word} for {him}", ""),
    (5, "sub", "{X} {mentioned} the {word} and not the {word}", ""),
    (4, "sub", "nobody in {town} {mentioned} the {word}{time}", ""),
    (2, "sub", "the {role} {mentioned} the {word} with {him}", ""),
    (2, "sub", "they {mentioned} their {word}{time}", ""),
    (5, "sub", "{Y} {mentioned} the {word} but {X} did not", ""),
    (2, "if", "{he} must {mention} the {word}{time}", ""),
    (4, "if", "then {X} will {mention} the {word}{time}", ""),
    (4, "if", "everyone in {town} will {mention} the {word}", ""),
    (1, "if", "tell {him} that {N} {mentions} the {word}", ""),
    (3, "sg", "{always} {mentions} the {word}{time}", ""),
    (2, "sg", "knows that {N} {mentioned} the {word}", ""),
    (2, "sg", "is {adj} but {mentions} the {word}{time}", ""),
    (3, "sg", "{mentions} the {word} whenever {X} is here", ""),
    (3, "sg", "{mentions} the {word} more than anyone in {town}", ""),
    (3, "pl", "{always} {mention} the {word}{time}", ""),
    (2, "pl", "know that {N} {mentioned} the {word}", ""),
    (2, "pl", "are {adj} but {mention} their {word}{time}", ""),
    (3, "pl", "{mention} their {word} whenever {X} is here", ""),
    (3, "pl", "{mention} the {word} more than anyone in {town}", ""),
    (3, "short", "{mentioned} the {word} and the {word}{time}", ""),
    (2, "short", "{mentioned} the {thing} but not the {word}", ""),
    (1, "short", "{mentioned} the {word}{time}", ""),
    (2, "short", "and {N} {mentioned} the {word}{time}", ""),
    (2, "late", "the {role}{time}", "role"),
    (2, "late", "the {roles} in {town}", "roles town"),
    (1, "late", "the {adj} {role}", "role"),
]


def _clause(weight: float, kind: str, template: str) -> _Clause:
    parts = re.findall(r"\{\w+\}|[a-z']+", template)
    slots = {_REFERS.get(part[1:-1], part[1:-1]) for part in parts if part[0] == "{"}
    return _Clause(parts, weight, kind, frozenset(slots & set(_ENTITIES)))


def plural(noun: str) -> str:
    """Plural of a regular English noun.

    >>> [plural(noun) for noun in ("box", "essay", "treaty", "torch", "helmsman")]
    ['boxes', 'essays', 'treaties', 'torches', 'helmsmen']
    """
    if noun.endswith("man"):
        return noun[:-2] + "en"
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


class Grammar:
    """Generates :class:`Sentence` objects; the same ``seed`` (any string) gives the same ones."""

    def __init__(self, seed: str):
        self._rng = random.Random(seed)
        self._log_prob = 0.0
        seconds = [(_clause(*row[:3]), frozenset(row[3].split())) for row in _SECOND]
        pairs = []
        for *row, introduced in _FIRST:
            clause = _clause(*row)
            known = clause.entities | set(introduced.split())
            fitting = [
                second
                for second, new in seconds
                if second.kind == clause.kind and second.entities <= known | new
            ]
            pairs.append((clause, Weighted(fitting, [second.weight for second in fitting])))
        self._first = Weighted(pairs, [clause.weight for clause, _ in pairs])
        self._topics = Weighted(
            list(lexicon.TOPICS), [len(t.homophones) for t in lexicon.TOPICS.values()]
        )
        self._by_topic = {
            name: {
                "role": zipf(topic.roles),
                "place": zipf(topic.places),
                "thing": zipf(topic.things),
                "word": zipf(topic.homophones, offset=15.0),
            }
            for name, topic in lexicon.TOPICS.items()
        }
        # Male and female alternate in rank; the gender is drawn first.
        self._names = {
            "f": (zipf(lexicon.FEMALE, 6.0), zipf(lexicon.RARE_FEMALE, 30.0)),
            "m": (zipf(lexicon.MALE, 6.0), zipf(lexicon.RARE_MALE, 30.0)),
        }
        self._lists = {
            "got": zipf(lexicon.HANDLE),
            "adj": zipf(lexicon.ADJECTIVES),
            "num": zipf(lexicon.NUMBERS, 6.0),
            "day": zipf(lexicon.DAYS, 20.0),
            "town": zipf(lexicon.TOWNS, 6.0),
            "always": zipf(lexicon.ALWAYS),
        }
        self._verbs = zipf(lexicon.MENTION)
        self._times = zipf(lexicon.TIMES)
        self._leads = zipf(lexicon.LEADS)

    def _draw(self, options: Weighted[T]) -> T:
        index = options.draw(self._rng)
        self._log_prob += options.log_probs[index]
        return options.items[index]

    def _flip(self, probability: float) -> bool:
        outcome = self._rng.random() < probability
        self._log_prob += math.log(probability if outcome else 1.0 - probability)
        return outcome

    def _distinct(self, options: Weighted[str], used: set[str]) -> str:
        while True:  # rejection: the derivation's probability stays a lower bound
            item = self._draw(options)
            if item not in used:
                used.add(item)
                return item

    def _person(self, state: dict[str, str], used: set[str], slot: str) -> str:
        gender = "f" if self._flip(0.5) else "m"
        state[f"gender of {slot}"] = gender
        common, rare = self._names[gender]
        return self._distinct(rare if self._flip(RARE_NAME_PROBABILITY) else common, used)

    def _fill(self, slot: str, topic: str, state: dict[str, str], used: set[str]) -> str:
        by_topic = self._by_topic[topic]
        if slot in ("he", "him"):
            female = state["gender of X"] == "f"
            return {"he": ("he", "she"), "him": ("him", "her")}[slot][female]
        if slot == "rhe":
            return "she" if state["rhis"] == "her" else "he"
        if slot in ("they", "them", "their"):
            return slot
        if slot in state:
            return state[slot]
        if slot in ("X", "Y", "N"):
            value = self._person(state, used, slot)
        elif slot == "rhis":
            value = "her" if self._flip(0.5) else "his"
        elif slot == "roles":
            value = plural(self._draw(by_topic["role"]))
        elif slot == "things":
            return plural(self._distinct(by_topic["thing"], used))
        elif slot in ("thing", "word"):
            return self._distinct(by_topic[slot], used)
        elif slot in by_topic:
            value = self._draw(by_topic[slot])
        elif slot in ("mentioned", "mentions", "mention"):
            return self._draw(self._verbs)[("mentioned", "mentions", "mention").index(slot)]
        elif slot == "time":
            return self._draw(self._times) if self._flip(0.4) else ""
        else:
            value = self._draw(self._lists[slot])
        if slot in _ENTITIES:
            state[slot] = value
        return value

    def sentence(self) -> Sentence:
        """The next sentence: 7 to 16 words of ``[a-z']``."""
        while True:
            self._log_prob = 0.0
            topic = self._draw(self._topics)
            first, seconds = self._draw(self._first)
            parts = list(first.parts) + self._draw(seconds).parts
            state: dict[str, str] = {}
            used: set[str] = set()
            words = []
            if first.kind == "main" and first.parts[0] != "on" and self._flip(0.15):
                words.append(self._draw(self._leads))
            for part in parts:
                words.append(self._fill(part[1:-1], topic, state, used) if part[0] == "{" else part)
            text = _articles(" ".join(word for word in words if word))
            if MIN_WORDS <= text.count(" ") + 1 <= MAX_WORDS:
                return Sentence(text, self._log_prob, topic)


def _articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def generate(seed: str, count: int, seen: set[str]) -> list[Sentence]:
    """``count`` sentences that are not in ``seen``; adds them to ``seen``.

    Args:
        seed: Name of the random stream; the same name gives the same sentences.
        count: Number of sentences.
        seen: Texts never to be produced (the sets made before).
    """
    grammar = Grammar(seed)
    result = []
    while len(result) < count:
        sentence = grammar.sentence()
        if sentence.text not in seen:
            seen.add(sentence.text)
            result.append(sentence)
    return result


def spellings() -> dict[str, frozenset[str]]:
    """Every ambiguous spelling -> the set of spellings that sound like it, itself included."""
    return {word: frozenset(group) for group in lexicon.HOMOPHONES for word in group}
