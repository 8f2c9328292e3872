"""Whether a speech LLM uses its audio: shuffled audio, attention, similarity, CTC agreement."""

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.inference.languages import add_language_options
from espnet_llm_plugin.scoring.bootstrap import positive_int


def get_parser() -> argparse.ArgumentParser:
    str2triple_str = import_quietly("espnet2.utils.types").str2triple_str
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.evaluate_audio_use",
        description=f"{__doc__} Writes OUTPUT_DIR/audio_use.json (for bin.diagnose), "
        "utterances.tsv and similarity.png.",
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
    parser.add_argument(
        "--token_int",
        metavar="FILE",
        help="hypotheses of the same set (token_int in a decoding directory), to be compared with "
        "the CTC layer",
    )
    parser.add_argument("--key_file", help="utterances to take (default: all of the speech)")
    parser.add_argument(
        "--max_utterances", type=positive_int, default=500, help="of these, evenly spread"
    )
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU, 1: GPU")
    parser.add_argument("--log_level", default="INFO")
    add_language_options(parser)
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s: %(message)s")
    from espnet_llm_plugin.data.atomic import atomic_write
    from espnet_llm_plugin.inference.audio_use import embedding_ms, measure, spread, write
    from espnet_llm_plugin.inference.languages import given_languages
    from espnet_llm_plugin.inference.loading import load_asr
    from espnet_llm_plugin.inference.utterances import read_keys
    from espnet_llm_plugin.scoring.trn import read_token_ids
    from espnet_llm_plugin.transducer.evaluate import read_batches

    data = args.data_path_and_name_and_type
    hypotheses = None if args.token_int is None else read_token_ids(args.token_int)
    speech = [path for path, name, _ in data if name == "speech"]
    keys = spread(read_keys(args.key_file or speech[0]), args.max_utterances) if speech else []
    key_file = Path(args.output_dir) / "keys"
    with atomic_write(key_file) as stream:
        stream.writelines(f"{key}\n" for key in keys)
    asr = load_asr(
        args.asr_train_config, args.asr_model_file, device="cuda" if args.ngpu > 0 else "cpu"
    )
    batches = read_batches(
        asr.train_args, data, str(key_file), batch_size=1, num_workers=args.num_workers
    )
    languages = given_languages(args, asr.model, keys)
    if languages is not None:
        batches = languages.with_codes(batches)
    measured = measure(asr.model, batches, hypotheses)
    write(measured, args.output_dir, embedding_ms(asr.model, vars(asr.train_args)))
    for name, value in measured.use.as_dict().items():
        print(f"{name}: {value}")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
