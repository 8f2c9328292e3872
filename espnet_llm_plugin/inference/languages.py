"""The languages of utterances to decode or to score: given, or for the model to find out."""

import argparse
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Optional, Sequence

import torch

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.data.language_codes import (
    NAME,
    UNKNOWN,
    describe_foreign,
    encode_language,
)
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.languages import Languages

# What results say of an utterance: the language of its soft prompt, and the predicted one.
LANG, PREDICTED = "lang", "lang_predicted"
# What to do with a language that the model does not know.
POLICIES = ("error", "unk", "predict")


def add_language_options(parser: argparse.ArgumentParser) -> None:
    """``--utt2lang``, ``--lang`` and ``--unknown_language``."""
    group = parser.add_argument_group(
        "Languages (speech_llm with `soft_prompt: per_language`)",
        "Where none is given, it is predicted by a model that can, and unknown to others.",
    )
    group.add_argument("--utt2lang", help="Table `<utterance> <language code>`")
    group.add_argument(
        "--lang", help=f"Language code of all utterances; {UNKNOWN}: unknown, and not predicted"
    )
    group.add_argument(
        "--unknown_language",
        choices=POLICIES,
        help="A language that the model does not know is an error, unknown, or predicted (default: "
        "unknown_language of the model's soft_prompt_conf)",
    )


@dataclass(frozen=True)
class GivenLanguages:
    """What the options say.

    Attributes:
        code: Of all utterances, or None.
        table: Of each.
        path: Of the table; None without one.
        taken_for: What other codes are taken for; an empty one is not given.
    """

    code: Optional[str] = None
    table: Mapping[str, str] = field(default_factory=dict)
    path: Optional[str] = None
    taken_for: Mapping[str, str] = field(default_factory=dict)

    def of(self, utterances: Sequence[str]) -> list[Optional[str]]:
        """Codes; None where none is given."""
        codes = [self.code or self.table.get(utterance) or "" for utterance in utterances]
        return [self.taken_for.get(code, code) or None for code in codes]

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
    """What the options of :func:`add_language_options` say of ``utterances``.

    Utterances without a language, and those of languages that the model does not know, are counted
    and logged. None if the model knows no languages.

    Raises:
        UserError: Both options, options that the model has no use for, no such file, none of the
            utterances in it, languages that the model does not know and may not guess, or
            predictions of a model that has none.
    """
    decoder = getattr(model, "decoder", None)
    languages = getattr(getattr(decoder, "soft_prompt", None), "languages", None)
    option = "--utt2lang" if args.utt2lang else "--lang" if args.lang else "--unknown_language"
    if languages is None:
        if args.utt2lang or args.lang or args.unknown_language:
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
    predicts = decoder.language_head is not None
    policy = args.unknown_language or languages.policy
    if policy == "predict" and not predicts:
        raise UserError(
            "--unknown_language predict: this model does not predict languages (decoder_conf "
            "language_prediction); expected error or unk"
        )
    given = replace(given, taken_for=_taken_for(languages, codes, utterances, policy))
    if given.path is not None and None in codes:
        without = [utterance for utterance, code in zip(utterances, codes) if code is None]
        if len(without) == len(utterances):
            raise UserError(
                f"--utt2lang {given.path} has a language of none of the {len(utterances)} "
                f"utterances, e.g. not of {without[0]}; is it of another set?"
            )
        then = "predicted" if predicts else "unknown"
        logging.warning(
            f"{len(without)} of {len(utterances)} utterances have no language in {given.path}, "
            f"e.g. {without[0]}: theirs is {then}"
        )
    return given


def _taken_for(
    languages: Languages,
    codes: Sequence[Optional[str]],
    utterances: Sequence[str],
    policy: str,
) -> dict[str, str]:
    """What codes that the model does not know are taken for; they are counted and logged."""
    foreign: dict[str, list[str]] = {}
    for utterance, code in zip(utterances, codes):
        if code and not languages.is_known(code):
            foreign.setdefault(code, []).append(utterance)
    if not foreign:
        return {}
    what = (
        f"{sum(map(len, foreign.values()))} of {len(codes)} utterances have "
        f"{describe_foreign(foreign)}; it knows {', '.join(languages.codes)}"
    )
    if policy == "error":
        raise UserError(
            f"{what}. Correct the codes, decode with --unknown_language unk (or predict, if the "
            "model can), or add the languages to the model "
            "(python -m espnet_llm_plugin.bin.add_languages)"
        )
    logging.warning(f"{what}; they are {'predicted' if policy == 'predict' else 'unknown'}")
    return dict.fromkeys(foreign, "" if policy == "predict" else UNKNOWN)
