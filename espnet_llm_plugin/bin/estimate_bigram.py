"""Estimate a bigram of a recogniser's labels, the internal LM of `--ilm bigram`.

From the training transcripts, cut into the recogniser's tokens.
"""

import argparse
import logging
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.estimate_bigram", description=__doc__
    )
    parser.add_argument("--text", required=True, help="transcripts, `utterance-id words ...` lines")
    parser.add_argument("--token_list", required=True, help="tokens.txt of the recogniser")
    parser.add_argument("--bpemodel", help="its sentencepiece model, if there is one")
    parser.add_argument("--token_type", help="bpe, char or word (default: as the tokens look)")
    parser.add_argument("--output", required=True, help="file to write, e.g. exp/asr/bigram.npz")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    logging.basicConfig(level="INFO")
    from espnet_llm_plugin.fusion.bigram import LabelBigram
    from espnet_llm_plugin.llm.perplexity import asr_tokenizer, read_text
    from espnet_llm_plugin.token_list import guess_token_type, read_token_list

    tokens = read_token_list(args.token_list)
    encode = asr_tokenizer(tokens, args.token_type or guess_token_type(tokens), args.bpemodel)
    sentences = read_text(args.text, has_ids=True)
    bigram = LabelBigram.estimate((encode(sentence) for sentence in sentences), len(tokens))
    bigram.save(args.output, tokens)
    print(f"{args.output}: bigram over {len(tokens)} tokens from {len(sentences)} sentences")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
