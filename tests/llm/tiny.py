"""Tiny causal LMs and tokenizers of the families that users bring, written to directories."""

import json
from pathlib import Path

import torch

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "opt", "gpt2")
# Not pooled: the past of a state-space model is no list of keys and values.
RECOMPUTED = ("mamba",)

TEXT = (
    "the cat sat on the mat and the dog sat on the log",
    "a story about singing and reading in the morning",
    "there are seven nights in the week of the year",
    "she sells sea shells by the sea shore",
    "reading and singing and telling stories at night",
)


def tiny_config(family: str, vocab_size: int = 37, tied: bool = True, **extra):
    """A configuration with dimensions that differ wherever they can."""
    from transformers import AutoConfig

    common = dict(
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    llama_like = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    window = dict(head_dim=4, sliding_window=4)
    own = {
        "llama": llama_like,
        "qwen2": llama_like,
        "qwen3": {**llama_like, "head_dim": 8},
        "gemma": {**llama_like, "head_dim": 4},
        "gemma2": {**llama_like, **window},
        "gemma3": {
            **llama_like,
            **window,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "mistral": {**llama_like, "head_dim": 4, "sliding_window": 3},
        "opt": dict(
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=8,
            max_position_embeddings=20,
            do_layer_norm_before=False,
        ),
        "gpt2": dict(n_embd=16, n_layer=2, n_head=4, n_positions=20),
        "gptj": dict(n_embd=16, n_layer=2, n_head=4, n_positions=20, rotary_dim=4),
        "bloom": dict(hidden_size=16, n_layer=2, n_head=4),
        "mamba": dict(hidden_size=16, num_hidden_layers=2, state_size=4),
    }[family]
    name = {"gemma3": "gemma3_text"}.get(family, family)
    return AutoConfig.for_model(name, **{**common, **own, **extra})


def tiny_model(family: str, vocab_size: int = 37, tied: bool = True, seed: int = 0, **extra):
    """A model with weights large enough for its predictions to depend on the context."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    attention = "eager" if family in ("gemma2", "mamba", "gptj", "bloom") else "sdpa"
    config = tiny_config(family, vocab_size, tied, **extra)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tiny_tokenizer(style: str, bos: str = "<s>"):
    """A BPE tokenizer: ``sentencepiece`` (Llama 2, Gemma) or ``byte_level`` (GPT-2, Qwen)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if style == "sentencepiece":
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        draft = Tokenizer(models.BPE(unk_token="<unk>"))
        draft.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        # training splits words, as sentencepiece does; encoding needs no split
        draft.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
        draft.train_from_iterator(TEXT, trainer)
        model = json.loads(draft.to_str())["model"]
        backend = Tokenizer(
            models.BPE(
                vocab=model["vocab"],
                merges=[tuple(merge) for merge in model["merges"]],
                unk_token="<unk>",
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        backend.normalizer = draft.normalizer
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token="</s>"
    )


def save_llm_dir(directory: Path, family: str = "llama", style: str = "sentencepiece", **kwargs):
    """Write a model with a tokenizer of the given style; returns the directory."""
    tokenizer = tiny_tokenizer(style)
    # Like Qwen2: more rows than tokens
    model = tiny_model(family, vocab_size=len(tokenizer) + 5, **kwargs)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def save_adapted_dir(directory: Path, tokens, family: str = "llama", seed: int = 0, **kwargs):
    """Write an LLM directory whose rows are ``tokens``, with random weights."""
    from espnet_llm_plugin.llm.directory import save_llm, write_directory

    model = tiny_model(family, vocab_size=len(tokens), seed=seed, **kwargs)
    write_directory(
        directory, lambda partial: save_llm(model, partial, tokens, final_dir=directory)
    )
    return Path(directory)


def char_tokens() -> list[str]:
    """A character token list of 12 tokens."""
    return ["<blank>", "<unk>", "<space>", *"aeinorst", "<sos/eos>"]


def train_sentencepiece(prefix: Path, sentences, vocab_size: int, **options) -> tuple[Path, Path]:
    """Train a sentencepiece model; returns (bpe.model, tokens.txt as ESPnet writes it)."""
    import sentencepiece

    text = Path(f"{prefix}.txt")
    text.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    options.setdefault("model_type", "unigram")
    options.setdefault("character_coverage", 1.0)
    options.setdefault("hard_vocab_limit", options["model_type"] != "unigram")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    model = Path(f"{prefix}.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    pieces = [p for p in pieces if p not in ("<unk>", "<s>", "</s>")]
    tokens = Path(f"{prefix}.tokens.txt")
    tokens.write_text(
        "".join(f"{t}\n" for t in ["<blank>", "<unk>", *pieces, "<sos/eos>"]), encoding="utf-8"
    )
    return model, tokens
