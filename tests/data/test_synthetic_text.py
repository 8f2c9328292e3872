"""The sentences of the synthetic corpus: reproducible, disjoint, and ambiguous without context."""

import math
import re
from collections import Counter, defaultdict

import pytest

from espnet_llm_plugin.data.synthetic import lexicon
from espnet_llm_plugin.data.synthetic.corpus import PRESETS, make_texts
from espnet_llm_plugin.data.synthetic.text import (
    Grammar,
    Weighted,
    generate,
    plural,
    spellings,
    zipf,
)


@pytest.fixture(scope="module")
def texts():
    return make_texts(PRESETS["mini"], seed=0)


def words(sentences):
    return [word for sentence in sentences for word in sentence.text.split()]


def test_same_seed_same_sentences_other_seed_others():
    first = [s.text for s in generate("3 test", 200, set())]
    assert first == [s.text for s in generate("3 test", 200, set())]
    other = {s.text for s in generate("4 test", 200, set())}
    assert len(other & set(first)) <= 2


def test_generation_does_not_change_unnoticed():
    """The random stream is Python's guaranteed one: these are the words on every machine."""
    assert generate("0 test", 3, set())[0].text == FIRST_TEST_SENTENCE


FIRST_TEST_SENTENCE = "the fisher told barin to bring the anchor but only barin looked at the flare"


def test_test_and_dev_do_not_depend_on_the_other_sizes(texts):
    tiny = make_texts(PRESETS["tiny"], seed=0)
    assert tiny["test"] == texts["test"][:20]


def test_form(texts):
    for sentences in texts.values():
        for sentence in sentences:
            assert re.fullmatch(r"[a-z']+( [a-z']+)*", sentence.text)
            assert 7 <= len(sentence.text.split()) <= 16


def test_no_sentence_occurs_twice(texts):
    everything = [s.text for sentences in texts.values() for s in sentences]
    assert len(set(everything)) == len(everything)


def test_articles_and_plurals():
    for sentence in generate("articles", 3000, set()):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence.text)
    assert [plural(w) for w in ("box", "essay", "treaty", "torch", "helmsman", "verdict")] == [
        "boxes",
        "essays",
        "treaties",
        "torches",
        "helmsmen",
        "verdicts",
    ]


def test_vocabulary_and_rare_words(texts):
    train, lm = set(words(texts["train"])), set(words(texts["lm"]))
    assert 800 < len(train) < 1100
    assert len(lm) > len(train)  # some words are known to the LM only
    test = words(texts["test"])
    oov = sum(word not in train for word in test) / len(test)
    assert 0.001 < oov < 0.03
    assert sum(word not in lm for word in test) <= 0.001 * len(test)


def test_homophones_belong_to_one_topic_each():
    topic_of = {}
    for name, topic in lexicon.TOPICS.items():
        for word in topic.homophones:
            assert word not in topic_of
            topic_of[word] = name
    assert set(topic_of) == set(spellings())
    for group in lexicon.HOMOPHONES:
        assert len({topic_of[word] for word in group}) == len(group) >= 2


def test_cues_are_never_homophones():
    """A role, place or thing that sounds like something else would be a false cue."""
    for topic in lexicon.TOPICS.values():
        assert not set(topic.roles + topic.places + topic.things) & set(spellings())


def test_every_homophone_occurs_in_the_transcripts_and_most_pairs_in_test(texts):
    train, test = Counter(words(texts["train"])), Counter(words(texts["test"]))
    assert all(train[word] for word in spellings())
    heard = [g for g in lexicon.HOMOPHONES if all(test[word] for word in g)]
    assert len(heard) > 0.6 * len(lexicon.HOMOPHONES)
    share = sum(test[word] for word in spellings()) / sum(test.values())
    assert 0.07 < share < 0.12


def test_neighbours_do_not_tell_homophones_apart(texts):
    """The best spelling given the two words before (learnt on all the LM text) is often wrong.

    With the topic instead, the spelling is certain.
    """
    groups = spellings()
    by_neighbours, by_topic = defaultdict(Counter), defaultdict(set)
    for sentence in texts["lm"]:
        tokens = ["<s>", "<s>"] + sentence.text.split()
        for i, word in enumerate(tokens):
            if word in groups:
                by_neighbours[groups[word], tokens[i - 1]][word] += 1
                by_neighbours[groups[word], tokens[i - 2], tokens[i - 1]][word] += 1
                by_topic[groups[word], sentence.topic].add(word)
    right = {1: 0, 2: 0}
    total = 0
    for sentence in texts["test"]:
        tokens = ["<s>", "<s>"] + sentence.text.split()
        for i, word in enumerate(tokens):
            if word in groups:
                total += 1
                for n in (1, 2):
                    counts = by_neighbours[(groups[word], *tokens[i - n : i])]
                    right[n] += counts.most_common(1) != [] and counts.most_common(1)[0][0] == word
    assert right[1] / total < 0.7 and right[2] / total < 0.75
    assert all(len(known) == 1 for known in by_topic.values())


def test_bigram_is_far_from_the_grammar(texts):
    """Word perplexity of a bigram trained on all the LM text, and the bound of an ideal LM."""
    unigrams, bigrams = Counter(), defaultdict(Counter)
    for sentence in texts["lm"]:
        tokens = ["<s>"] + sentence.text.split()
        unigrams.update(tokens[1:])
        for left, right in zip(tokens, tokens[1:]):
            bigrams[left][right] += 1
    total, types = sum(unigrams.values()), len(unigrams) + 1

    def probability(left, right):  # Witten-Bell
        low = (unigrams[right] + types / types) / (total + types)
        followers = bigrams[left]
        kinds = len(followers)
        return (followers[right] + kinds * low) / (sum(followers.values()) + kinds)

    loss = count = 0
    for sentence in texts["test"]:
        tokens = ["<s>"] + sentence.text.split()
        loss -= sum(math.log(probability(*pair)) for pair in zip(tokens, tokens[1:]))
        count += len(tokens) - 1
    bigram = math.exp(loss / count)
    grammar = math.exp(-sum(s.log_prob for s in texts["test"]) / count)
    assert 5.0 < grammar < 9.0
    assert bigram > 3.5 * grammar


def test_names_numbers_and_towns_return(texts):
    """More than a fifth of all names and towns were said before in the same utterance."""
    entities = set(
        lexicon.FEMALE + lexicon.MALE + lexicon.RARE_FEMALE + lexicon.RARE_MALE + lexicon.TOWNS
    )
    mentions = returns = 0
    for sentence in texts["lm"]:  # the largest set: the rate of 3,000 sentences varies by 0.01
        counts = Counter(word for word in sentence.text.split() if word in entities)
        mentions += sum(counts.values())
        returns += sum(count - 1 for count in counts.values())
    assert returns / mentions > 0.2


def test_pronouns_agree_with_names():
    """The pronoun of a sentence with one person has the gender of the name."""
    female = set(lexicon.FEMALE + lexicon.RARE_FEMALE)
    male = set(lexicon.MALE + lexicon.RARE_MALE)
    checked = Counter()
    for sentence in generate("agreement", 5000, set()):
        tokens = set(sentence.text.split())
        named = tokens & (female | male)
        roles = tokens & {"his"} or "her " in sentence.text and "lost her" in sentence.text
        if len(named) != 1 or roles:
            continue
        if "she" in tokens:
            assert named <= female
            checked["f"] += 1
        if "he" in tokens:
            assert named <= male
            checked["m"] += 1
    assert min(checked["f"], checked["m"]) > 50


def test_verbs_agree_with_a_distant_subject():
    singular = {form[1].split()[0] for form in lexicon.MENTION}
    base = {form[2].split()[0] for form in lexicon.MENTION} - {"read"}  # also the past
    roles = [role for topic in lexicon.TOPICS.values() for role in topic.roles]
    plurals = {plural(role) for role in roles}
    checked = Counter()
    pattern = re.compile(rf"\b({'|'.join(lexicon.ALWAYS)}) (\w+)")
    for sentence in generate("verbs", 5000, set()):
        match = pattern.search(sentence.text)
        if match and sentence.text.startswith("the "):
            many = bool(plurals & set(sentence.text[: match.start()].split()))
            if match.group(2) in singular | base:
                assert (match.group(2) in base) == many, sentence.text
                checked[many] += 1
    assert min(checked[True], checked[False]) > 50


def test_log_probability_is_that_of_the_draws():
    """Zipf weights, and relative frequencies that match the probabilities."""
    options = zipf(["a", "b", "c"], offset=1.0)
    assert [round(math.exp(p), 6) for p in options.log_probs] == [0.545455, 0.272727, 0.181818]
    grammar = Grammar("frequencies")
    flat = Weighted([0, 1], [3, 1])
    draws = Counter(grammar._draw(flat) for _ in range(8000))
    assert abs(draws[0] / 8000 - 0.75) < 0.02
    expected = draws[0] * math.log(0.75) + draws[1] * math.log(0.25)
    assert grammar._log_prob == pytest.approx(expected)
