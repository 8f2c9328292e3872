"""Error rates by language of scored test sets, with their macro average, and scripts.

Of languages whose script is known also letters of other scripts, and words that were recognised in
another script. Languages that are left out are named.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.scoring.bootstrap import RESAMPLES, positive_int
from espnet_llm_plugin.scoring.graphemes import GER
from espnet_llm_plugin.scoring.languages import comparison, score_languages
from espnet_llm_plugin.scoring.scripts import score_scripts, script_tables
from espnet_llm_plugin.scoring.table import markdown, plain
from espnet_llm_plugin.scoring.units import CER, TER, WER

NAME = "languages.json"


def get_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.score_languages",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "directories",
        nargs="+",
        metavar="DIR",
        help=f"scored decoding directories of one test set (of bin.score); each gets {NAME}",
    )
    parser.add_argument("--utt2lang", required=True, help="table '<utterance> <language>'")
    parser.add_argument(
        "--units",
        nargs="+",
        choices=(WER, CER, TER, GER),
        default=[WER, CER],
        help="error rates: of words, characters (code points), tokens, grapheme clusters",
    )
    parser.add_argument("--output", help="Markdown file for the tables that are printed")
    parser.add_argument("--resamples", type=positive_int, default=RESAMPLES, help="bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    options = {"resamples": args.resamples, "seed": args.seed}
    scored = {
        unit: [score_languages(d, args.utt2lang, unit=unit, **options) for d in args.directories]
        for unit in args.units
    }
    tables = [comparison(rows) for rows in scored.values()]
    scripts = {d: score_scripts(d, args.utt2lang) for d in args.directories}
    if all(found.languages for found in scripts.values()):
        tables += script_tables({d: found.languages for d, found in scripts.items()})
    for index, directory in enumerate(args.directories):
        with atomic_write(Path(directory) / NAME) as stream:
            by_unit = {unit: rows[index].as_dict() for unit, rows in scored.items()}
            if scripts[directory].languages:
                found = scripts[directory].languages.items()
                by_unit["scripts"] = {lang: score.as_dict() for lang, score in found}
            json.dump(by_unit, stream, indent=1, ensure_ascii=False)
            stream.write("\n")
    if args.output:
        with atomic_write(args.output) as stream:
            stream.write("\n".join(markdown(*table) for table in tables))
    results = [*(row for rows in scored.values() for row in rows), *scripts.values()]
    for warning in dict.fromkeys(line for found in results for line in found.warnings()):
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(plain(*table) for table in tables), end="")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
