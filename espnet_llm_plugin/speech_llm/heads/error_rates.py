"""Greedy decoding in validation: error rates of the LLM and of every head, side by side.

B utterances, T frames, V tokens.

A head that writes the text well beside an LLM that does not shows that the prefix carries it and
the LLM cannot read it [arXiv 2406.14701]. Teacher-forced accuracy shows nothing of the kind.
"""

import math
from collections import defaultdict
from typing import Mapping, NamedTuple, Optional, Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from espnet_llm_plugin.speech_llm.decoder import Audio, SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.heads.abs_head import LabelHead
from espnet_llm_plugin.speech_llm.heads.auxiliary import Tap
from espnet_llm_plugin.speech_llm.heads.sample import (
    RunningValue,
    UtteranceSample,
    names_or_numbers,
)

LLM = "llm"


class Errors(NamedTuple):
    """Of one hypothesis."""

    words: int  # of the reference
    word_errors: int
    characters: int  # spaces are none
    character_errors: int


class GreedyErrorRates:
    """Error rates of some utterances of a validation, the same in every epoch.

    They are chosen by their names alone, see :class:`UtteranceSample`: ESPnet's validation begins
    with the shortest utterances. Every process of a distributed training chooses its part among the
    utterances that it gets, which are the same in every epoch too.

    Args:
        utterances: How many are decoded; the others cost nothing. In the first validation of a run
            some more are decoded: it is not known yet which will come.
    """

    def __init__(self, utterances: int):
        self.utterances = utterances
        self._sample: Optional[UtteranceSample] = None
        self._values: dict[str, RunningValue] = defaultdict(RunningValue)
        self._seen = 0

    def restart(self) -> None:
        """A training step came between: the next validation begins."""
        if self._seen:
            self._sample.restart()
            self._values.clear()
            self._seen = 0

    def stat_names(self, heads: Sequence[str]) -> list[str]:
        """Names of the statistics beside heads of these names."""
        if not self.utterances:
            return []
        return [f"{rate}_{name}" for name in (LLM, *heads) for rate in ("wer", "cer")]

    def __call__(
        self,
        decoder: SpeechLLMDecoder,
        audio: Audio,
        text: Tensor,
        lengths: Tensor,
        heads: Mapping[str, tuple[LabelHead, Tap]],
        names: Optional[Sequence[str]],
        weight: float,
    ) -> dict[str, float]:
        """Statistics of a batch, to be averaged over a validation with weights ``weight``.

        Their means are the word and character error rates, in per cent, of all utterances that were
        chosen, together; NaN, which ESPnet leaves out, as long as these have no word. The LLM
        writes up to twice as many tokens as the transcript and 10: hypotheses without end are cut
        there.

        Args:
            decoder: The LLM's.
            audio: Of B utterances.
            text: (B, U) token ids.
            lengths: (B,) their numbers.
            heads: What to decode beside it, and where it listens.
            names: Of the utterances; None: they are numbered.
            weight: Of the batch, as the model returns it.
        """
        if self._sample is None:
            self._sample = UtteranceSample(math.ceil(self.utterances / _processes()))
        chosen = self._sample.choose(names_or_numbers(names, len(text), self._seen))
        self._seen += len(text)
        if chosen:
            rows = torch.tensor(list(chosen.values()))
            found = _decode(decoder, audio, text, lengths, heads, rows)
            self._sample.results.update(zip(chosen, found))
        stats: dict[str, float] = {}
        results = self._sample.results.values()
        for name in (LLM, *heads):
            for stat, rate in error_rates([errors[name] for errors in results]).items():
                stats[f"{stat}_{name}"] = self._values[f"{stat}_{name}"](rate, weight)
        return stats


@torch.no_grad()
def _decode(
    decoder: SpeechLLMDecoder,
    audio: Audio,
    text: Tensor,
    lengths: Tensor,
    heads: Mapping[str, tuple[LabelHead, Tap]],
    rows: Tensor,
) -> list[dict[str, Errors]]:
    """Errors by what is decoded, of the utterances at ``rows``."""
    units = decoder.units
    references = [units.decode(text[row, : lengths[row]].tolist()) for row in rows.tolist()]
    limits = [2 * length + 10 for length in lengths[rows].tolist()]
    written = {LLM: map(units.decode, greedy_tokens(decoder, audio.select(rows), limits))}
    for name, (head, tap) in heads.items():
        labels = head.greedy(tap.outputs[rows], tap.lengths[rows])
        written[name] = map(head.vocabulary.text, labels)
    found: list[dict[str, Errors]] = [{} for _ in references]
    for name, hypotheses in written.items():
        for errors, reference, hypothesis in zip(found, references, hypotheses):
            errors[name] = count_errors(reference, hypothesis)
    return found


def _processes() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


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


def count_errors(reference: str, hypothesis: str) -> Errors:
    """Edits between two texts."""
    counts: list[int] = []
    for split in (str.split, lambda text: "".join(text.split())):
        expected, found = split(reference), split(hypothesis)
        counts += [len(expected), Levenshtein.distance(expected, found)]
    return Errors(*counts)


def error_rates(errors: Sequence[Errors]) -> dict[str, float]:
    """``wer`` and ``cer`` of several utterances together, per cent; NaN without reference."""
    words, word_errors, characters, character_errors = map(sum, zip(*errors, Errors(0, 0, 0, 0)))
    return {
        "wer": 100 * word_errors / words if words else math.nan,
        "cer": 100 * character_errors / characters if characters else math.nan,
    }
