"""Whether the keys and values of a model's prefixes can be kept in a pool and shared."""

from typing import TYPE_CHECKING, Any, Optional

import torch

if TYPE_CHECKING:
    from espnet_llm_plugin.llm.state import PrefixLM

# Attention whose past is fully described by keys and values of single tokens. Sliding windows are
# among them: the pool keeps all tokens and the mask hides those out of the window.
_POOLED_LAYERS = {"full_attention", "sliding_attention"}


def why_not_pooled(config: Any) -> Optional[str]:
    """The reason why not, as far as the model's configuration tells."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= _POOLED_LAYERS:
        return f"layers {', '.join(sorted(layers - _POOLED_LAYERS))}"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers that share keys and values"
    return None


@torch.no_grad()
def why_not_equal(lm: "PrefixLM") -> Optional[str]:
    """Compare a small ragged tree of prefixes with full forwards; the reason if it differs."""
    ids = [index % lm.vocab_size for index in (3, 5, 2, 7)]
    training = lm.model.training
    lm.model.eval()  # dropout would make any two forwards differ
    try:
        _, (first,) = lm.step(ids[:1], [None])
        _, (second,) = lm.step(ids[1:2], [first])
        logits, _ = lm.step(ids[2:], [second, first])
        expected = [
            lm.model(input_ids=torch.tensor([row], device=lm.model.device)).logits[0, -1]
            for row in ([*ids[:3]], [ids[0], ids[3]])
        ]
    except Exception as error:  # any failure means: not this way
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        lm.model.train(training)
    expected = torch.stack(expected).float()
    half = lm.model.dtype in (torch.float16, torch.bfloat16)
    scale = expected.std().clamp(min=1e-6)
    difference = float(((logits - expected).abs().max() / scale).nan_to_num(float("inf")))
    if difference > (0.3 if half else 1e-3):
        return f"stepwise and full logits differ by {difference:.2g} standard deviations"
    return None
