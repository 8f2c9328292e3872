"""Compare scored systems: one table, paired bootstrap, RESULTS.md, a plot."""

import argparse
from typing import Optional, Sequence

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.scoring import results as results_module
from espnet_llm_plugin.scoring.bootstrap import RESAMPLES, positive_int
from espnet_llm_plugin.scoring.plots import plot_error_rates, plot_speed
from espnet_llm_plugin.scoring.results import load_results
from espnet_llm_plugin.scoring.results_page import results_markdown, summarize
from espnet_llm_plugin.scoring.table import plain


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_llm_plugin.bin.results_table",
        description=f"{__doc__}\n\n{results_module.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file as described above")
    parser.add_argument("--output", help="RESULTS.md to write")
    parser.add_argument("--plot", help="PNG to write: WER with 95 %% intervals")
    parser.add_argument("--speed_plot", help="PNG to write: WER against real-time factor")
    parser.add_argument(
        "--resamples",
        type=positive_int,
        default=RESAMPLES,
        help=f"of the bootstrap (default {RESAMPLES})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    args = get_parser().parse_args(cmd)
    results = load_results(args.config)
    summary = summarize(results, args.resamples, args.seed)
    if args.plot:
        plot_error_rates(results, args.plot)
    if args.speed_plot:
        plot_speed(results, args.speed_plot)
    if args.output:
        page = results_markdown(results, summary)
        with atomic_write(args.output) as stream:
            stream.write(page)
    print(summary.text(plain), end="")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
