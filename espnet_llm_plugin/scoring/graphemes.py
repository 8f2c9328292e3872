"""Errors counted in grapheme clusters: a consonant with its vowel sign is one character, not two.

The character error rate of :mod:`evaluate` counts code points, as ESPnet and sclite do: a wrong
vowel sign is one character there, and part of a wrong cluster here.
"""

from pathlib import Path
from typing import Union

from espnet_llm_plugin.scoring.alignment import align, count
from espnet_llm_plugin.scoring.evaluate import Counted
from espnet_llm_plugin.scoring.trn import read_scored_words
from espnet_llm_plugin.scoring.wer import fold_case

GER = "ger"
SPACE = "<space>"


def graphemes(words: list[str]) -> list[str]:
    """Extended grapheme clusters (Unicode Annex 29, as the package ``regex`` has them) of words.

    A space between words is ``<space>``, as in the character error rate.
    """
    import regex

    clusters: list[str] = []
    for word in words:
        clusters += [SPACE] * bool(clusters) + regex.findall(r"\X", word)
    return clusters


def count_graphemes(directory: Union[str, Path]) -> Counted:
    """Reference clusters and errors of each utterance of a scored decoding directory.

    Letters of ASCII are compared without case.
    """
    length, errors = {}, {}
    for key, (reference, hypothesis) in read_scored_words(directory).items():
        ref = fold_case(graphemes(reference), False)
        hyp = fold_case(graphemes(hypothesis), False)
        length[key], errors[key] = len(ref), count(align(ref, hyp)).errors
    return Counted(str(directory), length, errors)
