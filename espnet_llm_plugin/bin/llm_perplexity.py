"""Word perplexity of a text under an LLM, in ASR pieces (as adapt_vocabulary, export_llm write it)
or in its own tokens.

Comparable with other vocabularies: sum of -log P over all pieces, without ends of sentences, by
words.
"""

import argparse
import json
from typing import Optional, Sequence

from espnet_llm_plugin.errors import run_cli


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.llm_perplexity",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--llm", required=True, help="directory or hub id")
    parser.add_argument("--text", required=True, help="`id words ...` a line")
    parser.add_argument("--output", required=True, help="JSON file to write")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    from espnet_llm_plugin.data.atomic import atomic_write
    from espnet_llm_plugin.llm.perplexity import read_text, score_llm

    score = score_llm(args.llm, read_text(args.text, has_ids=True))
    report = {
        "word_perplexity": score.word_perplexity,
        "token_perplexity": score.token_perplexity,
        "words": score.words,
        "tokens": score.tokens,
    }
    with atomic_write(args.output) as stream:
        json.dump(report, stream, indent=1)
        stream.write("\n")
    print(f"{args.llm}: word perplexity {score.word_perplexity:.1f}")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
