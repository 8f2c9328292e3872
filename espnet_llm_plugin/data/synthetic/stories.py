"""Plain utterances from running text, and disjoint sets of them.

A language model writes stories; a recogniser needs utterances of some seconds that can be read
aloud, and test sets that nothing else gives away.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from espnet_llm_plugin.errors import UserError

_ENDS = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": " ", "–": " ", "-": " "})
_DROPPED = re.compile(r"[.,;:!?\"()]")
_PLAIN = re.compile(r"[a-z]+(?:'[a-z]+)*(?: [a-z]+(?:'[a-z]+)*)*")
SETS = ("test", "dev", "train", "lm")  # test first: it does not change with the sizes of the others
_STUTTER = re.compile(r"\b(\S+)(?: \1){2}\b")


@dataclass(frozen=True)
class Limits:
    """What an utterance may be.

    Attributes:
        min_words: consecutive sentences of a story are joined to so many words at least.
        max_words: at most; a longer sentence is dropped.
        min_word_count: an utterance with a word that the whole text has less often is dropped: a
            small LM invents words, which have no spelling that could be heard.
        ngram: test and dev share no n-gram of so many words with any other story.
    """

    min_words: int = 9
    max_words: int = 20
    min_word_count: int = 3
    ngram: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(
                f"min_words {self.min_words} and max_words {self.max_words}: expected "
                "1 <= min_words <= max_words"
            )
        if self.ngram < 1:
            raise UserError(f"ngram must be at least 1, not {self.ngram}")


def plain(sentence: str) -> str:
    """Lower-case words of ``[a-z']`` without punctuation; empty if that is not possible.

    Digits, foreign letters, single quotes that are no apostrophes, and a word that comes three
    times in a row make a sentence unusable.
    """
    text = sentence.translate(_QUOTES).lower()
    text = " ".join(_DROPPED.sub(" ", text).split())
    return text if _PLAIN.fullmatch(text) and not _STUTTER.search(text) else ""


def utterances(story: str, complete: bool, limits: Limits) -> list[str]:
    """Consecutive plain sentences of a story, joined to ``min_words`` to ``max_words`` words.

    Args:
        story: Running text; a text without punctuation is one sentence.
        complete: Whether its last sentence is; else that is dropped.
        limits: See :class:`Limits`.
    """
    sentences = _ENDS.split(story.strip())
    if not complete:
        sentences = sentences[:-1]
    found: list[str] = []
    words: list[str] = []
    for sentence in sentences:
        own = plain(sentence).split()
        if not own or len(words) + len(own) > limits.max_words:
            words = []  # never join over a gap
        if 0 < len(own) <= limits.max_words:
            words = words + own
        if len(words) >= limits.min_words:
            found.append(" ".join(words))
            words = []
    return found


def _ngrams(utterance: str, size: int) -> set[tuple[str, ...]]:
    words = utterance.split()
    return {tuple(words[n : n + size]) for n in range(max(1, len(words) - size + 1))}


def split_stories(
    stories: Sequence[Sequence[str]], sizes: dict[str, int], limits: Limits
) -> dict[str, list[str]]:
    """Utterances of ``test``, ``dev``, ``train`` and ``lm``, each from stories of its own.

    Test and dev hold only utterances of which no n-gram (``limits.ngram`` words) occurs in any
    other story: they are somewhat rarer than the average. No utterance of train occurs twice.

    Args:
        stories: Their utterances.
        sizes: Number of utterances of each set.
        limits: See :class:`Limits`.

    Returns:
        The sets by name, shorter than asked for where the stories do not suffice.
    """
    counts = Counter(word for story in stories for one in story for word in one.split())
    kept = [
        [one for one in story if all(counts[w] >= limits.min_word_count for w in one.split())]
        for story in stories
    ]
    where: Counter = Counter()  # in how many stories an n-gram occurs
    for story in kept:
        where.update({gram for one in story for gram in _ngrams(one, limits.ngram)})
    spoken: set[str] = set()  # of train

    def fits(name: str, utterance: str) -> bool:
        if name == "lm":  # sentences return as often as the language has it
            return True
        if name == "train":
            fresh = utterance not in spoken
            spoken.add(utterance)
            return fresh
        return all(where[gram] == 1 for gram in _ngrams(utterance, limits.ngram))

    rest = iter(kept)
    result: dict[str, list[str]] = {}
    for name in SETS:
        chosen: list[str] = []
        while len(chosen) < sizes[name] and (story := next(rest, None)) is not None:
            chosen += [one for one in dict.fromkeys(story) if fits(name, one)]
        result[name] = chosen[: sizes[name]]
    return result
