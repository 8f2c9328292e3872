"""The languages of utterances to decode or to score: given, or for the model to find out."""

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Optional, Sequence

import torch

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.data.language_codes import NAME, UNKNOWN, encode_language
from espnet_llm_plugin.errors import UserError

# What results say of an utterance: the language of its soft prompt, and the predicted one.
LANG, PREDICTED = "lang", "lang_predicted"


def add_language_options(parser: argparse.ArgumentParser) -> None:
    """``--utt2lang`` and ``--lang``."""
    group = parser.add_argument_group(
        "Languages (speech_llm with `soft_prompt: per_language`)",
        "Where none is given, it is predicted by a model that can, and unknown to others.",
    )
    group.add_argument("--utt2lang", help="Table `<utterance> <language code>`")
    group.add_argument(
        "--lang", help=f"Language code of all utterances; {UNKNOWN}: unknown, and not predicted"
    )


@dataclass(frozen=True)
class GivenLanguages:
    """What the options say.

    Attributes:
        code: Of all utterances, or None.
        table: Of each.
        path: Of the table; None without one.
    """

    code: Optional[str] = None
    table: Mapping[str, str] = field(default_factory=dict)
    path: Optional[str] = None

    def of(self, utterances: Sequence[str]) -> list[Optional[str]]:
        """Codes; None where none is given."""
        return [self.code or self.table.get(utterance) or None for utterance in utterances]

    def with_codes(
        self, batches: Iterable[tuple[Sequence[str], Mapping[str, torch.Tensor]]]
    ) -> Iterator[tuple[Sequence[str], dict[str, torch.Tensor]]]:
        """Batches of ESPnet's, with ``lang`` and ``lang_lengths`` as the training has them."""
        for utterances, batch in batches:
            rows = [torch.from_numpy(encode_language(code)) for code in self.of(utterances)]
            codes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            lengths = torch.tensor([len(row) for row in rows])
            yield utterances, {**batch, NAME: codes, f"{NAME}_lengths": lengths}


def given_languages(
    args: argparse.Namespace, model: torch.nn.Module, utterances: Sequence[str]
) -> Optional[GivenLanguages]:
    """What ``--utt2lang`` and ``--lang`` say of ``utterances``.

    Utterances without a language are counted and logged. None if the model knows no languages.

    Raises:
        UserError: Both options, options that the model has no use for, no such file, none of the
            utterances in it, or a language that the model does not know.
    """
    decoder = getattr(model, "decoder", None)
    languages = getattr(getattr(decoder, "soft_prompt", None), "languages", None)
    option = "--utt2lang" if args.utt2lang else "--lang"
    if languages is None:
        if args.utt2lang or args.lang:
            raise UserError(
                f"{option}: this model has no soft prompts of languages (decoder_conf soft_prompt: "
                "per_language); leave it out"
            )
        return None
    if args.utt2lang and args.lang:
        raise UserError("--utt2lang and --lang: give one of them")
    given = GivenLanguages(args.lang)
    if args.utt2lang:
        if not Path(args.utt2lang).is_file():
            raise UserError(f"--utt2lang {args.utt2lang}: there is no such file")
        table = read_clean_table(args.utt2lang, may_be_empty=True)
        given = GivenLanguages(None, table, args.utt2lang)
    codes = given.of(utterances)
    languages.numbers(codes, utterances)  # all are known
    if given.path is not None and None in codes:
        without = [utterance for utterance, code in zip(utterances, codes) if code is None]
        if len(without) == len(utterances):
            raise UserError(
                f"--utt2lang {given.path} has a language of none of the {len(utterances)} "
                f"utterances, e.g. not of {without[0]}; is it of another set?"
            )
        then = "unknown" if decoder.language_head is None else "predicted"
        logging.warning(
            f"{len(without)} of {len(utterances)} utterances have no language in {given.path}, "
            f"e.g. {without[0]}: theirs is {then}"
        )
    return given
