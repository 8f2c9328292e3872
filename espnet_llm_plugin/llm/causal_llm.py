"""A Hugging Face causal LM as a language model of ESPnet's LMTask (``--lm causal_llm``).

B: sentences, L: tokens of the longest, N: prefixes, V: vocabulary, with ``<blank>`` 0 and
``<sos/eos>`` V-1, or in an LLM's own tokens (see :mod:`espnet_llm_plugin.llm.own_tokens`).
"""

from typing import Any, Mapping, Optional, Sequence

import torch
from espnet2.lm.abs_model import AbsLM

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import FrozenLLM, LLMIdentity, load_causal_lm, no_attention
from espnet_llm_plugin.llm.directory import set_special_ids
from espnet_llm_plugin.llm.own_tokens import OwnTokens, check_vocab_size, has_own_tokens
from espnet_llm_plugin.llm.prefix_state import PrefixState, TokenTree
from espnet_llm_plugin.llm.state import PrefixLM
from espnet_llm_plugin.llm.tuning import TunedLLM

# Finite: minus infinity times a fusion weight of zero would be NaN.
_MASKED = -1.0e9
_OLD_CONFIG_KEYS = {"rope_theta", "rope_scaling"}


class CausalLLM(AbsLM):
    """Train a small LM from a config, fine-tune an adapted LLM, or use one as it is.

    Exactly one of ``llm`` and ``config``:

    Args:
        vocab_size: V, from LMTask.
        llm: LLM directory over this token list (written by ``adapt_vocabulary`` or
            ``export_llm``), or any LLM if the list is that of its own tokens (``token_type:
            hugging_face``).
        config: Hugging Face configuration of a model to train from scratch, e.g.
            ``{model_type: llama, hidden_size: 256, num_hidden_layers: 4, ...}``.
        tuning: How ``llm`` is trained: ``full``, all its weights, which are saved; or ``lora``,
            of which checkpoints hold the low-rank matrices alone (``export_llm`` merges them).
        lora_conf: Options of LoRA, see :class:`espnet_llm_plugin.llm.lora.LoraOptions`.
        frozen: Use ``llm`` without training it. Its weights never reach a checkpoint; its
            fingerprint does, and is checked at load. Not for ``lm_train``: every LLM directory
            comes with ``espnet_lm.yaml`` and ``espnet_lm.pth`` to decode with.
        dtype: Of weights that are not trained, those of a ``frozen`` LLM or below LoRA
            (``float32``, ``bfloat16``, ``float16``, ``auto``). Otherwise training takes ESPnet's
            ``train_dtype`` and ``use_amp``.
        gradient_checkpointing: Trade compute for memory in training.
        attn_implementation: ``sdpa``, or ``eager`` for instance.

    Raises:
        UserError: A wrong combination of options, an LLM over another vocabulary, a config that
            transformers refuses; at load also a missing tensor or another LLM than recorded.
    """

    # One batch may hold prefixes of different lengths (padded on the left with 0), several tokens
    # longer than their states and beginnings of each other.
    batch_any_length = batch_any_extension = True

    def __init__(
        self,
        vocab_size: int,
        llm: Optional[str] = None,
        config: Optional[dict] = None,
        tuning: str = "full",
        lora_conf: Optional[Mapping[str, Any]] = None,
        frozen: bool = False,
        dtype: Optional[str] = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        check_options(llm, config, tuning, lora_conf, frozen, dtype, gradient_checkpointing)
        self.vocab_size = vocab_size
        self.sos = vocab_size - 1
        self._frozen_llm: Optional[FrozenLLM] = None
        self._prefix_lm: Optional[PrefixLM] = None
        self._own: Optional[OwnTokens] = None
        if llm is not None:
            check_vocab_size(llm, vocab_size)
            self._own = OwnTokens(llm, vocab_size) if has_own_tokens(llm) else None
        if frozen:
            self._frozen_llm = FrozenLLM(llm, dtype=dtype or "float32")
            self.identity = LLMIdentity(self._frozen_llm)
            return
        if tuning == "lora":
            self.tuned = TunedLLM(
                llm,
                tuning="lora",
                lora_conf=lora_conf,
                dtype=dtype or "float32",
                gradient_checkpointing=gradient_checkpointing,
                attn_implementation=attn_implementation,
            )
            self.train()
            return
        if llm is not None:
            self.llm = load_causal_lm(llm, attn_implementation=attn_implementation)
            self.llm.requires_grad_(True)
        else:
            self.llm = build_from_config(config, vocab_size, attn_implementation)
        if gradient_checkpointing:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        self.train()

    def model(self, device: Any = "cpu") -> Any:
        """The Hugging Face model (what is not trained of it is loaded and moved to ``device``)."""
        if hasattr(self, "tuned"):
            return self.tuned.model(device)
        return self.llm if self._frozen_llm is None else self._frozen_llm.model(device)

    def forward(self, input: torch.Tensor, hidden: None = None) -> tuple[torch.Tensor, None]:
        """Logits for training and perplexity.

        Args:
            input: Token ids (B, L) beginning with sos, padded on the right with 0.
            hidden: Unused.

        Returns:
            Logits (B, L, V) float32 with blank masked, and ``None``.

        Raises:
            UserError: Text with a token that ESPnet takes for sos/eos (an LLM's own tokens).
        """
        if self._own is not None:
            input = self._own.inputs(input)
        # Causality hides the padding, so the mask is all ones and SDPA takes its causal kernel.
        # Given explicitly because OPT counts positions in it.
        output = self.model(input.device)(
            input_ids=input, attention_mask=torch.ones_like(input), use_cache=False
        )
        return self._outputs(output.logits.float()), None

    def zero_state(self) -> None:
        """State of the empty prefix (ESPnet's transducer searches ask for it)."""
        return None

    def score(
        self, y: torch.Tensor, state: Optional[PrefixState], x: Any
    ) -> tuple[torch.Tensor, PrefixState]:
        """Log-probs (V,) of the token after prefix ``y`` and the state of ``y``.

        Args:
            y: Prefix (L,) including sos.
            state: State of a shorter prefix of ``y``, or ``None``.
            x: Unused.
        """
        log_probs, states = self.batch_score(y[None], [state], x)
        return log_probs[0], states[0]

    @torch.no_grad()
    def batch_score(
        self, ys: torch.Tensor, states: Sequence[Optional[PrefixState]], xs: Any
    ) -> tuple[torch.Tensor, list[PrefixState]]:
        """As :meth:`score` for N prefixes, in one forward of one token each when states are given.

        Args:
            ys: Prefixes (N, L) including sos; shorter ones padded on the left with 0. A single
                column with states is the last token of each prefix, as ESPnet's time-synchronous
                transducer searches give it.
            states: N states, never modified.
            xs: Unused.

        Returns:
            Log-probs (N, V) with blank masked, and N new states.
        """
        if hasattr(self, "tuned"):
            self.tuned.merge()  # decoding costs that of the plain LLM; no training after it
        if self._prefix_lm is None or self._prefix_lm.model is not self.model(ys.device):
            self._prefix_lm = PrefixLM(self.model(ys.device))
        starts: list[Optional[PrefixState]] = []
        pending: list[list[int]] = []
        for row, state in zip(ys.tolist(), states):
            start, tokens = self._missing(row, state)
            starts.append(start)
            pending.append(tokens)
        if max(map(len, pending)) == 1:
            logits, new = self._prefix_lm.step([tokens[0] for tokens in pending], starts)
            return self._outputs(logits).log_softmax(dim=-1), new
        # Prefixes that are longer by several tokens, or whose states are lost: what they have in
        # common is read once, in one forward.
        tree = TokenTree()
        ends = [tree.add(start, tokens) for start, tokens in zip(starts, pending)]
        logits, new = self._prefix_lm.grow(tree.tokens, tree.parents)
        return self._outputs(logits[ends]).log_softmax(dim=-1), [new[end] for end in ends]

    def _missing(
        self, row: list[int], state: Optional[PrefixState]
    ) -> tuple[Optional[PrefixState], list[int]]:
        """The state to go on from and the tokens to send through the LLM after it."""
        if state is not None and len(row) == 1:
            return state, row
        if self._own is not None:  # whose token 0 is one like others
            row = self._own.prefix(row)
            begin = 0
        else:
            begin = next((i for i, token in enumerate(row) if token != 0), len(row))
        tokens = row[begin:]
        if self._own is None and (not tokens or tokens[0] != self.sos):
            tokens = [self.sos, *tokens]  # transducer searches begin with blank
        known = 0 if state is None else state.length
        if 0 < known < len(tokens) and state.is_of(tokens[:known]):
            return state, tokens[known:]
        return None, tokens  # no state, or one of another prefix: from the start

    def _outputs(self, logits: torch.Tensor) -> torch.Tensor:
        if self._own is not None:
            return self._own.outputs(logits)
        blank = torch.arange(logits.shape[-1], device=logits.device) == 0
        return logits.masked_fill(blank, _MASKED)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # ESPnet loads with strict=False, under which a wrong file would load in silence.
        own = dict(self.named_parameters())  # tied tables once
        missing = [name for name in own if prefix + name not in state_dict]
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} of the {len(own)} trained tensors of the LM, "
                f"e.g. {', '.join(prefix + name for name in missing[:3])}; it is of another model."
            )
        for name, parameter in own.items():
            shape = tuple(state_dict[prefix + name].shape)
            if shape != tuple(parameter.shape):
                raise UserError(
                    f"the checkpoint's {prefix + name} is of shape {shape}, expected "
                    f"{tuple(parameter.shape)}; it is of another model."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        # a copy shares no pool of keys and values with running searches
        return {**self.__dict__, "_prefix_lm": None}


def check_options(
    llm: Optional[str],
    config: Optional[dict],
    tuning: str,
    lora_conf: Optional[Mapping[str, Any]],
    frozen: bool,
    dtype: Optional[str],
    gradient_checkpointing: bool,
) -> None:
    """Refuse combinations of options of :class:`CausalLLM` without a meaning."""
    if (llm is None) == (config is None):
        raise UserError(
            "lm_conf of causal_llm needs either `llm` (directory to fine-tune) or `config` "
            f"(model to train from scratch); got {'both' if llm else 'neither'}."
        )
    if tuning not in ("full", "lora"):
        raise UserError(
            f"lm_conf of causal_llm: tuning is {tuning!r}; expected full or lora (and `frozen: "
            "true` for no training)."
        )
    if tuning == "lora" and (llm is None or frozen):
        raise UserError(
            "lm_conf of causal_llm: `tuning: lora` adapts a pretrained LLM; it needs `llm` and "
            "excludes `frozen: true`."
        )
    if lora_conf is not None and tuning != "lora":
        raise UserError("lm_conf of causal_llm: `lora_conf` is for `tuning: lora`.")
    if frozen and (llm is None or gradient_checkpointing):
        raise UserError(
            "lm_conf of causal_llm: `frozen: true` needs `llm` and excludes "
            "`gradient_checkpointing`, as nothing is trained."
        )
    if dtype is not None and not frozen and tuning != "lora":
        raise UserError(
            "lm_conf of causal_llm: `dtype` is for `frozen: true` and `tuning: lora`; for training "
            "set ESPnet's `train_dtype` or `use_amp`."
        )


def build_from_config(config: dict, vocab_size: int, attn_implementation: str = "sdpa") -> Any:
    """A randomly initialised causal LM over V tokens from a Hugging Face configuration.

    Raises:
        UserError: Unknown ``model_type`` or key, or values that transformers refuses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    model_type = options.pop("model_type", None)
    try:
        reference = AutoConfig.for_model(model_type)
    except (ValueError, KeyError):
        raise UserError(
            f"lm_conf.config: unknown model_type {model_type!r}; expected one that transformers "
            "knows, e.g. llama."
        ) from None
    unknown = [k for k in options if not hasattr(reference, k) and k not in _OLD_CONFIG_KEYS]
    if unknown:
        raise UserError(
            f"lm_conf.config: {type(reference).__name__} has no {', '.join(sorted(unknown))}."
        )
    if options.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(
            f"lm_conf.config: vocab_size {options['vocab_size']} is not that of the token list "
            f"({vocab_size}); leave it out."
        )
    options["vocab_size"] = vocab_size

    def build(attention: str) -> Any:
        full = AutoConfig.for_model(model_type, **options)
        set_special_ids(full, vocab_size)
        full.architectures = None
        return AutoModelForCausalLM.from_config(full, attn_implementation=attention)

    try:
        try:
            return build(attn_implementation)
        except (ValueError, ImportError) as error:
            if "scaled_dot_product" not in str(error) and "attention" not in str(error).lower():
                raise
            if attn_implementation != "sdpa":
                raise no_attention(attn_implementation, error) from error
            return build("eager")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"lm_conf.config: transformers cannot build this {model_type} "
            f"({type(error).__name__}: {reason})."
        ) from error
