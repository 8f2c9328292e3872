"""Languages in equal shares: text for the token list, and the file of ESPnet's category samplers.

A set with a table ``utt2lang`` (utterance -> language) is assumed.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.errors import UserError

CATEGORIES = "category2utt"


def utterances_by_language(utt2lang: dict[str, str]) -> dict[str, list[str]]:
    """``{language: sorted utterances}``, languages sorted."""
    languages: dict[str, list[str]] = {}
    for utterance in sorted(utt2lang):
        languages.setdefault(utt2lang[utterance], []).append(utterance)
    return dict(sorted(languages.items()))


def write_categories(utt2lang: dict[str, str], directory: Union[str, Path]) -> None:
    """Write ``directory/category2utt``: ``<language> <utterance> <utterance> ...`` lines.

    ESPnet reads it beside wav.scp with ``iterator_type: category``. Languages are then drawn with
    the probability ``(n_l / N) ** upsampling_factor`` (``batch_type: catpow``; n_l the samples of
    language l; Pratap et al., arXiv 2305.13516).
    """
    with atomic_write(Path(directory) / CATEGORIES) as stream:
        for language, utterances in utterances_by_language(utt2lang).items():
            stream.write(f"{language} {' '.join(utterances)}\n")


def write_balanced_text(
    text: dict[str, str],
    utt2lang: dict[str, str],
    output: Union[str, Path],
    *,
    seed: int = 0,
    cover_characters: bool = False,
) -> Counter:
    """Write sentences in which every language has (nearly) as many characters.

    The language with the fewest is taken whole; of the others, random sentences up to the same
    number of characters (the last one may exceed it), so that SentencePiece gives no language
    more pieces because it has more hours.

    Args:
        text: Transcripts by utterance.
        utt2lang: Language by utterance.
        output: File of ``<utterance> <sentence>`` lines.
        seed: Of the choice.
        cover_characters: Add sentences until every character of ``text`` occurs: with thousands of
            characters in all scripts, a sample lacks the rare ones, and they would have no piece.

    Returns:
        Characters by language.

    Raises:
        UserError: An utterance without language, or a language without text.
    """
    unknown = sorted(text.keys() - utt2lang.keys())
    if unknown:
        raise UserError(f"{len(unknown)} utterance(s) have no language, e.g. {unknown[0]}")
    languages = utterances_by_language({key: utt2lang[key] for key in text})
    sizes = {lang: sum(len(text[key]) for key in keys) for lang, keys in languages.items()}
    smallest = min(sizes.values(), default=0)
    if not smallest:
        raise UserError(f"there is a language without text among {', '.join(languages) or 'none'}")
    written: Counter = Counter()
    with writing(output), atomic_write(output) as stream:
        for language, keys in languages.items():
            random.Random(f"{seed} {language}").shuffle(keys)
            covered: set[str] = set()
            for key in keys:
                if written[language] >= smallest:
                    if not cover_characters:
                        break
                    if covered.issuperset(text[key]):
                        continue
                covered.update(text[key])
                written[language] += len(text[key])
                stream.write(f"{key} {text[key]}\n")
    return written
