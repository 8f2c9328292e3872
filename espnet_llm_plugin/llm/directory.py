"""LLM directories over an ASR token list: what they hold, how they are written and checked.

Such a directory is an ordinary Hugging Face model whose row i is ASR token i (0 ``<blank>``,
1 ``<unk>``, V-1 ``<sos/eos>``), plus ``tokens.txt`` (one token a line), ``bpe.model`` when there is
one, and a tokenizer with the same ids where that is possible.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Union

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import load_config, resolve_llm
from espnet_llm_plugin.llm.tokenizer import build_tokenizer
from espnet_llm_plugin.llm.weights import fingerprint
from espnet_llm_plugin.token_list import guess_token_type, read_token_list

TOKENS_FILE = "tokens.txt"
BPE_FILE = "bpe.model"


def check_llm_tokens(
    llm_dir: Union[str, Path], token_list: Union[str, Path, Sequence[str]]
) -> None:
    """Check that the rows of an LLM directory are the tokens of an ASR token list.

    Args:
        llm_dir: Directory or hub id.
        token_list: A file, or the tokens themselves.

    Raises:
        UserError: The directory has no ``tokens.txt`` (not adapted), or the lists differ.
    """
    if isinstance(token_list, (str, Path)):
        name, tokens = str(token_list), read_token_list(token_list)
    else:
        name, tokens = "of the ASR model", list(token_list)
    own = llm_tokens(llm_dir)
    if own == tokens:
        return
    if len(own) != len(tokens):
        what = f"{len(own)} tokens against {len(tokens)}"
    else:
        row = next(i for i, (a, b) in enumerate(zip(own, tokens)) if a != b)
        what = f"token {row} is {own[row]!r} against {tokens[row]!r}"
    raise UserError(
        f"LLM {llm_dir} was made for another token list than {name}: {what}. Run "
        "`python -m espnet_llm_plugin.bin.adapt_vocabulary` with the token list of the ASR model."
    )


def llm_tokens(llm_dir: Union[str, Path]) -> list[str]:
    """The tokens of an adapted or exported LLM directory, checked against its table size."""
    directory = resolve_llm(llm_dir)
    if not (directory / TOKENS_FILE).is_file():
        raise UserError(
            f"LLM {llm_dir} has no {TOKENS_FILE}: its rows are its own tokens, not those of an ASR "
            "token list. Run `python -m espnet_llm_plugin.bin.adapt_vocabulary` on it first."
        )
    tokens = read_token_list(directory / TOKENS_FILE)
    rows = int(load_config(directory).get_text_config().vocab_size)
    if rows != len(tokens):
        raise UserError(
            f"LLM {llm_dir}: {TOKENS_FILE} has {len(tokens)} tokens, but config.json says "
            f"vocab_size {rows}; the directory is damaged or was put together by hand."
        )
    return tokens


def set_special_ids(config: Any, vocab_size: int) -> None:
    """Point bos and eos at ``<sos/eos>`` and padding at ``<blank>``."""
    text = config.get_text_config()
    for part in {id(config): config, id(text): text}.values():
        part.bos_token_id = part.eos_token_id = vocab_size - 1
        part.pad_token_id = 0


def save_llm(
    model: Any,
    directory: Path,
    tokens: Sequence[str],
    bpemodel: Optional[Union[str, Path]] = None,
    *,
    final_dir: Union[str, Path],
) -> str:
    """Write model, token list, ``bpe.model`` and (where possible) tokenizer into ``directory``.

    Also ``espnet_lm.yaml`` and ``espnet_lm.pth``, with which ESPnet decodes with this LLM as it is
    (``--lm_train_config``, ``--lm_file``); the latter holds no weights but the fingerprint.

    Args:
        model: Over ``tokens``.
        directory: Where to write.
        tokens: V tokens.
        bpemodel: Of the tokens, if they are sentencepiece pieces.
        final_dir: What ``directory`` will be renamed to.

    Returns:
        A line that says whether there is a tokenizer, and if not, why.
    """
    from transformers import GenerationConfig

    set_special_ids(model.config, len(tokens))
    # The old generation settings name tokens of the old vocabulary.
    model.generation_config = GenerationConfig(
        bos_token_id=len(tokens) - 1, eos_token_id=len(tokens) - 1, pad_token_id=0
    )
    model.save_pretrained(directory)
    (directory / TOKENS_FILE).write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    if bpemodel is not None:
        shutil.copyfile(bpemodel, directory / BPE_FILE)
    _save_espnet_lm(directory, tokens, bpemodel is not None, Path(final_dir).absolute())
    if bpemodel is None:
        return "no tokenizer: the token list has no sentencepiece model"
    tokenizer, reason = build_tokenizer(bpemodel, tokens)
    if tokenizer is None:
        return f"no tokenizer: {reason}"
    tokenizer.save_pretrained(directory)
    return "tokenizer: unigram, with the ids of the token list"


def _save_espnet_lm(directory: Path, tokens: Sequence[str], bpe: bool, final: Path) -> None:
    import torch
    import yaml

    conf = {
        "token_list": list(tokens),
        "lm": "causal_llm",
        "lm_conf": {"llm": str(final), "frozen": True},
        "model": "lm",
        "model_conf": {},
        "init": None,
        "use_preprocessor": True,
        "token_type": "bpe" if bpe else guess_token_type(tokens),
        "bpemodel": str(final / BPE_FILE) if bpe else None,
        "cleaner": None,
        "g2p": None,
        "non_linguistic_symbols": None,
    }
    with open(directory / "espnet_lm.yaml", "w", encoding="utf-8") as stream:
        yaml.safe_dump(conf, stream, allow_unicode=True, sort_keys=False)
    record = torch.tensor(list(fingerprint(directory)), dtype=torch.float32)
    torch.save({"lm.identity.fingerprint": record}, directory / "espnet_lm.pth")


def check_output_dir(output_dir: Union[str, Path]) -> None:
    """Refuse to write over something.

    Raises:
        UserError: It exists and is not an empty directory.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(
            f"output directory {output_dir} exists and is not empty; remove it or name another."
        )


def write_directory(output_dir: Union[str, Path], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary directory, then rename it: all of it appears, or nothing.

    What a killed run leaves has a hidden name and is overwritten by the next one.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir)
    partial = output_dir.absolute().with_name(f".{output_dir.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        umask = os.umask(0)
        os.umask(umask)
        for file in partial.rglob("*"):
            # safetensors makes private files; others may have to read them on a cluster
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
        if output_dir.exists():
            output_dir.rmdir()
        os.replace(partial, output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {output_dir}: {error}.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
