"""Train a mini-LSTM, the internal LM of an attention decoder for `--ilm mini_lstm`.

It stands in for the encoder's output, so that the decoder scores text without speech (arXiv
2104.05544). Trained on the training transcripts; the ASR model is not changed. Prints the
perplexity of --valid_text after each epoch, beside that of the zero-context estimate, and writes
the mini-LSTM of the best epoch. Run again after it was killed, it goes on.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli

LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"


def get_parser() -> argparse.ArgumentParser:
    types = import_quietly("espnet2.utils.types")
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.train_ilm",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--log_level", type=str.upper, default="INFO")
    parser.add_argument("--asr_train_config", required=True, help="config.yaml of the ASR training")
    parser.add_argument("--asr_model_file", required=True, help="the checkpoint that decodes")
    parser.add_argument(
        "--text", required=True, help="training transcripts, `utterance-id words ...` lines"
    )
    parser.add_argument("--valid_text", required=True, help="transcripts of the valid set")
    parser.add_argument("--output", required=True, help="to write, e.g. exp/asr/mini_lstm.pth")
    parser.add_argument("--token_type", type=types.str_or_none, help="None: that of the ASR model")
    parser.add_argument("--bpemodel", type=types.str_or_none, help="None: that of the ASR model")
    parser.add_argument("--hidden_size", type=int, default=50, help="of the LSTM")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2, help="at first; it falls to 0 linearly")
    parser.add_argument("--batch_size", type=int, default=64, help="sentences at once, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU; 1: one GPU")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    logging.basicConfig(level=args.log_level, format=LOG_FORMAT)
    from espnet_llm_plugin.inference.train_ilm import train_ilm

    train_ilm(args)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
