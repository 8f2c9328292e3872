"""Estimate an n-gram of a recogniser's labels.

Of LM text, order 4 or so: stands in for an LLM between its calls (asr_inference --ngram_file with
--fusion_llm). Of the training transcripts, order 2: the internal LM of --ilm bigram.
"""

import argparse
import logging
import sys
from typing import Optional, Sequence

from espnet_llm_plugin.errors import UserError, run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.estimate_ngram", description=__doc__
    )
    parser.add_argument(
        "--text", required=True, nargs="+", help="files of `utterance-id words ...` lines"
    )
    parser.add_argument("--asr_train_config", help="config.yaml of the recogniser, or:")
    parser.add_argument("--token_list", help="its tokens.txt")
    parser.add_argument("--bpemodel", help="its sentencepiece model, if there is one")
    parser.add_argument("--token_type", help="bpe, char or word (default: as the tokens look)")
    parser.add_argument("--order", type=int, default=4, help="tokens in an n-gram (default: 4)")
    parser.add_argument("--output", required=True, help="file to write, e.g. exp/asr/ngram4.npz")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    logging.basicConfig(level="INFO")
    from tqdm import tqdm

    from espnet_llm_plugin.fusion.label_ngram import LabelNgram
    from espnet_llm_plugin.inference.loading import read_train_config, require_file
    from espnet_llm_plugin.llm.perplexity import asr_tokenizer, read_text
    from espnet_llm_plugin.token_list import guess_token_type, read_token_list

    if bool(args.asr_train_config) == bool(args.token_list):
        raise UserError("give the recogniser's tokens: --asr_train_config or --token_list")
    token_type, bpemodel = args.token_type, args.bpemodel
    if args.asr_train_config:
        path = require_file(
            args.asr_train_config, "--asr_train_config", "config.yaml of a training"
        )
        config = read_train_config(path)
        tokens = list(config["token_list"])
        token_type = token_type or config.get("token_type")
        bpemodel = bpemodel or config.get("bpemodel")
    else:
        tokens = read_token_list(args.token_list)
    encode = asr_tokenizer(tokens, token_type or guess_token_type(tokens), bpemodel)
    sentences = [line for path in args.text for line in read_text(path, has_ids=True)]
    progress = tqdm(sentences, unit="sentence", disable=not sys.stderr.isatty())
    ids = (encode(sentence) for sentence in progress)
    ngram = LabelNgram.estimate(ids, len(tokens), args.order)
    ngram.save(args.output, tokens)
    print(
        f"{args.output}: {args.order}-gram over {len(tokens)} tokens from {len(sentences)} "
        "sentences"
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
