"""Word errors of token sequences, inside a model that knows its token list and no tokenizer.

B utterances, N hypotheses, U tokens.
"""

from typing import Sequence

from rapidfuzz.distance import Levenshtein

from espnet_llm_plugin.token_list import SPACE

_SENTENCEPIECE_SPACE = "\u2581"


class WordErrors:
    """Counts word errors between sequences of token ids.

    ESPnet builds a model with the token list, not with the tokenizer, so the words are read from
    the tokens themselves:

    * some token contains ``▁`` (``token_type: bpe``): tokens are joined, ``▁`` begins a word;
    * ``<space>`` is a token (``token_type: char``): tokens are joined, ``<space>`` separates words;
    * neither (``token_type: word``, or characters of a script without spaces): a token is a word.

    Reference and hypothesis are read alike: an ``<unk>`` is an ordinary piece of a word, and
    nothing is normalised. These are the words of ESPnet's tokenizers, up to what SentencePiece
    itself cannot restore (bytes of a character outside its vocabulary stay ``<0xE2>``).

    Args:
        token_list: V tokens.
    """

    def __init__(self, token_list: Sequence[str]):
        self.separator = ""  # no token has one: each is a word
        if any(_SENTENCEPIECE_SPACE in token for token in token_list):
            self.separator = _SENTENCEPIECE_SPACE
        elif SPACE in token_list:
            self.separator = SPACE
        self.token_list = list(token_list)

    def words(self, token_ids: Sequence[int]) -> list[str]:
        """The words of U token ids."""
        tokens = [self.token_list[token_id] for token_id in token_ids]
        if not self.separator:
            return tokens
        return [word for word in "".join(tokens).split(self.separator) if word]

    def __call__(self, reference: Sequence[int], hypotheses: Sequence[Sequence[int]]) -> list[int]:
        """Levenshtein distance in words of each of N hypotheses to the reference."""
        words = self.words(reference)
        return [Levenshtein.distance(words, self.words(hypothesis)) for hypothesis in hypotheses]
