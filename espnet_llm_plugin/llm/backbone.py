"""Loading Hugging Face causal language models: by directory or hub id, frozen, checked, identified.

A *hub id* (``Qwen/Qwen2.5-0.5B``) is turned into the local snapshot directory by
``huggingface_hub`` (downloading it at most once; ``HF_HUB_OFFLINE`` and ``HF_HOME`` are honoured);
everything else here works on directories.
"""

import copy
import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.weights import check_weights, fingerprint

DTYPES = ("float32", "bfloat16", "float16", "auto")

_SNAPSHOT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.bin"]
_CAUSAL_HEADS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and advice of ``transformers`` for the duration of the block."""
    from transformers.utils import logging as hf_logging

    verbosity, progress = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if progress:
            hf_logging.enable_progress_bar()


def resolve_llm(name_or_dir: Union[str, Path]) -> Path:
    """Directory that holds the LLM called ``name_or_dir``.

    Args:
        name_or_dir: A directory, the ``config.json`` in it (ESPnet's packed models can name files
            only), or a hub id such as ``Qwen/Qwen2.5-0.5B``. What looks like a path never goes to
            the network.

    Raises:
        UserError: No such directory; an unknown, inaccessible or (offline) uncached hub id.
    """
    name = str(name_or_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.exists():
        raise UserError(
            f"LLM {name} is a file; expected the directory that holds config.json and the weights."
        )
    path_like = (
        not _HUB_ID.match(name)
        or name.startswith((".", "~"))
        # "exp/llm" matches the form of a hub id, but "exp" is a directory here.
        or ("/" in name and Path(name.split("/")[0]).is_dir())
    )
    if path_like:
        raise UserError(
            f"LLM directory {name} does not exist (looked in {Path.cwd()}). Give a directory with "
            "config.json and weights (e.g. written by adapt_vocabulary or export_llm), or a "
            "Hugging Face hub id such as Qwen/Qwen2.5-0.5B."
        )
    return _download(name)


def _download(hub_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    offline = constants.HF_HUB_OFFLINE
    hint = (
        "HF_HUB_OFFLINE is set, so only the local cache was searched: unset it, or download the "
        "model first (hf download ...) and give its directory."
        if offline
        else "Check the spelling, the network, and for gated models that you are logged in "
        "(hf auth login); or give a local directory."
    )
    disable_progress_bars()
    try:
        # Safetensors are enough where they exist; a second, pickled copy is not fetched.
        directory = Path(snapshot_download(hub_id, allow_patterns=_SNAPSHOT_FILES[:-1]))
        if not list(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(hub_id, allow_patterns=_SNAPSHOT_FILES))
        return directory
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"LLM {hub_id} is neither a directory nor a model that could be got from the Hugging "
            f"Face hub ({type(error).__name__}: {reason}). {hint}"
        ) from None
    finally:
        enable_progress_bars()


def load_config(directory: Union[str, Path]) -> Any:
    """The ``PreTrainedConfig`` of an LLM directory, checked to describe a causal LM."""
    directory = Path(directory)
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(
            f"LLM directory {directory} has no config.json; expected a Hugging Face model "
            "directory."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy the model again.") from None

    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(directory)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{file}: transformers cannot read it as a model configuration ({reason})."
        ) from None
    heads = raw.get("architectures") or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if (
        not known
        or getattr(config, "is_encoder_decoder", False)
        or (heads and not any(_CAUSAL_HEADS.search(head) for head in heads))
    ):
        raise UserError(
            f"LLM {directory} is not a causal language model (model_type {config.model_type}, "
            f"architectures {heads or 'not given'}); expected a decoder-only model such as LLaMA, "
            "Qwen, Gemma, OPT or GPT-2 with its output layer (...ForCausalLM)."
        )
    return config


def torch_dtype(dtype: str) -> Union[torch.dtype, str]:
    """``"float32"`` -> ``torch.float32``; ``"auto"`` (as stored) stays."""
    if dtype not in DTYPES:
        raise UserError(f"unknown LLM dtype {dtype!r}; expected one of {', '.join(DTYPES)}.")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def no_attention(name: str, error: Exception) -> UserError:
    """Why a kind of attention that was asked for cannot be had."""
    reason = str(error).strip().split("\n")[0]
    return UserError(
        f"attn_implementation {name!r} cannot be used here ({type(error).__name__}: {reason}); "
        "flash_attention_2 needs a CUDA GPU and `pip install flash-attn`. `sdpa` (default) works "
        "everywhere."
    )


def load_causal_lm(
    name_or_dir: Union[str, Path],
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> Any:
    """Load a causal LM: eval mode, all parameters frozen.

    Args:
        name_or_dir: Directory or hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (as stored).
        attn_implementation: ``sdpa`` (falls back to ``eager`` for families without it) or any name
            that transformers knows.

    Raises:
        UserError: Missing, truncated, not a causal LM, weights that do not fill the model, or an
            attention that cannot be had here.
    """
    directory = resolve_llm(name_or_dir)
    wanted = torch_dtype(dtype)
    load_config(directory)
    check_weights(directory)

    from transformers import AutoModelForCausalLM

    def load(attention: str) -> Any:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=wanted,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )

    try:
        try:
            model, info = load(attn_implementation)
        except (ValueError, ImportError) as error:
            if attn_implementation == "eager":
                raise
            if attn_implementation != "sdpa":
                raise no_attention(attn_implementation, error) from error
            logging.warning(
                "%s: no sdpa attention (%s); using eager attention.",
                directory,
                str(error).split("\n")[0],
            )
            model, info = load("eager")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"LLM {directory} cannot be loaded ({type(error).__name__}: {reason})."
        ) from error
    wrong = sorted(info["missing_keys"])
    wrong += [f"{key} {tuple(there)}" for key, there, _ in sorted(info["mismatched_keys"])]
    if wrong:
        # transformers would fill these with random numbers and only log it
        raise UserError(
            f"the weights of LLM {directory} lack {len(wrong)} tensors of the model or have them "
            f"in another shape, e.g. {', '.join(wrong[:3])}; they do not belong to its config.json."
        )
    _check_tied(model, directory)
    return model.eval().requires_grad_(False)


def _check_tied(model: Any, directory: Path) -> None:
    """Refuse two embedding tables where the configuration announces one."""
    output = model.get_output_embeddings()
    if output is None or not model.config.get_text_config().tie_word_embeddings:
        return
    if output.weight is not model.get_input_embeddings().weight:
        # transformers keeps both and only logs it; the next save or another version drops one
        raise UserError(
            f"LLM {directory} is tied by its config.json (tie_word_embeddings: true), but its "
            "weights hold different embeddings for input and output, as after an adaptation that "
            "untied them. Set tie_word_embeddings to false in config.json to use both tables, or "
            "remove that of the output layer from the weights."
        )


class FrozenLLM:
    """A causal LM that is used but never trained nor saved.

    Not a :class:`torch.nn.Module` on purpose: held as an attribute of a module it is in nobody's
    ``parameters()`` or ``state_dict()``. Construction checks the directory (configuration present
    and causal, weights complete) and costs milliseconds; weights load at the first
    :meth:`model`, so that ESPnet's ``collect_stats`` never loads them. ``copy.deepcopy`` returns
    the same object, and pickling drops the weights.

    Args:
        name_or_dir: Directory or hub id.
        dtype: See :func:`load_causal_lm`.
    """

    def __init__(self, name_or_dir: Union[str, Path], dtype: str = "float32"):
        torch_dtype(dtype)
        self.name = str(name_or_dir)
        self.dtype = dtype
        self.directory = resolve_llm(name_or_dir)
        self.config = load_config(self.directory)
        check_weights(self.directory)
        self._fingerprint: Optional[bytes] = None
        self._model: Any = None

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer (may exceed the number of tokens of the tokenizer)."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def fingerprint(self) -> bytes:
        """See :func:`espnet_llm_plugin.llm.weights.fingerprint`."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.directory)
        return self._fingerprint

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def model(self, device: Union[str, torch.device] = "cpu") -> Any:
        """The model on ``device``; loads the weights at the first call."""
        if self._model is None:
            logging.info("loading LLM %s (%s)", self.name, self.dtype)
            self._model = load_causal_lm(self.directory, dtype=self.dtype)
        device = torch.device(device)
        if self._model.device != device:
            self._model = self._model.to(device)
        return self._model

    def check_fingerprint(self, recorded: bytes, where: str) -> None:
        """Refuse another LLM than the one recorded.

        Args:
            recorded: 32 bytes from :attr:`fingerprint`.
            where: What recorded them, for the message.
        """
        if bytes(recorded) != self.fingerprint:
            raise UserError(
                f"LLM {self.name} (fingerprint {self.fingerprint.hex()[:12]}) is not the one "
                f"recorded in {where} (fingerprint {bytes(recorded).hex()[:12]}). Give the LLM "
                "directory that the model was trained with."
            )

    def __deepcopy__(self, memo: dict) -> "FrozenLLM":
        memo[id(self)] = self
        return self

    def __copy__(self) -> "FrozenLLM":
        return self

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["_model"] = None
        state["config"] = copy.deepcopy(self.config)
        return state

    def __repr__(self) -> str:
        loaded = "loaded" if self.is_loaded else "not loaded"
        return f"FrozenLLM({self.name!r}, {self.dtype}, {loaded})"


class LLMIdentity(torch.nn.Module):
    """Records in a checkpoint which frozen LLM a model was trained with, and checks it at load.

    Its one buffer holds the 32 bytes of the fingerprint as floats: ESPnet's checkpoint averaging
    adds integer buffers up, while the mean of equal small whole floats is exact (also in half
    precision).

    Raises:
        UserError: from ``load_state_dict``, strict or not, when the checkpoint records another LLM
            or none.
    """

    def __init__(self, llm: FrozenLLM):
        super().__init__()
        self.llm = llm
        record = torch.tensor(list(llm.fingerprint), dtype=torch.float32)
        self.register_buffer("fingerprint", record)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "fingerprint"
        if key not in state_dict:
            raise UserError(
                f"the checkpoint does not record which LLM it belongs to ({key} is missing); it is "
                f"not of a model that uses the frozen LLM {self.llm.name}."
            )
        recorded = state_dict[key].float().round().clamp(0, 255).to(torch.uint8).cpu()
        self.llm.check_fingerprint(bytes(recorded.tolist()), f"the checkpoint ({key})")
        super()._load_from_state_dict(state_dict, prefix, *args)
