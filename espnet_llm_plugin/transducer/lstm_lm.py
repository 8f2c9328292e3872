"""ESPnet's LSTM language model as the predictor of a factorized transducer.

[Effective internal LM training and fusion for factorized transducer, arXiv 2404.01716: predictors
are trained on text and frozen before the transducer is trained.]

V tokens, L = V - 2 labels, E embedding width, H units.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from espnet_llm_plugin.errors import UserError

_PREFIX = "decoder.predictor."


def predictor_weights(lm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of predictor ``lstm`` that gives the LM's probabilities, renormalised over labels.

    The predictor's history has no blank and begins with row 0 where the LM begins with
    ``<sos/eos>``; it does not predict the end of the sentence.

    Args:
        lm: Checkpoint of ESPnet's ``seq_rnn`` with ``rnn_type: lstm``, trained by ``lm_train``.

    Returns:
        Weights by their names in a factorized transducer, for ``--init_param
        FILE:decoder.predictor:decoder.predictor``.

    Raises:
        UserError: Not the checkpoint of such an LM.
    """
    layers = {name: value for name, value in lm.items() if name.startswith("lm.rnn.")}
    try:
        embed, output, bias = (
            lm[f"lm.{name}"] for name in ("encoder.weight", "decoder.weight", "decoder.bias")
        )
        rows = layers["lm.rnn.weight_ih_l0"].shape[0]
    except KeyError as error:
        raise UserError(f"not a checkpoint of ESPnet's LM seq_rnn: there is no {error}") from None
    if rows != 4 * layers["lm.rnn.weight_hh_l0"].shape[1]:
        raise UserError("this seq_rnn is no LSTM; train it with lm_conf rnn_type: lstm")
    weights = {
        # (L + 1, E): <sos/eos>, then the labels, which are the tokens 1 ... V - 2
        "embed.weight": torch.cat([embed[-1:], embed[1:-1]]),
        "output.weight": output[1:-1],  # (L, H)
        "output.bias": bias[1:-1],
        **{name.replace("lm.rnn.", "lstm."): value for name, value in layers.items()},
    }
    return {_PREFIX + name: value.clone() for name, value in weights.items()}
