"""Show live in the terminal what a recording, standard input or the microphone says.

On a terminal the part that cannot change any more is plain, the rest dimmed; into a file or pipe
every change is a line.

    python -m espnet_llm_plugin.bin.transcribe --asr_train_config exp/asr/config.yaml \\
        --asr_model_file exp/asr/valid.loss.ave.pth --microphone
    arecord -f S16_LE -r 16000 -c 1 -t raw | python -m espnet_llm_plugin.bin.transcribe ... --stdin
"""

import argparse
import logging
import sys
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.options import (
    add_endpoint_options,
    add_loading_options,
    add_model_options,
    add_search_options,
    endpoint_rules_of,
    parse_with_configs,
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.transcribe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wav", help="Recording of one channel")
    source.add_argument(
        "--stdin",
        action="store_true",
        help="Raw signed 16-bit little-endian samples of one channel at the model's rate",
    )
    source.add_argument("--microphone", action="store_true", help="Until Ctrl-C")
    parser.add_argument(
        "--real_time", action="store_true", help="Read --wav no faster than it was spoken"
    )
    add_loading_options(parser)
    add_model_options(parser)
    add_search_options(parser, espnet_search=False)
    add_endpoint_options(parser, default=True)
    parser.set_defaults(log_level="WARNING")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = parse_with_configs(get_parser(), cmd)
    logging.basicConfig(level=args.log_level, format="%(levelname)s: %(message)s")
    from espnet_llm_plugin.inference import sources
    from espnet_llm_plugin.inference.decode import build_recognizer
    from espnet_llm_plugin.inference.live import LiveDisplay, transcribe
    from espnet_llm_plugin.inference.streaming import StreamingRecognizer

    rules = endpoint_rules_of(args)
    streaming = StreamingRecognizer(build_recognizer(args), rules)
    rate = streaming.sample_rate
    piece_length = round(streaming.latency.chunk * rate / 1000)
    if args.wav:
        source = sources.wav_file(args.wav, rate, piece_length, args.real_time)
    elif args.stdin:
        source = sources.raw_pcm(sys.stdin.buffer, piece_length)
    else:
        source = sources.microphone(rate, piece_length)
    transcribe(streaming, source, LiveDisplay(sys.stdout))


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
