"""Tiny speech LLMs with soft prompts of languages, and batches with their languages."""

import torch
from espnet2.train.collate_fn import CommonCollateFn

from espnet_llm_plugin.data.language_codes import encode_language
from tests.speech_llm.tiny import batch, model

# Names that the tiny token list can write.
NAMES = {"de": "bad", "en": "head", "to": "face"}
CONF = {"length": 3, "languages": NAMES, "language_dropout": 0.0}


def multilingual(llm, seed=0, soft=None, **conf):
    """A model with soft prompts of three languages; ``soft`` changes ``soft_prompt_conf``."""
    conf = {"soft_prompt": "per_language", "soft_prompt_conf": {**CONF, **(soft or {})}, **conf}
    return model(llm, seed=seed, **conf)


def lang(*codes):
    """``lang`` and ``lang_lengths`` as ESPnet collates them."""
    collate = CommonCollateFn(float_pad_value=0.0, int_pad_value=-1)
    rows = [(f"utt{i}", {"lang": encode_language(code)}) for i, code in enumerate(codes)]
    return {**collate(rows)[1], "utt_id": [name for name, _ in rows]}


def loss_of(made, data=None, train=False, seed=5, **languages):
    """Loss and statistics, repeatable in training too."""
    torch.manual_seed(seed)
    loss, stats, _ = made.train(train)(*(data or batch()), **languages)
    return loss, {key: float(value) for key, value in stats.items()}
