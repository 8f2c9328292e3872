"""Copy some utterances of a Kaldi data directory (no audio is copied)."""

from dataclasses import replace
from pathlib import Path

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.audio import resolve
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import read_clean_table, read_data_dir, write_data_dir
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.data.split import select
from espnet_llm_plugin.errors import UserError, run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("source_dir", help="Kaldi data directory")
    parser.add_argument("target_dir", help="Directory to write")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--utt_list", help="File whose lines begin with utterance ids")
    group.add_argument(
        "--where", help="<file>=<value>: a table of the source directory, e.g. utt2set=train"
    )
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    source = Path(args.source_dir)
    if Path(args.target_dir).resolve() == source.resolve():
        raise UserError(f"source and target are the same directory: {source}")
    problems = Problems(str(source))
    data = read_data_dir(source, problems, require_text=False)
    problems.check("Correct the data (see validate_data_dir).")
    if args.utt_list:
        keys = list(read_clean_table(args.utt_list, may_be_empty=True))
    else:
        name, equals, value = args.where.partition("=")
        if not equals:
            raise UserError(f"--where is '{args.where}', expected <file>=<value>")
        table = read_clean_table(source / name, may_be_empty=True)
        keys = [key for key, entry in table.items() if entry == value]
    part = select(data, keys, args.utt_list or f"--where {args.where}")
    wav = {key: resolve(spec, source) for key, spec in part.wav.items()}
    with writing(args.target_dir):
        write_data_dir(replace(part, wav=wav), args.target_dir)
    print(f"{args.target_dir}: {len(part.utterances)} utterances")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
