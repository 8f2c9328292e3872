"""Plain utterances of stories, and sets of them that share nothing."""

import random

import pytest

from espnet_llm_plugin.data.synthetic.stories import (
    Limits,
    plain,
    split_stories,
    utterances,
)
from espnet_llm_plugin.errors import UserError


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ('"Look, Tom!" she said.', "look tom she said"),
        ("It’s Ben’s well-known  cat;", "it's ben's well known cat"),
        ("He had 3 cats.", ""),
        ("A café.", ""),
        ("'Yes' was the word", ""),
        ("no no no he said", ""),
        ("no no he said", "no no he said"),
        ("that that's that", "that that's that"),
        ("...", ""),
    ],
)
def test_plain(sentence, text):
    assert plain(sentence) == text


LIMITS = Limits(min_words=4, max_words=6, min_word_count=1, ngram=3)


def test_sentences_are_joined_to_utterances():
    story = 'Tom ran. "Come here," he said. They sat down and ate all of it. The end.\nBye now. Oh.'
    assert utterances(story, True, LIMITS) == ["tom ran come here he said", "the end bye now"]


def test_nothing_is_joined_over_a_gap():
    assert utterances("One two. He had 3 cats. Four five six.", True, LIMITS) == []
    assert utterances("One two. A b c d e f g. Three four.", True, LIMITS) == []
    assert utterances("One two three. Four five six seven.", True, LIMITS) == [
        "four five six seven"
    ]


def test_the_cut_end_of_a_story_is_dropped():
    assert utterances("One two three four. Five six seven ei", False, LIMITS) == [
        "one two three four"
    ]
    assert utterances("a story without any stop", False, LIMITS) == []
    assert utterances("a story without any stop", True, LIMITS) == ["a story without any stop"]


def ngrams(text, size):
    words = text.split()
    return {" ".join(words[n : n + size]) for n in range(max(1, len(words) - size + 1))}


@pytest.fixture(scope="module")
def stories():
    """Words of 12 letters at random: many utterances and n-grams return, some do not."""
    rng = random.Random(0)
    return [
        [" ".join(rng.choices("abcdefghijkl", k=rng.randint(4, 6))) for _ in range(4)]
        for _ in range(200)
    ]


SIZES = {"test": 20, "dev": 15, "train": 100, "lm": 150}


def test_sets_are_disjoint(stories):
    limits = Limits(4, 6, 1, ngram=4)
    sets = split_stories(stories, SIZES, limits)
    assert {name: len(texts) for name, texts in sets.items()} == SIZES
    for held_out in ("test", "dev"):
        others = [one for name, texts in sets.items() if name != held_out for one in texts]
        seen = set().union(*(ngrams(one, 4) for one in others))
        assert not seen & set().union(*(ngrams(one, 4) for one in sets[held_out]))
    assert len(set(sets["train"])) == len(sets["train"])


def test_held_out_utterances_are_those_of_which_nothing_returns(stories):
    """The slow, obvious way to choose the test set."""
    limits = Limits(4, 6, 1, ngram=4)
    expected = []
    for story in stories:
        others = [one for other in stories if other is not story for one in other]
        for one in story:
            if not any(ngrams(one, 4) & ngrams(other, 4) for other in others):
                expected.append(one)
    assert split_stories(stories, SIZES, limits)["test"] == expected[: SIZES["test"]]


def test_the_test_set_does_not_depend_on_the_other_sizes(stories):
    limits = Limits(4, 6, 1, ngram=4)
    sets = split_stories(stories, SIZES, limits)
    fewer = split_stories(stories, {**SIZES, "train": 10, "lm": 10}, limits)
    assert fewer["test"] == sets["test"] and fewer["dev"] == sets["dev"]
    assert fewer["train"] == sets["train"][:10]


def test_lm_text_repeats_itself_as_the_stories_do():
    stories = [[f"utterance {n}"] for n in "abc"] + [["once upon"]] * 5
    limits = Limits(1, 6, 1, ngram=2)
    sets = split_stories(stories, {"test": 1, "dev": 1, "train": 2, "lm": 9}, limits)
    assert sets == {
        "test": ["utterance a"],
        "dev": ["utterance b"],
        "train": ["utterance c", "once upon"],
        "lm": ["once upon"] * 4,
    }


def test_utterances_with_rare_words_are_dropped():
    stories = [["a b c"], ["a b d"], ["c a b"], ["b b a"]]
    limits = Limits(1, 6, min_word_count=2, ngram=3)
    sets = split_stories(stories, {"test": 9, "dev": 9, "train": 9, "lm": 9}, limits)
    assert sets["test"] == ["a b c", "c a b", "b b a"]


def test_too_few_stories_give_shorter_sets(stories):
    sets = split_stories(stories[:30], SIZES, Limits(4, 6, 1, ngram=4))
    assert len(sets["test"]) == 20 and sets["lm"] == []


@pytest.mark.parametrize("values", [(0, 3), (5, 4)])
def test_bad_limits(values):
    with pytest.raises(UserError, match="1 <= min_words <= max_words"):
        Limits(*values)
    with pytest.raises(UserError, match="ngram must be at least 1"):
        Limits(ngram=0)
