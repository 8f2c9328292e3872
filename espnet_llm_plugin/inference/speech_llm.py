"""Speech to text with a speech LLM: encoder, segments of long audio, batched search, text.

B utterances, S segments (B if none is cut), T frames, D encoder size, V tokens.
"""

import logging
from typing import Callable, Collection, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.errors import UserError, UtteranceError
from espnet_llm_plugin.inference.languages import LANG, PREDICTED
from espnet_llm_plugin.inference.loading import LoadedASR
from espnet_llm_plugin.inference.recognizer import Recognition, Samples, encode
from espnet_llm_plugin.inference.speech_llm_options import SpeechLLMOptions
from espnet_llm_plugin.speech_llm.decoder import Audio
from espnet_llm_plugin.speech_llm.guards import length_limits
from espnet_llm_plugin.speech_llm.heads.vocabulary import TokenVocabulary
from espnet_llm_plugin.speech_llm.hypothesis import (
    CTC,
    DECODER,
    LM,
    TEXT_LM,
    LabelHypothesis,
    SearchWeights,
)
from espnet_llm_plugin.speech_llm.joint_ctc import JointCTC
from espnet_llm_plugin.speech_llm.languages import NOT_GIVEN
from espnet_llm_plugin.speech_llm.long_form import Segment, joined, stitch
from espnet_llm_plugin.speech_llm.scorers import ESPnetLM, LLMScorer
from espnet_llm_plugin.speech_llm.search import LabelSearch, TokenScorer
from espnet_llm_plugin.speech_llm.units import NativeUnits


class Segments(NamedTuple):
    """The segments of a batch.

    Attributes:
        lengths: Frames (S,).
        seconds: Durations; None where the input is no waveform (S).
        utterances: Utterance of each segment, ascending (S).
    """

    lengths: torch.Tensor
    seconds: list[Optional[float]]
    utterances: list[int]


class Prepared(NamedTuple):
    """A batch of B utterances before its search: what does not depend on the weights.

    Attributes:
        scorers: Makers of new scorers, by name.
        ctc: Posteriors of the tokens (B, T, V) and their frames (B,), or None.
        longest: Most tokens (B).
        shortest: Fewest tokens (B).
    """

    scorers: dict[str, Callable[[], TokenScorer]]
    ctc: Optional[tuple[torch.Tensor, torch.Tensor]]
    longest: list[int]
    shortest: list[int]


class SpeechLLMRecognizer:
    """A speech LLM with a search.

    Args:
        asr: From :func:`~espnet_llm_plugin.inference.loading.load_asr`.
        lm: External LM, from :func:`~espnet_llm_plugin.inference.loading.load_lm`.
        options: Of the search.

    Attributes:
        scales: The weights of the search.

    Raises:
        UserError: An option that this model cannot honour.
    """

    def __init__(
        self,
        asr: LoadedASR,
        lm: Optional[BatchScorerInterface] = None,
        options: Optional[SpeechLLMOptions] = None,
    ):
        options = options or SpeechLLMOptions()
        self.asr, self.lm, self.options = asr, lm, options
        self.decoder = asr.model.decoder
        self.decoder.llm.merge()
        self.units = self.decoder.units
        self.device = next(asr.model.parameters()).device
        self.scales = options.weights
        self._forbidden = tuple((~self.decoder.scored).nonzero().flatten().tolist())
        check_options(asr, options, has_lm=lm is not None)

    def __call__(self, speech: Samples, lang: Optional[str] = None) -> list[Recognition]:
        """The n-best list of samples (N,) or features (N, F), in a language if it is known."""
        return self.batch([speech], [lang])[0]

    def batch(
        self, speech: Sequence[Samples], codes: Sequence[Optional[str]] = ()
    ) -> list[list[Recognition]]:
        """The n-best lists of B utterances, decoded together; see :meth:`decode`."""
        return self.decode(*self.encode(speech), codes)

    @torch.inference_mode()
    def encode(self, speech: Sequence[Samples]) -> tuple[torch.Tensor, Segments]:
        """Encoder outputs (S, T, D) of B utterances, long ones in segments.

        Raises:
            espnet.nets.pytorch_backend.transformer.subsampling.TooShortUttError: Too short.
        """
        segments, utterances = [], []
        for number, one in enumerate(speech):
            some = list(self._segments(np.asarray(one)))
            segments += some
            utterances += [number] * len(some)
        padded = pad_sequence([segment.encoder_out for segment in segments], batch_first=True)
        lengths = torch.tensor([len(segment.encoder_out) for segment in segments])
        return padded, Segments(lengths, [segment.seconds for segment in segments], utterances)

    def _segments(self, samples: np.ndarray) -> Sequence[Segment]:
        def outputs(part: np.ndarray) -> torch.Tensor:
            encoder_out, lengths = encode(self.asr.model, [part])
            return encoder_out[0, : lengths[0]]

        rate = self.asr.sample_rate
        if rate is None or samples.ndim != 1:
            return [Segment(outputs(samples), None)]
        return self.options.long_form.segments(
            samples, rate, outputs, lambda out: self.asr.model.ctc.label_log_probs(out[None])[0]
        )

    @torch.inference_mode()
    def decode(
        self,
        encoder_out: torch.Tensor,
        segments: Segments,
        codes: Sequence[Optional[str]] = (),
    ) -> list[list[Recognition]]:
        """The n-best lists of B utterances from encoder outputs (S, T, D).

        Args:
            encoder_out, segments: From :meth:`encode`.
            codes: Languages of the utterances (B), None where that is not given; or none at all.

        Raises:
            UserError: A language that the model does not know.
        """
        # 0. The language of each utterance, which its segments have in common.
        number = 1 + segments.utterances[-1]
        languages, said = self._languages(encoder_out, segments, codes or [None] * number)
        # 1. Segments of similar length together, at most as many as a batch has.
        order = segments.lengths.argsort(descending=True).tolist()
        size = max(self.options.batch_size, 1 + segments.utterances[-1])
        lists: list[list[LabelHypothesis]] = [[] for _ in order]
        for first in range(0, len(order), size):
            some = order[first : first + size]
            lengths = segments.lengths[some]
            seconds = [segments.seconds[i] for i in some]
            rows = encoder_out[some][:, : int(lengths.max())]
            theirs = None
            if languages is not None:
                theirs = languages[[segments.utterances[i] for i in some]]
            for i, hyps in zip(some, self.search(rows, lengths, seconds, theirs)):
                lists[i] = hyps
        # 2. Stitched.
        parts: list[list[list[LabelHypothesis]]] = [[] for _ in range(number)]
        for utterance, hyps in zip(segments.utterances, lists):
            parts[utterance].append(hyps)
        return [
            [self.recognition(hyps, their) for hyps in stitch(mine, self.options.nbest)]
            for mine, their in zip(parts, said)
        ]

    def _languages(
        self, encoder_out: torch.Tensor, segments: Segments, codes: Sequence[Optional[str]]
    ) -> tuple[Optional[torch.Tensor], list[dict[str, str]]]:
        """Numbers of the languages (B,), or None; and what results say of them."""
        numbers = self.language_numbers(codes)
        if numbers is None:
            return None, [{} for _ in codes]
        languages, head = self.decoder.soft_prompt.languages, self.decoder.language_head
        if head is None:
            return numbers, [{LANG: languages.code_of(n)} for n in numbers.tolist()]
        # of the mean of all frames of an utterance, whatever segments they are in
        frames = segments.lengths.to(encoder_out.device)
        utterances = torch.tensor(segments.utterances, device=encoder_out.device)
        logits = head(encoder_out, frames) * frames[:, None]
        total = logits.new_zeros(len(codes), logits.size(1)).index_add_(0, utterances, logits)
        predicted = total.argmax(dim=1)
        numbers = torch.where(numbers == NOT_GIVEN, predicted, numbers)
        return numbers, [
            {LANG: languages.code_of(used), PREDICTED: languages.code_of(likeliest)}
            for used, likeliest in zip(numbers.tolist(), predicted.tolist())
        ]

    def language_numbers(self, codes: Sequence[Optional[str]]) -> Optional[torch.Tensor]:
        """Numbers of languages (B,), see :mod:`~espnet_llm_plugin.speech_llm.languages`; None if
        the model knows no languages."""
        languages = self.decoder.soft_prompt.languages
        if languages is None:
            return None
        return torch.tensor(languages.numbers(codes), device=self.device)

    def search(
        self,
        encoder_out: torch.Tensor,
        lengths: torch.Tensor,
        seconds: Optional[Sequence[Optional[float]]] = None,
        languages: Optional[torch.Tensor] = None,
    ) -> list[list[LabelHypothesis]]:
        """N-best lists of encoder outputs (B, T, D) of ``lengths`` (B,) frames.

        Args:
            encoder_out: On the model's device.
            lengths: Frames.
            seconds: Durations (B), for the limit of tokens a second.
            languages: Numbers (B,), from :meth:`language_numbers`; None: not given.

        Raises:
            UtteranceError: The audio does not fit the LLM's context, or has no frame.
        """
        used = self.options.weights.by_scorer()
        prepared = self.prepare(encoder_out, lengths, seconds, used, languages)
        return self.search_prepared(prepared, self.options.weights)

    @torch.inference_mode()
    def prepare(
        self,
        encoder_out: torch.Tensor,
        lengths: torch.Tensor,
        seconds: Optional[Sequence[Optional[float]]],
        used: Collection[str],
        languages: Optional[torch.Tensor] = None,
    ) -> Prepared:
        """What searches of a batch with different weights have in common.

        Args:
            encoder_out, lengths, seconds, languages: See :meth:`search`.
            used: Names of the scorers that some search needs.

        Raises:
            UtteranceError: See :meth:`search`.
        """
        if not int(lengths.min()):
            raise UtteranceError(
                "its audio is empty or too short: the encoder makes no frame of it"
            )
        options = self.options
        lengths = lengths.to(self.device)
        longest, shortest = length_limits(
            lengths.tolist(),
            seconds,
            maxlenratio=options.maxlenratio,
            minlenratio=options.minlenratio,
            max_tokens_per_second=options.max_tokens_per_second,
        )
        scorers: dict[str, Callable[[], TokenScorer]] = {}
        if DECODER in used or TEXT_LM in used:
            audio = self.decoder.adapt(encoder_out, lengths, languages)
        if DECODER in used:
            longest = self._within_context(audio.lengths.tolist(), longest)
            scorers[DECODER] = self._llm(audio)
        if TEXT_LM in used:  # with the same soft prompt
            nothing = encoder_out.new_zeros(len(encoder_out), 0, self.decoder.llm.hidden_size)
            scorers[TEXT_LM] = self._llm(Audio(nothing, torch.zeros_like(lengths), audio.soft))
        if LM in used:
            units = self.units
            scorers[LM] = lambda: ESPnetLM(self.lm, units.vocab_size, units.eos, self.device)
        ctc = None
        if CTC in used:
            ctc = (self.asr.model.ctc.log_softmax(encoder_out), lengths)
        shortest = [min(few, most) for few, most in zip(shortest, longest)]
        return Prepared(scorers, ctc, longest, shortest)

    def search_prepared(
        self, prepared: Prepared, weights: SearchWeights
    ) -> list[list[LabelHypothesis]]:
        """The n-best lists of a batch with some weights."""
        options, units, used = self.options, self.units, weights.by_scorer()
        ctc = None
        if CTC in used:
            ctc = JointCTC(
                *prepared.ctc,
                vocab_size=units.vocab_size,
                eos=units.eos,
                top_k=options.ctc_top_k,
                compress_threshold=options.ctc_compression,
            )
        search = LabelSearch(
            sos=self.decoder.prompt.sos,
            eos=units.eos,
            vocab_size=units.vocab_size,
            beam_size=options.beam_size,
            nbest=options.nbest,
            weights=weights,
            end_detection=options.end_detection,
            guard=options.guard,
            forbidden=self._forbidden,
        )
        return search(
            {name: make() for name, make in prepared.scorers.items() if name in used},
            prepared.longest,
            ctc=ctc,
            min_tokens=prepared.shortest,
            device=self.device,
        )

    def _llm(self, audio: Audio) -> Callable[[], TokenScorer]:
        """Scorers that begin after prompt and audio."""
        state = self.decoder.start_after(audio)
        return lambda: LLMScorer(self.decoder, state, self.decoder.scored)

    def _within_context(self, embeddings: Sequence[int], longest: Sequence[int]) -> list[int]:
        """Length limits (B) that the LLM's context allows after so many embeddings (B)."""
        context, prompt = self.decoder.context, self.decoder.prompt_length
        if context is None:
            return list(longest)
        taken = embeddings if self.decoder.interface.audio_takes_positions else [0] * len(longest)
        room = [context - number - prompt for number in taken]
        if min(room) < 1:
            raise UtteranceError(
                f"its audio is {max(taken)} embeddings and the prompt {prompt} tokens, which leave "
                f"no room for text in the {context} tokens that the LLM can see: cut it by "
                "--long_form silence (or ctc) and a smaller --max_segment_seconds"
            )
        return [min(most, tokens) for most, tokens in zip(longest, room)]

    def recognition(
        self, hyps: Sequence[LabelHypothesis], languages: Optional[Mapping[str, str]] = None
    ) -> Recognition:
        """Tokens and text of the hypotheses of an utterance's segments."""
        texts = [self.text(hyp.tokens) for hyp in hyps]
        whole = joined(hyps)
        ids = list(whole.tokens)
        text = None
        if None not in texts:
            # A language that separates words needs a space where segments meet.
            space = " " if self._has_spaces else ""
            text = space.join(filter(None, texts))
        return Recognition(text, self.asr.text.tokens(ids), ids, whole, languages or {})

    def text(self, tokens: Sequence[int]) -> Optional[str]:
        """Text of token ids; None without a tokenizer."""
        if isinstance(self.units, NativeUnits):
            return self.units.decode(tokens)
        return self.asr.text.text(self.asr.text.tokens(tokens))

    @property
    def _has_spaces(self) -> bool:
        marks = ("▁", "Ġ", "<space>", " ")
        return any(token.startswith(marks) for token in self.asr.model.token_list)


def has_token_ctc(asr: LoadedASR) -> bool:
    """Whether the model has a CTC head that scores the decoder's tokens.

    Its blank takes the place of token 0, which is the end symbol of a few LLMs (Pythia).
    """
    ctc = asr.model.ctc
    known = ctc is not None and isinstance(ctc.vocabulary, TokenVocabulary)
    return known and asr.model.eos != 0


def check_options(asr: LoadedASR, options: SpeechLLMOptions, has_lm: bool) -> None:
    """Refuse what a model cannot do.

    Raises:
        UserError: A CTC weight without a CTC head over the decoder's tokens, an LM weight without
            LM, segments of input that is no waveform, or by CTC without a CTC head.
    """
    weights, method = options.weights, options.long_form.method
    if weights.ctc_weight and not has_token_ctc(asr):
        found = "no CTC head" if asr.model.ctc is None else "a CTC head over other labels"
        if asr.model.eos == 0:
            found = "the end symbol at token 0, where CTC has its blank"
        raise UserError(
            f"--ctc_weight {weights.ctc_weight}: the model has {found}, which cannot score the "
            "decoder's tokens; use --ctc_weight 0"
        )
    if weights.lm_weight and not has_lm:
        raise UserError("an LM weight is given, but no LM: add --lm_train_config and --lm_file")
    if method != "off" and asr.sample_rate is None:
        raise UserError(f"--long_form {method} cuts waveforms, but this model reads features")
    if method == "ctc" and asr.model.ctc is None:
        raise UserError("--long_form ctc needs a CTC head; use --long_form silence")


def default_ctc_weight(asr: LoadedASR, given: float, is_default: bool) -> float:
    """``given``, or 0 where it is only ESPnet's default and the model has no CTC for it."""
    if is_default and not has_token_ctc(asr):
        logging.warning(
            "the model has no CTC head that scores its decoder's tokens: --ctc_weight is 0"
        )
        return 0.0
    return given
