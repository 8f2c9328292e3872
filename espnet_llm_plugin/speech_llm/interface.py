"""How an LLM sees audio: what every interface does, in training and in decoding.

B utterances, P embeddings of the audio, D their width (that of the LLM's embeddings), U tokens,
V output rows of the LLM, N rows (hypotheses), K LLM layers.

The LLM reads ``[before; soft; audio; after; text]``, where ``before`` and ``after`` are the token
ids of a prompt, the same for all utterances, ``soft`` are learnt vectors (none by default), and the
text begins with BOS.
"""

from abc import ABC, abstractmethod
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.fast import fast_decoder, why_not_fast
from espnet_llm_plugin.llm.fast_decoder import FastDecoder
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.attention import check_read, installed, why_no_reading
from espnet_llm_plugin.speech_llm.llm_parts import llm_logits, llm_outputs
from espnet_llm_plugin.speech_llm.sequence import check_length
from espnet_llm_plugin.speech_llm.state import SpeechState, Step

INTERFACES = ("prefix", "merged", "cross_attention")


def build_interface(name: str, llm: Any, conf: Optional[Mapping[str, Any]] = None) -> "Interface":
    """The interface called ``name``, one of ``INTERFACES``.

    Args:
        name: Which.
        llm: A :class:`~espnet_llm_plugin.llm.tuning.TunedLLM`; it does not become a submodule.
        conf: Options of the interface's class.

    Raises:
        UserError: Unknown name or option, or masks that the LLM's kind of attention lacks.
    """
    from espnet_llm_plugin.speech_llm.cross_attention import CrossAttentionInterface
    from espnet_llm_plugin.speech_llm.merged import MergedInterface
    from espnet_llm_plugin.speech_llm.prefix import PrefixInterface

    classes = dict(zip(INTERFACES, (PrefixInterface, MergedInterface, CrossAttentionInterface)))
    if name not in classes:
        raise UserError(f"unknown interface {name!r}; expected one of {', '.join(INTERFACES)}.")
    conf = dict(conf or {})
    refuse_unknown(f"interface_conf of {name!r}", conf, classes[name].__init__, ("self", "llm"))
    interface = classes[name](llm, **conf)
    kernel = getattr(llm, "attn_implementation", "sdpa")
    if kernel not in ("sdpa", "eager") and interface.needs_masks:
        raise UserError(
            f"attn_implementation {kernel!r} knows no masks like those of interface {name!r} with "
            f"{conf or 'its defaults'}: use `sdpa`, or the interface `prefix` with a causal mask "
            "and padding on the right."
        )
    return interface


class Interface(torch.nn.Module, ABC):
    """How an LLM sees audio.

    Training: ``logits, hidden = interface(audio, audio_lengths, text, text_lengths, before=(),
    after=(), soft=None)``. Decoding: ``state = interface.start(audio, audio_lengths, before=(),
    after=(), soft=None)``, then ``logits, state = interface.step(tokens, state, parents)`` token by
    token. Teacher-forced and stepwise logits are the same, and so are those of a batch and of each
    utterance alone. Both follow the module's mode: call ``eval()`` before decoding.

    Audio of length 0, or P = 0, is the LLM without audio.

    Args:
        llm: Has ``model(device)``, ``embed(ids)``, ``context`` and ``config`` as
            :class:`~espnet_llm_plugin.llm.tuning.TunedLLM`. Who builds the interface registers it;
            here it is no submodule.

    Attributes:
        audio_takes_positions: Whether audio counts in the LLM's context.
        needs_masks: Whether the attention of training is more than causal.
    """

    audio_takes_positions = True
    needs_masks = True
    _only_attention = True  # nothing but the attention differs from the LLM without audio

    def __init__(self, llm: Any):
        super().__init__()
        self._llm = (llm,)  # in a tuple: no submodule
        # Of the model that `start` has seen: itself, and its fast steps if it has any.
        self._checked: tuple[Any, ...] = ()
        self._fast: tuple[FastDecoder, ...] = ()

    @property
    def llm(self) -> Any:
        return self._llm[0]

    @abstractmethod
    def forward(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        soft: Optional[Tensor] = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Teacher-forced logits.

        Args:
            audio: Embeddings (B, P, D), padded on the right.
            audio_lengths: (B,), in [0, P].
            text: Token ids (B, U), BOS first; anything valid beyond the lengths.
            text_lengths: (B,).
            before: Ids of the prompt before the audio.
            after: Ids between audio and text.
            soft: Vectors right before the audio (B, n, D), which the mask treats as audio.

        Returns:
            Logits (B, U, V) of the token after each of the text, in the precision of the LLM
            (anything beyond the lengths), and outputs of the LLM for auxiliary losses: ``audio``
            (B, P, width), those at the audio, if the interface computes any (``prefix``).

        Raises:
            UserError: More positions than the LLM can see.
        """

    @torch.no_grad()
    def start(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        soft: Optional[Tensor] = None,
    ) -> Any:
        """State of B utterances before their text: audio and prompt are computed here, once.

        Arguments and errors as for :meth:`forward`. Row u of the state is utterance u.
        """
        model = self.llm.model(audio.device)
        if not any(model is checked for checked in self._checked):
            self._check(model, audio.device)
            self._checked = (model,)
        for fast in self._fast:
            fast.refresh()
        return self._start(audio, audio_lengths, tuple(before), tuple(after), soft)

    @torch.no_grad()
    def step(
        self, tokens: Tensor, state: Any, parents: Optional[Tensor] = None
    ) -> tuple[Tensor, Any]:
        """One more token for each of N rows.

        Args:
            tokens: Of each row (N,): BOS at first.
            state: From :meth:`start` or a previous step; not modified, and may be used again.
            parents: Rows (N,) of ``state`` that the new rows follow, in any order and number (at
                first utterances); None: each row once, in order.

        Returns:
            Logits (N, V) of the next token, in the precision of the LLM, and the state of the N
            rows. Its ``utterance`` (N,) are their utterances' numbers.

        Raises:
            UserError: More positions than the LLM can see.
        """
        if parents is None:
            parents = torch.arange(len(tokens), device=tokens.device)
        longest, context = state.length + 1, self.llm.context
        if context is not None and longest > context:
            # of rows that may have been given up; looked at only here: a GPU has to wait for it
            longest = int(state.positions[parents].max()) + 1
        check_length(longest, context, "audio, prompt and hypothesis")
        return self._step(tokens, state, parents)

    def attention_mass(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        soft: Optional[Tensor] = None,
    ) -> Tensor:
        """How much attention text gives to audio: (B, K).

        For each layer the sum of the attention weights on the audio, averaged over heads and the
        positions of the text. Arguments as for :meth:`forward`. About
        P / (P + U) says nothing; about 0 in all layers says that the audio is ignored.
        """
        raise UserError(
            f"{type(self).__name__}: audio and text do not share the LLM's attention; look at "
            "`gates()` instead"
        )

    @abstractmethod
    def _start(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        before: tuple,
        after: tuple,
        soft: Optional[Tensor] = None,
    ) -> SpeechState: ...

    def _step(self, tokens: Tensor, state: Any, parents: Tensor) -> tuple[Tensor, Any]:
        model = self.llm.model(tokens.device)
        step = self._reading(state, parents)
        if self._fast and not model.training:
            return self._fast_step(self._fast[0], tokens, step), step.state()
        # Not None: that would be made into a mask, which nobody reads.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        with installed(model):
            outputs = llm_outputs(
                model,
                self.llm.embed(tokens[:, None]),
                mask=mask,
                positions=step.positions[:, None],
                reading=step,
            )
        check_read(model, step)
        return llm_logits(model, outputs[:, 0]), step.state()

    def _fast_step(self, fast: FastDecoder, tokens: Tensor, step: Step) -> Tensor:
        heads = [fast.heads, fast.kv_heads, fast.kv_heads]
        return fast.forward(
            tokens,
            step.positions,
            step.length,
            lambda layer, qkv: step.attend_rows(layer, *qkv.split(heads, dim=1)),
        )

    def _reading(self, state: SpeechState, parents: Tensor) -> Step:
        return Step(state, parents)

    def _check(self, model: Any, device: torch.device) -> None:
        """Refuse an LLM whose stepwise logits are not the teacher-forced ones."""
        reason = self._why_no_steps(model, device)
        if reason is not None:
            raise UserError(
                f"{type(self).__name__} cannot decode with {type(model).__name__} ({reason}); use "
                "`interface: prefix`."
            )

    def _why_no_steps(self, model: Any, device: torch.device) -> Optional[str]:
        """Why hypotheses cannot share keys and values; None: they can. Finds the fastest way."""
        self._fast = ()
        reason = why_no_reading(model.config)
        if reason is None and self._only_attention and why_not_fast(model) is None:
            self._fast = (fast_decoder(model),)
            if self._difference(model, device) is None:
                return None
            self._fast = ()
        return reason or self._difference(model, device)

    def _difference(self, model: Any, device: torch.device) -> Optional[str]:
        """How stepwise and teacher-forced logits differ on a small ragged batch; None: not."""
        embeddings = model.get_input_embeddings()
        ids = torch.tensor([[3, 5, 2], [7, 1, 4]], device=device) % embeddings.num_embeddings
        lengths = torch.tensor([2, 1], device=device)
        training = model.training
        model.eval()
        try:
            audio = self.llm.embed(ids[:, :2]) + self.llm.embed(ids[:, 1:])
            prompt = (embeddings.num_embeddings - 1,)
            expected, _ = self(audio, lengths, ids, torch.full_like(lengths, 3), before=prompt)
            state = self._start(audio, lengths, prompt, ())
            parents = torch.arange(2, device=device)
            found = []
            for column in ids.T:
                logits, state = self._step(column, state, parents)
                found.append(logits)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # any other failure means: not this way
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            model.train(training)
        expected, actual = expected.float(), torch.stack(found, dim=1).float()
        half = model.dtype in (torch.float16, torch.bfloat16)
        scale = expected.std().clamp(min=1e-6)
        difference = float(((actual - expected).abs().max() / scale).nan_to_num(float("inf")))
        if difference > (0.3 if half else 1e-3):
            return f"stepwise and full logits differ by {difference:.2g} standard deviations"
        return None

    def _tokens(self, ids: Sequence[int], batch: int, device: Any) -> tuple[Tensor, Tensor]:
        """Embeddings (B, n, D) of the same ids in every utterance, and their lengths (B,)."""
        ids = torch.tensor(list(ids), dtype=torch.long, device=device)
        lengths = torch.full((batch,), len(ids), dtype=torch.long, device=device)
        return self.llm.embed(ids).expand(batch, -1, -1), lengths

    def _before(
        self, ids: Sequence[int], soft: Optional[Tensor], batch: int, device: Any
    ) -> tuple[Tensor, Tensor]:
        """What comes before the audio: embeddings (B, n, D) of ids, then ``soft``; lengths (B,)."""
        embeddings, lengths = self._tokens(ids, batch, device)
        if soft is None:
            return embeddings, lengths
        return torch.cat([embeddings, soft.to(embeddings)], dim=1), lengths + soft.size(1)

    def _audio(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Audio in the precision of the LLM's embeddings, and lengths as indices."""
        audio = audio.to(self.llm.model(audio.device).dtype)
        return audio, lengths.to(device=audio.device, dtype=torch.long)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_checked": (), "_fast": ()}
