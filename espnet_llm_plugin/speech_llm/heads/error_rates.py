"""Greedy decoding in validation: error rates of the LLM and of every head, side by side.

B utterances, T frames, V tokens.

A head that writes the text well beside an LLM that does not shows that the prefix carries it and
the LLM cannot read it [arXiv 2406.14701]. Teacher-forced accuracy shows nothing of the kind.
"""

import math
from typing import Mapping, Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from espnet_llm_plugin.speech_llm.decoder import Audio, SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.heads.abs_head import LabelHead
from espnet_llm_plugin.speech_llm.heads.auxiliary import Tap

LLM = "llm"


class GreedyErrorRates:
    """Error rates of the first utterances of a validation.

    Args:
        utterances: How many are decoded; the others cost nothing.
    """

    def __init__(self, utterances: int):
        self.utterances = utterances
        self._left = utterances

    def restart(self) -> None:
        """A training step came between: the next validation begins with its first utterances."""
        self._left = self.utterances

    def stat_names(self, heads: Sequence[str]) -> list[str]:
        """Names of the statistics beside heads of these names."""
        if not self.utterances:
            return []
        return [f"{rate}_{name}" for name in (LLM, *heads) for rate in ("wer", "cer")]

    @torch.no_grad()
    def __call__(
        self,
        decoder: SpeechLLMDecoder,
        audio: Audio,
        text: Tensor,
        lengths: Tensor,
        heads: Mapping[str, tuple[LabelHead, Tap]],
    ) -> dict[str, float]:
        """Word and character error rates of a batch, per cent.

        NaN, which ESPnet leaves out of its means, once all utterances are done. ESPnet weighs the
        batches by their tokens (or utterances, see ``length_normalized_loss``), not by their words.
        The LLM writes up to twice as many tokens as the transcript and 10: hypotheses without end
        are cut there.

        Args:
            decoder: The LLM's.
            audio: Of B utterances.
            text: (B, U) token ids.
            lengths: (B,) their numbers.
            heads: What to decode beside it, and where it listens.
        """
        number = min(self._left, len(text))
        self._left -= number
        if not number:
            return dict.fromkeys(self.stat_names(list(heads)), math.nan)
        units = decoder.units
        rows = torch.arange(number)
        references = [
            units.decode(row[:length])
            for row, length in zip(text[:number].tolist(), lengths[:number].tolist())
        ]
        limits = [2 * length + 10 for length in lengths[:number].tolist()]
        written = {LLM: map(units.decode, greedy_tokens(decoder, audio.select(rows), limits))}
        for name, (head, tap) in heads.items():
            labels = head.greedy(tap.outputs[:number], tap.lengths[:number])
            written[name] = map(head.vocabulary.text, labels)
        rates: dict[str, float] = {}
        for name, hypotheses in written.items():
            rates[f"wer_{name}"], rates[f"cer_{name}"] = error_rates(references, list(hypotheses))
        return rates


@torch.no_grad()
def greedy_tokens(
    decoder: SpeechLLMDecoder, audio: Audio, max_tokens: Sequence[int]
) -> list[list[int]]:
    """Tokens of each utterance that the LLM finds most likely, one after the other.

    Args:
        decoder: In evaluation mode.
        audio: Of B utterances.
        max_tokens: Of each, at most (B).
    """
    device = audio.embeddings.device
    found: list[list[int]] = [[] for _ in max_tokens]
    limits = torch.tensor(list(max_tokens), device=device)
    # no more than the LLM can see after the longest audio: a batch shares its positions
    taken = int(audio.lengths.max()) if decoder.interface.audio_takes_positions else 0
    limits += (decoder.room(limits) - taken).clamp(max=0)
    rows = torch.arange(len(found), device=device)  # utterances that are not done
    tokens = torch.full_like(rows, decoder.prompt.sos)
    parents, state = rows, decoder.start_after(audio)
    for step in range(int(limits.max())):
        logits, state = decoder.step(tokens, state, parents)
        tokens = logits.argmax(dim=1)
        goes_on = (tokens != decoder.units.eos) & (step < limits[rows])
        parents = goes_on.nonzero().squeeze(1)
        rows, tokens = rows[parents], tokens[parents]
        for row, token in zip(rows.tolist(), tokens.tolist()):
            found[row].append(token)
        if not len(rows):
            break
    return found


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, float]:
    """Word and character error rate, per cent; spaces are no characters. NaN without reference."""
    rates = []
    for split in (str.split, lambda text: "".join(text.split())):
        pairs = [(split(ref), split(hyp)) for ref, hyp in zip(references, hypotheses)]
        errors = sum(Levenshtein.distance(ref, hyp) for ref, hyp in pairs)
        total = sum(len(ref) for ref, _ in pairs)
        rates.append(100 * errors / total if total else math.nan)
    return rates[0], rates[1]
