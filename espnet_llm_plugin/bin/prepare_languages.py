"""Write the language of every utterance of a set, for training soft prompts of languages.

With --config the languages of that model are the only ones.
"""

from pathlib import Path

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.data.languages import complete_languages
from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.training_config import add_config_options, read_training_config


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument("--utt2lang", required=True, help="Table `<utterance> <language code>`")
    parser.add_argument("--key_file", required=True, help="Lines that begin with the utterances")
    add_config_options(parser, required=False)
    parser.add_argument("--output", required=True, help="File to write")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    for option, path in (("--utt2lang", args.utt2lang), ("--key_file", args.key_file)):
        if not Path(path).is_file():
            raise UserError(f"{option} {path}: there is no such file")
    conf = {}
    if args.config:
        config = read_training_config(args.config, args.asr_args)
        conf = config["decoder_conf"].get("soft_prompt_conf") or {}
    languages = conf.get("languages")
    try:
        found = complete_languages(
            read_clean_table(args.utt2lang, may_be_empty=True),
            list(read_clean_table(args.key_file, may_be_empty=True)),
            None if languages is None else list(languages),
            conf.get("unknown_language", "error"),
        )
    except UserError as error:
        raise UserError(f"{args.utt2lang}: {error}") from error
    with writing(args.output), atomic_write(args.output) as stream:
        stream.writelines(f"{key} {code}\n" for key, code in found.table.items())
    for line in found.report():
        print(f"{args.utt2lang}: {line}")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
