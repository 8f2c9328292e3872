"""The table of every name that ESPnet can see, and the only code that writes it into ESPnet."""

import importlib
from dataclasses import dataclass

from espnet_llm_plugin import compat, compat_optimizers, compat_samplers
from espnet_llm_plugin.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One registered class.

    Attributes:
        kind: ESPnet's option, e.g. ``decoder`` for ``--decoder NAME``; a key of ``CHOICES``.
        name: The lower-case name in YAML files.
        path: ``module:Class``; also usable as a dotted path with keyword arguments.
        description: One line for ``--list``.
    """

    kind: str
    name: str
    path: str
    description: str

    def load(self) -> type:
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)


ENTRIES = (
    Entry(
        "encoder",
        "emformer",
        "espnet_llm_plugin.encoder.emformer:EmformerEncoder",
        "torchaudio's Emformer: segments, limited left context, right context; streams",
    ),
    Entry(
        "encoder",
        "streaming_conformer",
        "espnet_llm_plugin.encoder.streaming_conformer:StreamingConformerEncoder",
        "Conformer in chunks with causal convolution and optional look-ahead; streams",
    ),
    Entry(
        "postencoder",
        "frame_stacking",
        "espnet_llm_plugin.encoder.adapters_postencoder:FrameStackingPostEncoder",
        "n consecutive encoder frames side by side, projected: a lower frame rate",
    ),
    Entry(
        "model",
        "transducer",
        "espnet_llm_plugin.transducer.model:TransducerModel",
        "RNN-T with ESPnet's transducer decoder and joint, trained with an exact low-memory loss",
    ),
    Entry(
        "model",
        "factorized_transducer",
        "espnet_llm_plugin.transducer.model:FactorizedTransducerModel",
        "factorized transducer (FNT, MHAT, Transducer-Llama) with the exact low-memory loss",
    ),
    Entry(
        "model",
        "speech_llm",
        "espnet_llm_plugin.speech_llm.model:SpeechLLMModel",
        "encoder, adapter and LLM, trained on the text and auxiliary CTC or RNN-T losses",
    ),
    Entry(
        "decoder",
        "factorized_transducer",
        "espnet_llm_plugin.transducer.decoder:FactorizedTransducerDecoder",
        "label predictor (stateless, lstm or llm) and blank branch of a factorized transducer",
    ),
    Entry(
        "decoder",
        "speech_llm",
        "espnet_llm_plugin.speech_llm.decoder:SpeechLLMDecoder",
        "adapter and LLM (frozen, lora, full) that reads the audio; scores text step by step",
    ),
    Entry(
        "preprocessor",
        "multilingual",
        "espnet_llm_plugin.data.preprocessor:MultilingualPreprocessor",
        "ESPnet's default, which also carries the language of an utterance (utt2lang)",
    ),
    Entry(
        "lm",
        "causal_llm",
        "espnet_llm_plugin.llm.causal_llm:CausalLLM",
        "Hugging Face causal LM: trained from scratch, fine-tuned, or as shallow-fusion LM",
    ),
    Entry(
        "lm_model",
        "copy",
        "espnet_llm_plugin.llm.copy_model:CopyLanguageModel",
        "training of causal_llm that makes it copy from its context (a small LLM for a speech LLM)",
    ),
    Entry(
        "optim",
        "adamw_groups",
        "espnet_llm_plugin.optimizers:AdamWGroups",
        "AdamW with a factor of the learning rate, and frozen updates, by parameter name",
    ),
)

# Where ESPnet keeps the classes of each kind: (module, name of the ClassChoices).
CHOICES = {
    "encoder": ("espnet2.tasks.asr", "encoder_choices"),
    "postencoder": ("espnet2.tasks.asr", "postencoder_choices"),
    "model": ("espnet2.tasks.asr", "model_choices"),
    "decoder": ("espnet2.tasks.asr", "decoder_choices"),
    "preprocessor": ("espnet2.tasks.asr", "preprocessor_choices"),
    "lm": ("espnet2.tasks.lm", "lm_choices"),
    "lm_model": ("espnet2.tasks.lm", "model_choices"),  # --model of LMTask
    "optim": ("espnet2.tasks.abs_task", "optim_classes"),  # a dictionary
}


def register(kinds: tuple[str, ...] = tuple(CHOICES)) -> None:
    """Make ESPnet accept our names for ``kinds`` and apply the fixes of :mod:`compat`.

    Must run before ESPnet parses arguments, because it reads its choices then. Idempotent.

    Raises:
        UserError: Unsupported ESPnet, or ESPnet has another class under one of our names.
    """
    compat.check_espnet_version()
    for entry in ENTRIES:
        if entry.kind not in kinds:
            continue
        module, attribute = CHOICES[entry.kind]
        choices = getattr(compat.import_quietly(module), attribute)
        add(choices, entry)
    compat.import_quietly("espnet2.train.trainer")
    compat.patch_espnet_trainer()
    if "decoder" in kinds:
        compat.patch_asr_statistics()
    if "lm" in kinds:
        compat.patch_lm_token_types()
    compat_samplers.patch_category_samplers()
    compat_optimizers.patch_build_optimizers()


def add(choices, entry: Entry) -> None:
    """Add one entry to an ESPnet ``ClassChoices``, or to its dictionary of optimizers."""
    cls = entry.load()
    classes = getattr(choices, "classes", choices)
    existing = classes.get(entry.name)
    if existing is not None and existing is not cls:
        raise UserError(
            f"cannot register the {entry.kind} `{entry.name}` as {entry.path}: this ESPnet already "
            f"has {existing.__module__}.{existing.__qualname__} under that name. Use a version of "
            f"the plugin made for this ESPnet, or remove the other registration"
        )
    base_type = getattr(choices, "base_type", None)
    if base_type is not None and not issubclass(cls, base_type):
        raise UserError(f"{entry.path} is not a {base_type.__name__}, as ESPnet expects")
    classes[entry.name] = cls


def table() -> str:
    """Return all names with their descriptions, one a line."""
    width = max(len(entry.name) for entry in ENTRIES)
    return "\n".join(
        f"{entry.kind:12s} {entry.name:{width}s}  {entry.description}" for entry in ENTRIES
    )
