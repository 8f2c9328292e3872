"""The languages of a model: codes, names, and their numbers in a batch.

B utterances, n bytes of the longest code, L languages.

A number is 0 to L - 1, ``UNKNOWN_ROW`` (L) for a language that is unknown, or ``NOT_GIVEN`` (-1):
the data do not say, so that a model that can predicts it, and others take it for unknown.
"""

import logging
import re
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from espnet_llm_plugin.data.language_codes import (
    NAME,
    UNKNOWN,
    decode_languages,
    describe_foreign,
)
from espnet_llm_plugin.errors import UserError

NOT_GIVEN = -1
# What to do with a code that the model does not know.
POLICIES = ("error", "unk")


class Languages:
    """What a model knows of languages.

    Args:
        languages: Codes, or names by code.
        unknown_language: What a code that is not among them is: an ``error``, or ``unk``.

    Attributes:
        codes: L codes, in the order of their numbers.
        policy: ``unknown_language``.

    Raises:
        UserError: No languages, or codes that cannot be.
    """

    def __init__(
        self, languages: Union[Sequence[str], Mapping[str, str]], unknown_language: str = "error"
    ):
        what = "soft_prompt_conf: languages must be a list of codes, or names by code"
        if isinstance(languages, str) or not languages:
            raise UserError(f"{what}, got {languages!r}")
        self.codes = tuple(languages)
        wrong = [code for code in self.codes if not _is_code(code)]
        if wrong:
            raise UserError(
                f"{what}; a code has letters, digits, - and _, and is not '{UNKNOWN}': got "
                f"{', '.join(map(repr, wrong))} (in YAML, `no` needs quotation marks)"
            )
        if len(set(self.codes)) != len(self.codes):
            raise UserError(f"soft_prompt_conf: a language twice in {', '.join(self.codes)}")
        if unknown_language not in POLICIES:
            raise UserError(
                f"soft_prompt_conf: unknown_language {unknown_language!r}; expected "
                f"{' or '.join(POLICIES)}"
            )
        self.names = dict(languages) if isinstance(languages, Mapping) else {}
        self._numbers = {code: number for number, code in enumerate(self.codes)}
        self.policy = unknown_language
        self._reported: set[str] = set()
        self._reported_none = False

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def unknown_row(self) -> int:
        """Number of an unknown language."""
        return len(self.codes)

    def is_known(self, code: str) -> bool:
        """Whether the model has the language, or the code says that it is unknown."""
        return code == UNKNOWN or code in self._numbers

    def code_of(self, number: int) -> str:
        """The code of a number."""
        return self.codes[number] if 0 <= number < len(self) else UNKNOWN

    def numbers(
        self,
        codes: Sequence[Optional[str]],
        utterances: Optional[Sequence[str]] = None,
    ) -> list[int]:
        """Numbers of codes (B); None or an empty one is not given, ``unk`` is unknown.

        Args:
            codes: Of the utterances.
            utterances: Their names, for messages.

        Raises:
            UserError: A language that the model does not know, unless that is to be ``unk``.
        """
        found: list[int] = []
        foreign: dict[str, list[Optional[str]]] = {}
        for i, code in enumerate(codes):
            number = NOT_GIVEN if not code else self.unknown_row if code == UNKNOWN else None
            number = self._numbers.get(code) if number is None else number
            if number is None:
                foreign.setdefault(code, []).append(None if utterances is None else utterances[i])
                number = self.unknown_row
            found.append(number)
        if foreign:
            self._report_foreign(foreign)
        return found

    def of_batch(self, data: Mapping[str, Any]) -> Tensor:
        """As :meth:`numbers`, of a batch of ESPnet's: (B,).

        Args:
            data: ``lang`` (B, n), ``lang_lengths`` (B,), and ``utt_id`` if it is known.

        Raises:
            UserError: Also, no ``lang``.
        """
        if NAME not in data:
            raise UserError(
                "`soft_prompt: per_language` needs the languages of the utterances: give "
                f"`--train_data_path_and_name_and_type <directory>/utt2lang,{NAME},text` (and the "
                "same for valid), `--preprocessor multilingual` and `--allow_variable_data_keys "
                "true`"
            )
        utterances = data.get("utt_id")
        codes = decode_languages(data[NAME], data[f"{NAME}_lengths"])
        if None in codes and not self._reported_none:
            self._reported_none = True
            name = "an utterance" if utterances is None else utterances[codes.index(None)]
            logging.warning(
                f"{name} has no language, and counts as unknown; the statistic num_no_language "
                "has the mean number of such utterances in a batch"
            )
        return torch.tensor(self.numbers(codes, utterances), device=data[NAME].device)

    def _report_foreign(self, utterances: Mapping[str, Sequence[Optional[str]]]) -> None:
        """Refuse languages that the model does not know, by code, or say that they are unknown."""
        new = {code: names for code, names in utterances.items() if code not in self._reported}
        found = describe_foreign(new) + f"; it knows {', '.join(self.codes)}"
        if self.policy == "error":
            raise UserError(
                f"{found}. Correct utt2lang, list the languages in decoder_conf "
                "(soft_prompt_conf.languages), add them to a trained model "
                "(python -m espnet_llm_plugin.bin.add_languages), or set unknown_language: unk"
            )
        if new:
            self._reported.update(new)
            logging.warning(f"{found}: all utterances of them are taken as unknown")

    def name_of(self, code: str) -> str:
        """The English name of a language: the configuration's, or that of Whisper's list.

        Raises:
            UserError: There is none.
        """
        name = self.names.get(code)
        if name is None:
            from transformers.models.whisper.tokenization_whisper import LANGUAGES

            name = LANGUAGES.get(code)
        if not name:
            raise UserError(
                f"soft_prompt_conf: init language_name: the language '{code}' has no known name; "
                f"give names as `languages: {{{code}: ..., ...}}`, or set init: random"
            )
        return name


def _is_code(code: object) -> bool:
    return (
        isinstance(code, str)
        and code != UNKNOWN
        and re.fullmatch(r"[A-Za-z0-9_-]+", code) is not None
    )


class LanguageRows(torch.nn.Module):
    """A parameter for each language, under its code.

    So the order of the languages in a configuration means nothing to a checkpoint, some can be
    frozen by name (``--freeze_param decoder.soft_prompt.lang_en``), and more can be added.

    Args:
        rows: Initial values by code; all of one shape.
    """

    def __init__(self, rows: Mapping[str, Tensor]):
        super().__init__()
        for code, row in rows.items():
            self.register_parameter(parameter_name(code), torch.nn.Parameter(row.clone()))
        self._codes = tuple(rows)

    def rows(self, *more: Tensor) -> Tensor:
        """(L, ...) in the order of the languages, then ``more`` of that shape."""
        own = [self.get_parameter(parameter_name(code)) for code in self._codes]
        return torch.stack([*own, *more])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # ESPnet loads with strict=False, which would drop what has no place here in silence
        foreign = [
            key.removeprefix(prefix)
            for key in state_dict
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._parameters
        ]
        if foreign:
            names = ", ".join(key.removeprefix(_PREFIX) for key in foreign)
            raise UserError(
                f"the checkpoint has {prefix.rstrip('.')} for {names}, which this configuration "
                "does not have: decoder_conf soft_prompt and its languages must be those of the "
                "training (languages may be in another order, none may be left out)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


_PREFIX = "lang_"


def parameter_name(code: str) -> str:
    """Of a language's parameter; not the bare code, as modules have names such as ``to``."""
    return _PREFIX + code


def train_only(
    model: torch.nn.Module, codes: Sequence[str], *tables: Optional[LanguageRows]
) -> None:
    """Freeze all parameters of ``model`` but those of some languages in ``tables``.

    Raises:
        UserError: A language that no table has, or none at all.
    """
    names = {parameter_name(code) for code in codes} if not isinstance(codes, str) else set()
    present = {
        name for table in tables if table is not None for name, _ in table.named_parameters()
    }
    if not names or not names <= present:
        known = sorted(name.removeprefix(_PREFIX) for name in present if name.startswith(_PREFIX))
        raise UserError(
            f"model_conf: train_languages {codes!r}; expected a list of languages that the soft "
            f"prompt has: {', '.join(known) or 'none (soft_prompt: per_language is needed)'}"
        )
    model.requires_grad_(False)
    for table in tables:
        for name in names if table is not None else ():
            table.get_parameter(name).requires_grad_(True)
