"""What a speech LLM makes of its audio, measured on transcribed speech.

B utterances, T frames, E encoder width, P audio embeddings, D their width, U tokens, K LLM layers.

* Shuffled audio [LLMs and Speech, arXiv 2603.15045]: how much less likely is a transcript with the
  audio of another utterance? An LLM that only writes likely text does not care.
* Attention: the share that the audio gets of the text's attention, by layer.
* Similarity [Prompting LLMs with Speech Recognition Abilities, arXiv 2307.11795]: are audio and
  text embeddings alike, in the order of the text?
* CTC: see :mod:`~espnet_llm_plugin.inference.ctc_agreement`.

Another utterance is the one before; the first one's is the last.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.language_codes import NAME
from espnet_llm_plugin.encoder.stride import encoder_frame_ms
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.ctc_agreement import AgreementSums
from espnet_llm_plugin.scoring.audio_use import NUMBERS, PICTURE, AudioUse
from espnet_llm_plugin.scoring.similarity import (
    Alignment,
    cosine_similarity,
    monotonicity,
    similarity_png,
)
from espnet_llm_plugin.speech_llm.attention import why_no_reading
from espnet_llm_plugin.speech_llm.cross_attention import CrossAttentionInterface
from espnet_llm_plugin.speech_llm.decoder import Audio, SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.model import SpeechLLMModel

TABLE = "utterances.tsv"
# Tokens of an utterance whose similarities make a readable picture
PICTURE_TOKENS = (8, 40)


class Utterance(NamedTuple):
    """One that can be scored."""

    name: str
    encoder_out: Tensor  # (T, E)
    audio: Audio  # (1, P, D)
    text: Tensor  # (1, U)


@dataclass
class UtteranceUse:
    """Of one utterance; None where it was not measured.

    Attributes:
        name: Its id.
        tokens: Of the transcript, EOS not counted.
        embeddings: P.
        nll: -log P(text and EOS | audio), nats.
        other_nll: With another's audio.
        attention: Share of the audio by layer (K,).
        uniform: That share if all positions got the same.
        similarity: (P, U).
        order: Monotonicity of it.
        other_order: With another's audio.
        ctc_loss: See :func:`~espnet_llm_plugin.inference.ctc_agreement.loss_per_label`.
    """

    name: str
    tokens: int
    embeddings: int
    nll: float
    other_nll: Optional[float] = None
    attention: Optional[np.ndarray] = None
    uniform: Optional[float] = None
    similarity: Optional[np.ndarray] = None
    order: Optional[float] = None
    other_order: Optional[float] = None
    ctc_loss: Optional[float] = None


class Picture(NamedTuple):
    """The utterance to show."""

    name: str
    similarity: np.ndarray  # (P, U)
    tokens: list[str]


class Measured(NamedTuple):
    """Result of :func:`measure`."""

    use: AudioUse
    utterances: list[UtteranceUse]
    picture: Optional[Picture]


@torch.inference_mode()
def measure(
    model: torch.nn.Module,
    batches: Iterable[tuple[Sequence[str], Mapping[str, Tensor]]],
    hypotheses: Optional[Mapping[str, Sequence[int]]] = None,
) -> Measured:
    """Measure a set.

    Args:
        model: A :class:`SpeechLLMModel`; put in evaluation mode.
        batches: Utterance names and ``speech, speech_lengths, text, text_lengths``; ``lang`` and
            ``lang_lengths`` if the languages are given.
        hypotheses: Token ids by utterance.

    Raises:
        UserError: Another kind of model, an utterance without hypothesis, or nothing to measure.
    """
    if not isinstance(model, SpeechLLMModel):
        raise UserError(
            f"the use of audio is measured of model speech_llm, not of {type(model).__name__}"
        )
    model.eval()
    decoder = model.decoder
    crosses = isinstance(decoder.interface, CrossAttentionInterface)
    attends = not crosses and _can_attend(decoder)
    sums = None if model.ctc is None else AgreementSums(model.ctc, decoder.units)
    found: list[UtteranceUse] = []
    texts: list[list[int]] = []
    skipped: list[str] = []
    first: Optional[Utterance] = None
    before: Optional[Utterance] = None
    for one in _utterances(model, batches, skipped):
        text = one.text[0].tolist()
        use = UtteranceUse(one.name, len(text), one.audio.embeddings.size(1), _nll(decoder, one))
        if not crosses:  # whose audio is not among the LLM's own embeddings
            use.similarity = _similarity(decoder, one.audio, one.text)
            use.order = monotonicity(use.similarity)
            if attends:
                use.attention, use.uniform = _attention(decoder, one), _uniform(decoder, one)
        if before is not None:
            _with_other_audio(decoder, use, one, before.audio)
        if sums is not None:
            hypothesis = None if hypotheses is None else _hypothesis(hypotheses, one.name)
            use.ctc_loss = sums.add(one.encoder_out, text, hypothesis)
        found.append(use)
        texts.append(text)
        first, before = first or one, one
    if not found:
        raise UserError(f"nothing to measure: {len(skipped)} utterances, none of which has a score")
    if len(found) > 1:
        _with_other_audio(decoder, found[0], first, before.audio)
    shown = _shown(found)
    picture = None
    if shown is not None:
        tokens = [model.token_list[i] for i in texts[shown]]
        picture = Picture(found[shown].name, found[shown].similarity, tokens)
    gates = decoder.interface.gates().tolist() if crosses else None
    return Measured(_means(found, len(skipped), gates, sums, picture), found, picture)


def _utterances(
    model: SpeechLLMModel,
    batches: Iterable[tuple[Sequence[str], Mapping[str, Tensor]]],
    skipped: list[str],
) -> Iterator[Utterance]:
    """Utterances one by one; the names of those that cannot be scored go to ``skipped``."""
    device = next(model.parameters()).device
    for names, batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        encoder_out, frames = model.encode_frames(batch["speech"], batch["speech_lengths"])
        text_lengths = batch["text_lengths"]
        languages = model.decoder.soft_prompt.languages_of(batch) if NAME in batch else None
        audio = model.decoder.adapt(encoder_out, frames, languages)
        fits = (audio.lengths <= model.decoder.room(text_lengths)) & (audio.lengths > 0)
        for i, name in enumerate(names):
            if not (bool(fits[i]) and int(frames[i]) and int(text_lengths[i])):
                why = "no words, no frames, or more than the LLM's context holds"
                logging.warning("%s is left out: %s", name, why)
                skipped.append(name)
                continue
            yield Utterance(
                name,
                encoder_out[i, : int(frames[i])],
                audio.select(torch.tensor([i], device=device)),
                batch["text"][i : i + 1, : int(text_lengths[i])],
            )


def _nll(decoder: SpeechLLMDecoder, one: Utterance, audio: Optional[Audio] = None) -> float:
    """-log P(text and EOS | audio), by default its own."""
    tokens = torch.nn.functional.pad(one.text, (1, 0), value=decoder.prompt.sos)
    targets = torch.nn.functional.pad(one.text, (0, 1), value=decoder.units.eos)
    lengths = torch.tensor([tokens.size(1)], device=tokens.device)
    logits, _ = decoder.text_logits(audio or one.audio, tokens, lengths)
    log_probs = logits.float().masked_fill(~decoder.scored, -torch.inf).log_softmax(dim=-1)
    return -float(log_probs.gather(-1, targets[..., None]).sum())


def _similarity(decoder: SpeechLLMDecoder, audio: Audio, text: Tensor) -> np.ndarray:
    """(P, U)."""
    words = decoder.llm.embed(text[0])
    rows = audio.embeddings[0].float().cpu().numpy()
    return cosine_similarity(rows, words.float().cpu().numpy()).astype(np.float32)


def _can_attend(decoder: SpeechLLMDecoder) -> bool:
    """Whether the LLM's attention can be measured, tried on an embedding and a token."""
    reason = why_no_reading(decoder.llm.config)
    if reason is None:
        token = torch.tensor([[decoder.prompt.sos]], device=decoder.scored.device)
        length = torch.ones(1, dtype=torch.long, device=token.device)
        try:
            decoder.interface.attention_mass(decoder.llm.embed(token), length, token, length)
            return True
        except UserError as error:
            reason = str(error)
    logging.warning("the attention to the audio is not measured: %s", reason)
    return False


def _attention(decoder: SpeechLLMDecoder, one: Utterance) -> np.ndarray:
    """Share of the audio by layer (K,)."""
    tokens = torch.nn.functional.pad(one.text, (1, 0), value=decoder.prompt.sos)
    lengths = torch.tensor([tokens.size(1)], device=tokens.device)
    embeddings, audio_lengths, soft = one.audio
    prompt = {"before": decoder.prompt.before, "after": decoder.prompt.after, "soft": soft}
    mass = decoder.interface.attention_mass(embeddings, audio_lengths, tokens, lengths, **prompt)
    return mass[0].float().cpu().numpy()


def _uniform(decoder: SpeechLLMDecoder, one: Utterance) -> float:
    """The share if each token gave the same to all positions it sees, itself included."""
    embeddings = one.audio.embeddings.size(1)
    others = decoder.prompt_length + np.arange(one.text.size(1) + 1)
    return float((embeddings / (embeddings + others)).mean())


def _with_other_audio(
    decoder: SpeechLLMDecoder, use: UtteranceUse, one: Utterance, other: Audio
) -> None:
    """Measure ``one`` with the audio of another utterance, as much as the context holds."""
    text_lengths = torch.tensor([one.text.size(1)], device=one.text.device)
    other = other.shorten(int(decoder.room(text_lengths)))._replace(soft=one.audio.soft)
    use.other_nll = _nll(decoder, one, other)
    if use.order is not None:
        use.other_order = monotonicity(_similarity(decoder, other, one.text))


def _hypothesis(hypotheses: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    if name not in hypotheses:
        raise UserError(f"utterance {name} has no hypothesis; was another set decoded?")
    return hypotheses[name]


def _shown(found: Sequence[UtteranceUse]) -> Optional[int]:
    """The utterance of median monotonicity among those of readable length."""
    low, high = PICTURE_TOKENS
    some = [n for n, use in enumerate(found) if use.order is not None]
    some = [n for n in some if low <= found[n].tokens <= high] or some
    some.sort(key=lambda n: found[n].order)
    return some[len(some) // 2] if some else None


def _means(
    found: Sequence[UtteranceUse],
    skipped: int,
    gates: Optional[list[float]],
    sums: Optional[AgreementSums],
    picture: Optional[Picture],
) -> AudioUse:
    scored_tokens = sum(use.tokens + 1 for use in found)  # EOS is predicted too
    pairs = [(use.order, use.other_order) for use in found]
    pairs = [pair for pair in pairs if None not in pair]
    attention = [use.attention for use in found if use.attention is not None]
    several = len(found) > 1
    return AudioUse(
        utterances=len(found),
        skipped=skipped,
        nll=sum(use.nll for use in found) / scored_tokens,
        other_nll=sum(use.other_nll for use in found) / scored_tokens if several else None,
        indifferent=_share(use.other_nll <= use.nll for use in found) if several else None,
        attention=np.mean(attention, axis=0).tolist() if attention else None,
        uniform_attention=float(np.mean([use.uniform for use in found])) if attention else None,
        gates=gates,
        alignment=Alignment(*np.mean(pairs, axis=0).tolist(), len(pairs)) if pairs else None,
        tokens_per_embedding=sum(u.tokens for u in found) / sum(u.embeddings for u in found),
        crowded=_share(use.tokens > use.embeddings for use in found),
        ctc=None if sums is None else sums.report(),
        picture=None if picture is None else picture.name,
    )


def _share(flags: Iterable[Any]) -> float:
    return float(np.mean(list(flags)))


def write(measured: Measured, output_dir: Union[str, Path], frame_ms: Optional[float]) -> None:
    """Write ``utterances.tsv``, ``similarity.png`` (if there is a picture), ``audio_use.json``.

    Args:
        measured: From :func:`measure`.
        output_dir: Made if it is missing.
        frame_ms: Milliseconds per audio embedding, None if they have no one duration.
    """
    out = Path(output_dir)
    with atomic_write(out / TABLE) as stream:
        stream.write("\t".join(_COLUMNS) + "\n")
        for use in measured.utterances:
            stream.write("\t".join(_cell(value) for value in _row(use)) + "\n")
    if measured.picture is not None:
        _, similarity, tokens = measured.picture
        with atomic_write(out / PICTURE, "wb") as stream:
            stream.write(similarity_png(similarity, tokens, frame_ms))
    with atomic_write(out / NUMBERS) as stream:
        json.dump(measured.use.as_dict(), stream, indent=1)
        stream.write("\n")


def embedding_ms(model: SpeechLLMModel, config: Mapping[str, Any]) -> Optional[float]:
    """Milliseconds per audio embedding of a model with this training configuration.

    None if they have no one duration (CTC compression), or it cannot be told.
    """
    frame, stack = encoder_frame_ms(config), getattr(model.decoder.adapter, "stack", None)
    return None if frame is None or stack is None else frame * stack


def spread(keys: Sequence[str], number: int) -> list[str]:
    """At most ``number`` of the keys, evenly spread, as files are often sorted by speaker."""
    if number >= len(keys):
        return list(keys)
    return [keys[i] for i in np.linspace(0, len(keys) - 1, number).round().astype(int)]


_COLUMNS = ["utterance", "tokens", "embeddings", "nll", "other_nll", "attention", "order"]
_COLUMNS += ["other_order", "ctc_loss"]


def _row(use: UtteranceUse) -> list[Any]:
    attention = None if use.attention is None else float(use.attention.mean())
    row = [use.name, use.tokens, use.embeddings, use.nll, use.other_nll, attention]
    return [*row, use.order, use.other_order, use.ctc_loss]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
