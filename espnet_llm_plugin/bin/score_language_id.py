"""Accuracy and confusions of the languages that a speech LLM predicted while decoding."""

import argparse
import json
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.scoring.language_id import NAME, confusion_table, score_language_id
from espnet_llm_plugin.scoring.table import markdown, plain


def get_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.score_language_id", description=__doc__
    )
    parser.add_argument("--utt2lang", required=True, help="the true languages")
    parser.add_argument(
        "--hyp", required=True, help="the predicted ones: lang_predicted of a decoding directory"
    )
    parser.add_argument("--output_dir", help=f"directory for {NAME} and language_id.md")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    for option, path in (("--utt2lang", args.utt2lang), ("--hyp", args.hyp)):
        if not Path(path).is_file():
            raise UserError(f"{option} {path}: there is no such file")
    hypotheses = read_clean_table(args.hyp, may_be_empty=True)
    references = read_clean_table(args.utt2lang, may_be_empty=True)
    scores = score_language_id(references, hypotheses)
    table = confusion_table(scores)
    if args.output_dir:
        with atomic_write(Path(args.output_dir) / NAME) as stream:
            json.dump(scores.as_dict(), stream, indent=1, ensure_ascii=False)
            stream.write("\n")
        with atomic_write(Path(args.output_dir) / "language_id.md") as stream:
            stream.write(markdown(*table))
    print(plain(*table), end="")
    if scores.without:
        print(f"{scores.without} utterances without a language in {args.utt2lang} are left out")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
