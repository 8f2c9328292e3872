"""VocabularyContract: text survives the vocabulary, and special tokens are never text."""

import unicodedata

import torch

from tests.contracts.sentences import SENTENCES


class VocabularyContract:
    """Mix in and define what maps text to ids and back, and (optionally) an LM over the ids."""

    sentences = SENTENCES

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def tokens(self) -> list[str]:
        raise NotImplementedError

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Log-probs (L+1, V) of the token after each prefix of ``ids``."""
        raise NotImplementedError

    def normalised(self, text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).split())

    def test_text_survives_in_every_language(self):
        lost = {}
        for language, sentences in self.sentences.items():
            for text in sentences:
                back = self.decode(self.encode(text))
                if back != self.normalised(text):
                    lost.setdefault(language, []).append((text, back))
        assert len(self.sentences) >= 19
        assert not lost

    def test_special_tokens_are_never_in_text(self):
        tokens = self.tokens()
        special = {tokens.index(t) for t in ("<blank>", "<unk>", "<sos/eos>")}
        assert special == {0, 1, len(tokens) - 1}
        for sentences in self.sentences.values():
            for text in sentences:
                ids = self.encode(text)
                assert ids and not special & set(ids)
                assert max(ids) < len(tokens)

    def test_blank_is_never_scored(self):
        for sentences in list(self.sentences.values())[:3]:
            rows = self.log_probs(self.encode(sentences[0]))
            assert rows.shape[1] == len(self.tokens())
            assert rows[:, 0].exp().max() == 0
            torch.testing.assert_close(
                rows.logsumexp(-1), torch.zeros(len(rows)), atol=1e-4, rtol=0
            )
