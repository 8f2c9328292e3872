"""The LLM that reads an utterance, as an ESPnet decoder.

B utterances, T encoder frames, E encoder width, P embeddings of the audio, D width of the LLM,
U tokens, V tokens of the token list, N hypotheses, C labels and blank of the CTC.
"""

from typing import Any, Mapping, NamedTuple, Optional, Sequence, Union

import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from espnet2.asr.decoder.abs_decoder import AbsDecoder
from torch import Tensor

from espnet_llm_plugin.encoder.adapters import build_adapter
from espnet_llm_plugin.errors import UserError, UtteranceError
from espnet_llm_plugin.llm.embedding_scale import text_embedding_scale
from espnet_llm_plugin.llm.tuning import TunedLLM
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.heads.ctc import VocabularyCTC
from espnet_llm_plugin.speech_llm.interface import build_interface
from espnet_llm_plugin.speech_llm.language_head import LanguageHead
from espnet_llm_plugin.speech_llm.languages import NOT_GIVEN
from espnet_llm_plugin.speech_llm.prompt import PromptRecord, make_prompt
from espnet_llm_plugin.speech_llm.soft_prompt import make_soft_prompt
from espnet_llm_plugin.speech_llm.units import label_units

# Finite: minus infinity times a weight of zero would be NaN.
_UNSCORED = -1.0e9


class Audio(NamedTuple):
    """What the LLM gets of the audio of a batch, and the soft prompt before it."""

    embeddings: Tensor  # (B, P, D)
    lengths: Tensor  # (B,)
    soft: Optional[Tensor] = None  # (B, K, D)

    def select(self, rows: Tensor) -> "Audio":
        """The utterances at ``rows`` (K,), in that order."""
        return self.shorten(int(self.lengths.max()), rows)

    def shorten(self, longest: int, rows: Union[Tensor, slice] = slice(None)) -> "Audio":
        """At most ``longest`` embeddings of the utterances at ``rows``."""
        lengths = self.lengths[rows].clamp(max=longest)
        soft = None if self.soft is None else self.soft[rows]
        return Audio(self.embeddings[rows, : int(lengths.max())], lengths, soft)


class Row(NamedTuple):
    """State of one hypothesis of ESPnet's searches.

    Attributes:
        state: Of the interface, for several hypotheses.
        index: Its row in it.
        length: Tokens that it has read.
        room: Tokens that it can read.
    """

    state: Any
    index: int
    length: int
    room: float


class SpeechLLMDecoder(AbsDecoder, BatchScorerInterface):
    """Encoder output -> adapter -> ``[before; soft prompt; audio; after; BOS; text]`` -> LLM ->
    next tokens.

    [Prompting Large Language Models with Speech Recognition Abilities, arXiv 2307.11795; LLMs and
    Speech: Integration vs. Combination, arXiv 2603.15045; soft prompts: arXiv 2406.14701]

    Args:
        vocab_size: V.
        encoder_output_size: E.
        llm: directory or hub id of the LLM, with its own tokens (``token_type: hugging_face``) or
            adapted to the token list.
        tuning: ``frozen``, ``lora`` or ``full``.
        lora_conf: options of LoRA, see :class:`TunedLLM`.
        train_embeddings: train the LLM's embeddings; by default with ``full`` alone.
        dtype: of the LLM's frozen weights and its computation.
        gradient_checkpointing: trade compute for memory in training.
        attn_implementation: of transformers.
        adapter: ``frame_stacking``, ``ctc_compression`` or ``ctc_embedding``.
        adapter_conf: its options.
        interface: how the LLM sees the audio: ``prefix``, ``merged`` or ``cross_attention``.
        interface_conf: its options.
        prompt: see :func:`~espnet_llm_plugin.speech_llm.prompt.make_prompt`.
        soft_prompt: learnt vectors before the audio: ``none``, ``shared`` or ``per_language``.
        soft_prompt_conf: see :class:`~espnet_llm_plugin.speech_llm.soft_prompt.SoftPromptOptions`.
        language_prediction: with ``per_language``, predict the language where it is not given.

    Attributes:
        units: What the token ids mean.
        prompt: Token ids around the audio.
        soft_prompt: Its languages are None if it knows none.
        language_head: None if no language is predicted.
        scored: (V,) bool, the tokens that can be text.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_output_size: int,
        llm: Optional[str] = None,
        tuning: str = "lora",
        lora_conf: Optional[Mapping[str, Any]] = None,
        train_embeddings: Optional[bool] = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
        adapter: str = "frame_stacking",
        adapter_conf: Optional[Mapping[str, Any]] = None,
        interface: str = "prefix",
        interface_conf: Optional[Mapping[str, Any]] = None,
        prompt: Union[str, Mapping[str, Any]] = "none",
        soft_prompt: str = "none",
        soft_prompt_conf: Optional[Mapping[str, Any]] = None,
        language_prediction: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        reserved = ("self", "vocab_size", "encoder_output_size")
        refuse_unknown("decoder_conf of 'speech_llm'", unknown, SpeechLLMDecoder.__init__, reserved)
        if llm is None:
            raise UserError("decoder_conf of 'speech_llm' needs llm, the LLM's directory or hub id")
        self.units = label_units(llm, vocab_size)
        self.llm = TunedLLM(
            llm,
            tuning=tuning,
            lora_conf=lora_conf,
            train_embeddings=train_embeddings,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            attn_implementation=attn_implementation,
        )
        self.soft_prompt = make_soft_prompt(
            soft_prompt, soft_prompt_conf, self.units, llm, self.llm.hidden_size
        )
        self.prompt = make_prompt(prompt, self.units, self.llm.context, self.soft_prompt.length)
        self.prompt_record = PromptRecord(self.prompt)
        conf = dict(adapter_conf or {})
        text_scale = None
        if adapter == "ctc_embedding" or conf.get("match_text_scale"):
            text_scale = text_embedding_scale(llm, self.units.scored_range[1])
        self.adapter = build_adapter(
            adapter, encoder_output_size, self.llm.hidden_size, text_scale=text_scale, **conf
        )
        self.interface = build_interface(interface, self.llm, interface_conf or {})
        self.language_head: Optional[LanguageHead] = None
        if language_prediction:
            if self.soft_prompt.languages is None:
                raise UserError(
                    "decoder_conf: language_prediction needs `soft_prompt: per_language`, got "
                    f"`soft_prompt: {soft_prompt}`"
                )
            self.language_head = LanguageHead(self.soft_prompt.languages, encoder_output_size)
        self.register_buffer("scored", self.units.scored, persistent=False)
        self._ctc: tuple[VocabularyCTC, ...] = ()

    @property
    def context(self) -> Optional[int]:
        """Tokens that the LLM can see, None: any number."""
        return self.llm.context

    @property
    def prompt_length(self) -> int:
        """Positions that are neither audio nor text: tokens around the audio and soft prompt."""
        return self.prompt.length + self.soft_prompt.length

    def use_ctc(self, ctc: VocabularyCTC) -> None:
        """Let the adapter have the CTC layer of the model, which stays the model's."""
        self._ctc = (ctc,)  # in a tuple: not a module of this one

    def room(self, text_lengths: Tensor) -> Tensor:
        """Embeddings of audio (B,) that the LLM can see beside the prompt and texts (B,)."""
        if self.context is None:
            return torch.full_like(text_lengths, torch.iinfo(text_lengths.dtype).max)
        room = self.context - self.prompt_length - text_lengths
        if self.interface.audio_takes_positions:
            return room
        return room.masked_fill(room >= 0, torch.iinfo(text_lengths.dtype).max)

    def adapt(self, hs_pad: Tensor, hlens: Tensor, languages: Optional[Tensor] = None) -> Audio:
        """Encoder output (B, T, E) of lengths (B,) -> embeddings of the audio.

        Args:
            hs_pad, hlens: As above.
            languages: Numbers (B,), see :mod:`~espnet_llm_plugin.speech_llm.languages`; None: not
                given. What is not given is predicted by a model that can, but not in training.
        """
        log_probs = label_embeddings = None
        if self.adapter.needs_ctc:
            (ctc,) = self._ctc
            log_probs = ctc.label_log_probs(hs_pad)
            if self.adapter.needs_label_embeddings:
                tokens = ctc.vocabulary.label_tokens(blank=self.units.silence_token())
                label_embeddings = self.llm.embed(tokens.to(hs_pad.device))
        if self.language_head is not None and not self.training:
            predicted = self.language_head.predict(hs_pad, hlens)
            given = predicted * 0 + NOT_GIVEN if languages is None else languages.to(predicted)
            languages = torch.where(given == NOT_GIVEN, predicted, given)
        soft = self.soft_prompt(languages, len(hs_pad))
        return Audio(*self.adapter(hs_pad, hlens, log_probs, label_embeddings), soft)

    def text_logits(
        self, audio: Audio, tokens: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Teacher-forced logits (B, U, V), and the LLM's outputs (B, P, D) at the audio.

        Args:
            audio: Of the utterances.
            tokens: (B, U) token ids, the first ``prompt.sos``; anything valid beyond the lengths.
            lengths: (B,).
        """
        logits, hidden = self.interface(
            audio.embeddings,
            audio.lengths,
            tokens,
            lengths,
            before=self.prompt.before,
            after=self.prompt.after,
            soft=audio.soft,
        )
        return logits[..., : len(self.scored)], hidden.get("audio")

    def forward(
        self, hs_pad: Tensor, hlens: Tensor, ys_in_pad: Tensor, ys_in_lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ESPnet's convention: teacher-forced logits (B, U, V) and lengths (B,).

        Args:
            hs_pad: (B, T, E) encoder output.
            hlens: (B,).
            ys_in_pad: (B, U) sos and text; anything valid beyond the lengths.
            ys_in_lens: (B,).
        """
        logits, _ = self.text_logits(self.adapt(hs_pad, hlens), ys_in_pad, ys_in_lens)
        return logits.float().masked_fill(~self.scored, _UNSCORED), ys_in_lens

    # --- decoding of a batch: see the search ---

    @torch.no_grad()
    def start(self, hs_pad: Tensor, hlens: Tensor) -> Any:
        """State of a batch of utterances before the text, for :meth:`step`; see ``forward``."""
        return self.start_after(self.adapt(hs_pad, hlens))

    @torch.no_grad()
    def start_without_audio(self, batch_size: int, device: torch.device) -> Any:
        """As :meth:`start`, with the prompts but no audio: the LLM as a language model."""
        nothing = torch.zeros(batch_size, 0, self.llm.hidden_size, device=device)
        lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        return self.start_after(Audio(nothing, lengths, self.soft_prompt(None, batch_size)))

    def start_after(self, audio: Audio) -> Any:
        """As :meth:`start`, from the embeddings of the audio."""
        return self.interface.start(
            audio.embeddings,
            audio.lengths,
            before=self.prompt.before,
            after=self.prompt.after,
            soft=audio.soft,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Any, parents: Tensor) -> tuple[Tensor, Any]:
        """Logits (N, V) float32 after ``tokens`` (N,), those that are no text masked, and a state.

        Args:
            tokens: The next token of each row; ``prompt.sos`` at first.
            state: From :meth:`start` or a previous step.
            parents: (N,) rows of ``state`` that they follow: utterances at first.
        """
        logits, state = self.interface.step(tokens, state, parents)
        logits = logits[..., : len(self.scored)].float()
        return logits.masked_fill(~self.scored, _UNSCORED), state

    # --- ESPnet's BeamSearch and BatchBeamSearch: one utterance at a time ---

    @torch.no_grad()
    def init_state(self, x: Tensor) -> Row:
        """State of the utterance with encoder output x (T, E), computed once for all hypotheses.

        Raises:
            UtteranceError: It is empty, or does not fit the LLM's context.
        """
        audio = self.adapt(x[None], torch.tensor([len(x)], device=x.device))
        if int(audio.lengths) == 0:
            raise UtteranceError("the encoder makes no frame of the audio: it is empty")
        room = int(self.room(torch.zeros_like(audio.lengths)))
        left = float("inf")
        if self.context is not None:
            taken = int(audio.lengths) if self.interface.audio_takes_positions else 0
            left = self.context - self.prompt_length - taken + 1
        if int(audio.lengths) >= room:
            raise UtteranceError(
                f"the audio has {int(audio.lengths)} embeddings, the prompt {self.prompt_length} "
                f"tokens: the LLM sees {self.context}, which leaves nothing for the text. Decode "
                "shorter segments (bin.asr_inference cuts long audio), or train with more frames "
                "stacked (adapter_conf)"
            )
        return Row(self.start_after(audio), 0, 0, left)

    def score(self, y: Tensor, state: Row, x: Tensor) -> tuple[Tensor, Row]:
        """Log-probs (V,) of the token after prefix y (U,), and its state."""
        log_probs, states = self.batch_score(y[None], [state], x[None])
        return log_probs[0], states[0]

    @torch.no_grad()
    def batch_score(
        self, ys: Tensor, states: Sequence[Optional[Row]], xs: Tensor
    ) -> tuple[Tensor, list[Row]]:
        """Log-probs (N, V) of the tokens after prefixes ys (N, U), and their states.

        Args:
            ys: Prefixes, sos first.
            states: Of the prefixes, without their last token; None: of no token.
            xs: (N, T, E) encoder output.
        """
        rows = [self.init_state(x) if row is None else row for row, x in zip(states, xs)]
        log_probs: list[Any] = [None] * len(rows)
        new: list[Any] = [None] * len(rows)
        # one group, unless the hypotheses come from several searches
        groups: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((id(row.state), row.length), []).append(i)
        for members in groups.values():
            first = rows[members[0]]
            state = first.state
            parents = torch.tensor([rows[i].index for i in members], device=ys.device)
            for position in range(first.length, ys.shape[1]):
                logits, state = self.step(ys[members, position], state, parents)
                parents = torch.arange(len(members), device=ys.device)
            if ys.shape[1] >= first.room:  # only the end fits
                end = torch.arange(logits.shape[1], device=logits.device) == self.units.eos
                logits = logits.masked_fill(~end, _UNSCORED)
            for index, (i, row) in enumerate(zip(members, logits.log_softmax(dim=-1))):
                log_probs[i] = row
                new[i] = Row(state, index, ys.shape[1], rows[i].room)
        return torch.stack(log_probs), new
