"""Directories of tiny LLMs over ASR tokens and over their own."""

import json
from pathlib import Path

from tests.llm.tiny import save_adapted_dir, tiny_model, tiny_tokenizer

TOKENS = ["<blank>", "<unk>", "<space>", *"abcdefgh", "<sos/eos>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}!{% endif %}"
    "{% endif %}"
)


def save_adapted(directory: Path, seed: int = 0, tokens=TOKENS, **conf) -> str:
    """An LLM over ``tokens``."""
    return str(save_adapted_dir(directory, tokens, seed=seed, **conf))


def save_native(
    directory: Path,
    style: str = "sentencepiece",
    spare_rows: int = 5,
    seed: int = 0,
    special: dict | None = None,
    chat_template: str | None = None,
    **conf,
) -> str:
    """An LLM over its own tokens; ``special`` replaces its special tokens (None: it has none)."""
    tokenizer = tiny_tokenizer(style)
    for name, token in (special or {}).items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = chat_template
    model = tiny_model("llama", vocab_size=len(tokenizer) + spare_rows, seed=seed, **conf)
    model.config.bos_token_id, model.config.eos_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if chat_template is not None:  # as a file of its own, or not at all
        assert (
            "chat_template" in (Path(directory) / "tokenizer_config.json").read_text()
            or (Path(directory) / "chat_template.jinja").is_file()
        )
    assert json.loads((Path(directory) / "config.json").read_text())["vocab_size"] >= len(tokenizer)
    return str(directory)
