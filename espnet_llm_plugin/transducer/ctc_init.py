"""Start a transducer or speech LLM from a trained CTC model, its output layer included.

A transducer that starts from scratch on little data deletes words; one that starts at the CTC
posteriors does not: encoder, output rows and, where the model keeps an auxiliary CTC branch, that
too are copied through ESPnet's ``--init_param``. A speech LLM takes the encoder and, where it has
one, the CTC layer, whose labels must be those of the CTC model (``ctc_vocabulary``).
"""

from pathlib import Path
from typing import Any, Mapping

from espnet_llm_plugin.errors import UserError

# Where each model keeps the layer laid out like `ctc.ctc_lo` (row 0 blank, last row sos/eos).
_OUTPUT_LAYER = {
    "factorized_transducer": "decoder.acoustic_output",
    "transducer": "joint_network.acoustic_output",
}
_SPEECH_LLM = "speech_llm"
_ADAPTERS_WITH_CTC = ("ctc_compression", "ctc_embedding")


def init_params(checkpoint: str, config: Mapping[str, Any]) -> list[str]:
    """Return ESPnet ``--init_param`` values that copy a CTC checkpoint into another model.

    Args:
        checkpoint: A ``.pth`` file of an ESPnet model with ``ctc_weight > 0``.
        config: The other model's training configuration.

    Raises:
        UserError: No such checkpoint, another model type, or an RNN-T without the residual layer.
    """
    if not Path(checkpoint).is_file():
        raise UserError(f"there is no CTC checkpoint {checkpoint}; train the CTC model first")
    model = config.get("model", "espnet")
    conf = config.get("model_conf") or {}
    if model == _SPEECH_LLM:
        adapter = (config.get("decoder_conf") or {}).get("adapter")
        with_ctc = conf.get("ctc_weight", 0.0) > 0.0 or adapter in _ADAPTERS_WITH_CTC
        parts = ["encoder", *(["ctc"] if with_ctc else [])]
        return [f"{checkpoint}:{part}:{part}" for part in parts]
    if model not in _OUTPUT_LAYER:
        able = ", ".join([*_OUTPUT_LAYER, _SPEECH_LLM])
        raise UserError(
            f"the configuration has `model: {model}`, but only {able} can start from a CTC model"
        )
    if model == "transducer" and not conf.get("acoustic_residual", False):
        raise UserError(
            "an RNN-T can take over a CTC output layer only with "
            "`model_conf: {acoustic_residual: true}`"
        )
    copies = [("encoder", "encoder"), ("ctc.ctc_lo", _OUTPUT_LAYER[model])]
    if conf.get("ctc_weight", 0.0) > 0.0:
        copies.append(("ctc", "ctc"))
    return [f"{checkpoint}:{source}:{target}" for source, target in copies]
