"""Make a trained LSTM LM of ESPnet (seq_rnn) the initial predictor `lstm` of a transducer.

Start the transducer with --init_param OUTPUT:decoder.predictor:decoder.predictor and
--freeze_param decoder.predictor; embed_dim, hidden_dim and num_layers of its predictor_conf are the
LM's unit, unit and nlayers.
"""

import argparse
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.errors import UserError, run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.lstm_predictor",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--lm_file", required=True, help="checkpoint of the LM")
    parser.add_argument("--output", required=True, help="checkpoint to write")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    if not Path(args.lm_file).is_file():
        raise UserError(f"--lm_file {args.lm_file}: there is no such file")
    import torch

    from espnet_llm_plugin.data.atomic import atomic_write
    from espnet_llm_plugin.transducer.lstm_lm import predictor_weights

    weights = predictor_weights(torch.load(args.lm_file, map_location="cpu", weights_only=True))
    with atomic_write(args.output, "wb") as stream:
        torch.save(weights, stream)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
