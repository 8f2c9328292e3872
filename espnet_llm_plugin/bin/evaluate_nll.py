"""Exact negative log-likelihood per label under a transducer, a CTC model or a speech LLM."""

import argparse
import json
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.languages import add_language_options
from espnet_llm_plugin.inference.options import add_model_options


def get_parser() -> argparse.ArgumentParser:
    str2triple_str = import_quietly("espnet2.utils.types").str2triple_str
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.evaluate_nll",
        description="Print -log P(text | speech) in nats per label, summed over all alignments, "
        "and write OUTPUT_DIR/nll.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--asr_train_config", required=True, help="config.yaml of the training")
    parser.add_argument("--asr_model_file", required=True, help="the checkpoint, a .pth file")
    parser.add_argument(
        "--data_path_and_name_and_type",
        type=str2triple_str,
        action="append",
        required=True,
        help="once for speech and once for text, e.g. dump/raw/dev/wav.scp,speech,sound",
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--key_file", help="utterances to take (default: all)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=1,
        help="utterances at once; ESPnet's features of the last frames depend on it slightly",
    )
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU, 1: GPU")
    parser.add_argument("--log_level", default="INFO")
    add_model_options(parser)
    add_language_options(parser)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> int:
    args = get_parser().parse_args(cmd)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s: %(message)s")
    from espnet_llm_plugin.data.atomic import atomic_write
    from espnet_llm_plugin.inference.languages import given_languages
    from espnet_llm_plugin.inference.loading import load_asr
    from espnet_llm_plugin.inference.utterances import read_keys
    from espnet_llm_plugin.transducer.evaluate import corpus_nll, read_batches

    device = "cuda" if args.ngpu > 0 else "cpu"
    loaded = load_asr(
        args.asr_train_config,
        args.asr_model_file,
        device=device,
        predictor=args.predictor,
        predictor_conf=args.predictor_conf,
        predictor_file=args.predictor_file,
    )
    batches = read_batches(
        loaded.train_args,
        args.data_path_and_name_and_type,
        args.key_file,
        args.batch_size,
        args.num_workers,
    )
    data = args.data_path_and_name_and_type
    speech = next(path for path, name, _ in data if name == "speech")
    languages = given_languages(args, loaded.model, read_keys(args.key_file or speech))
    if languages is not None:
        batches = languages.with_codes(batches)
    report = corpus_nll(loaded.model, batches).as_dict()
    with atomic_write(Path(args.output_dir) / "nll.json") as stream:
        json.dump(report, stream, indent=2)
        stream.write("\n")
    print(json.dumps(report, indent=2))
    return 0


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
