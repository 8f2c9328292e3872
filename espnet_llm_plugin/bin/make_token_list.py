"""Make the token list, and for BPE the SentencePiece model (ESPnet's stage 5)."""

from espnet2.utils.types import str_or_none

from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.data.tokens import (
    BPE_MODES,
    NORMALIZATIONS,
    make_bpe_list,
    make_character_list,
    write_tokens,
)
from espnet_llm_plugin.errors import UserError, run_cli


def get_parser():
    """The command line's options; names as in ESPnet's asr.sh where it has them."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--token_type",
        choices=("bpe", "char", "word", "hugging_face"),
        default="bpe",
        help="Unit; hugging_face: the tokens of --llm, with its ids",
    )
    parser.add_argument("--text", nargs="+", default=(), help="Files of lines '<id> <transcript>'")
    parser.add_argument(
        "--output_dir", required=True, help="E.g. data/token_list/bpe_unigram500, .../char"
    )
    group = parser.add_argument_group("bpe")
    group.add_argument("--nbpe", type=int, default=30, help="Size of the token list")
    group.add_argument("--bpemode", choices=BPE_MODES, default="unigram", help="Kind of model")
    group.add_argument("--bpe_char_cover", type=float, default=1.0, help="Character coverage")
    group.add_argument("--bpe_nlsyms", type=str_or_none, help="E.g. '<noise>,<laugh>'")
    group.add_argument(
        "--bpe_input_sentence_size", type=int, default=100_000_000, help="Most sentences to use"
    )
    group.add_argument(
        "--bpe_normalization",
        choices=NORMALIZATIONS,
        default=NORMALIZATIONS[0],
        help="SentencePiece's normalisation; the default splits words at zero-width non-joiners",
    )
    group = parser.add_argument_group("char, word")
    group.add_argument("--nlsyms_txt", type=str_or_none, help="File of undivided symbols (char)")
    group.add_argument("--cleaner", type=str_or_none, help="ESPnet's text cleaner")
    group.add_argument(
        "--vocabulary_size", type=int, default=0, help="Most tokens, specials included; 0: all"
    )
    group = parser.add_argument_group("hugging_face")
    group.add_argument("--llm", type=str_or_none, help="LLM: directory or hub id")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    native = args.token_type == "hugging_face"
    if native != bool(args.llm) or native == bool(args.text):
        raise UserError(
            f"--token_type {args.token_type} is made from {'--llm' if native else '--text'} alone; "
            f"got --llm {args.llm}, --text {' '.join(args.text) or None}"
        )
    if native:
        from espnet_llm_plugin.llm.native import native_token_list

        tokens = write_tokens(native_token_list(args.llm), args.output_dir)
    elif args.token_type == "bpe":
        tokens = make_bpe_list(
            args.text,
            args.output_dir,
            nbpe=args.nbpe,
            bpemode=args.bpemode,
            character_coverage=args.bpe_char_cover,
            user_symbols=args.bpe_nlsyms.split(",") if args.bpe_nlsyms else (),
            input_sentence_size=args.bpe_input_sentence_size,
            normalization=args.bpe_normalization,
        )
    else:
        tokens = make_character_list(
            args.text,
            args.output_dir,
            token_type=args.token_type,
            nlsyms=args.nlsyms_txt,
            cleaner=args.cleaner,
            vocabulary_size=args.vocabulary_size,
        )
    print(f"{args.output_dir}/tokens.txt: {len(tokens)} tokens")


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
