"""A model in the place of a ``TunedLLM``."""

import torch

from tests.llm.tiny import tiny_model


class HeldLLM:
    """An LLM that is there already, with what an interface asks of it."""

    def __init__(self, model):
        self._model, self.config = model, model.config
        self.context = getattr(model.config, "max_position_embeddings", None)
        self.hidden_size = model.get_input_embeddings().embedding_dim

    def model(self, device="cpu"):
        return self._model

    def embed(self, ids):
        return self._model.get_input_embeddings()(ids)


def held(family: str = "llama", **options) -> HeldLLM:
    """A tiny random LLM without dropout."""
    dropouts = {
        "gpt2": dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        "opt": dict(dropout=0.0, attention_dropout=0.0),
    }
    return HeldLLM(tiny_model(family, **dropouts.get(family, {}), **options))


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters (gates too) that are no initial values any more; in eval mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()
