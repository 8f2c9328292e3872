"""Soft prompts: learnt vectors before the audio, of all utterances or of those of a language.

The LLM reads ``[before; soft prompt; audio; after; BOS; text]``. [Speech Prefix-Tuning with RNNT
Loss for Improving LLM Predictions, arXiv 2406.14701: language-id soft prompts of a frozen LLM]

B utterances, K vectors, D width of the LLM, L languages.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from espnet_llm_plugin.data.language_codes import UNKNOWN
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.embedding_scale import text_embedding_scale, text_embeddings
from espnet_llm_plugin.options import refuse_unknown
from espnet_llm_plugin.speech_llm.languages import LanguageRows, Languages
from espnet_llm_plugin.speech_llm.units import LabelUnits

KINDS = ("none", "shared", "per_language")
INITS = ("random", "language_name")
SHARED = "shared"


@dataclass(frozen=True)
class SoftPromptOptions:
    """``soft_prompt_conf`` of a speech LLM.

    Attributes:
        length: K.
        init: ``random`` (normal), or with ``per_language`` also ``language_name``: the LLM's
            embeddings of the language's English name, repeated to K vectors; that of an unknown
            language is then the mean of all.
        std: Standard deviation of random vectors, or of what is added to those of a name. By
            default the root mean square of the LLM's text embeddings, and 0.
        languages: With ``per_language``: codes, or names by code.
        language_dropout: Share of the utterances that are of unknown language to the soft prompt
            in training, so that there is one for them.
        unknown_language: What a language that is not listed is: an ``error``, or ``unk``.

    Raises:
        UserError: A value out of range.
    """

    length: int = 8
    init: str = "random"
    std: Optional[float] = None
    languages: Optional[Union[Sequence[str], Mapping[str, str]]] = None
    language_dropout: float = 0.1
    unknown_language: str = "error"

    def __post_init__(self):
        if not isinstance(self.length, int) or isinstance(self.length, bool) or self.length < 1:
            raise UserError(
                f"soft_prompt_conf: length must be a positive integer, got {self.length!r}; "
                "without soft prompt set `soft_prompt: none`"
            )
        if self.init not in INITS:
            raise UserError(f"soft_prompt_conf: init {self.init!r}; expected {' or '.join(INITS)}")
        if self.std is not None and self.std < 0:
            raise UserError(f"soft_prompt_conf: std must be 0 or more, got {self.std}")
        if not 0 <= self.language_dropout < 1:
            raise UserError(
                f"soft_prompt_conf: language_dropout must be in [0, 1), got {self.language_dropout}"
            )


def make_soft_prompt(
    kind: str, conf: Optional[Mapping[str, Any]], units: LabelUnits, llm: str, width: int
) -> "SoftPrompt":
    """The soft prompt of a configuration, freshly initialised, without loading the LLM.

    Args:
        kind: ``none``, ``shared`` or ``per_language``.
        conf: See :class:`SoftPromptOptions`.
        units: The LLM's.
        llm: Its directory or hub id.
        width: D.

    Raises:
        UserError: An unknown kind or option, options without a meaning for the kind, or names of
            languages that are not known or that the token list cannot write.
    """
    if kind not in KINDS:
        raise UserError(f"decoder_conf: soft_prompt {kind!r}; expected {', '.join(KINDS)}")
    if not isinstance(conf or {}, Mapping):
        raise UserError(f"soft_prompt_conf must be a mapping such as {{length: 8}}, got {conf!r}")
    conf = dict(conf or {})
    refuse_unknown("soft_prompt_conf", conf, SoftPromptOptions)
    meaningless = sorted(set(conf) & _ONLY_FOR_LANGUAGES) if kind == SHARED else []
    if kind == "none" and conf:
        raise UserError("decoder_conf: soft_prompt_conf is given, but soft_prompt is none")
    options = SoftPromptOptions(**conf)
    if meaningless or (kind == SHARED and options.init != "random"):
        raise UserError(
            f"soft_prompt_conf: {', '.join(meaningless) or f'init {options.init}'} is for "
            "`soft_prompt: per_language`, got `soft_prompt: shared`"
        )
    if kind == "none":
        return SoftPrompt({}, 0)
    if kind == "per_language" and options.languages is None:
        raise UserError(
            "decoder_conf: `soft_prompt: per_language` needs soft_prompt_conf languages, e.g. "
            "`languages: [en, de, fr]`"
        )
    languages = None
    if kind == "per_language":
        languages = Languages(options.languages, options.unknown_language)
    codes = [SHARED] if languages is None else [*languages.codes, UNKNOWN]
    if options.init == "language_name":
        made = _of_names(languages, options, units, llm)
    else:
        std = options.std
        if std is None:
            std = text_embedding_scale(llm, units.scored_range[1])
        made = {code: std * torch.randn(options.length, width) for code in codes}
    return SoftPrompt(made, options.length, languages, options.language_dropout)


_ONLY_FOR_LANGUAGES = {"languages", "language_dropout", "unknown_language"}


def _of_names(
    languages: Languages, options: SoftPromptOptions, units: LabelUnits, llm: str
) -> dict[str, Tensor]:
    """Vectors (K, D) by code, from the names of the languages."""
    rows = {}
    for code in languages.codes:
        name = languages.name_of(code)
        ids = units.encode(name)
        if not ids or (units.unk is not None and units.unk in ids):
            raise UserError(
                f"soft_prompt_conf: init language_name: the token list of LLM {units.llm} cannot "
                f"write {name!r}, the name of '{code}'; give names as `languages: {{{code}: ...}}` "
                "in the token list's characters and case, or set init: random"
            )
        # repeated: a part of the name at every position
        ids = [ids[k % len(ids)] for k in range(options.length)]
        rows[code] = text_embeddings(llm, ids)
    rows[UNKNOWN] = torch.stack(list(rows.values())).mean(dim=0)
    if options.std:
        rows = {code: row + options.std * torch.randn_like(row) for code, row in rows.items()}
    return rows


class SoftPrompt(LanguageRows):
    """K learnt vectors for all utterances, for each language and an unknown one, or none at all.

    Args:
        vectors: Initial values (K, D) by code: ``shared``; or those of the languages and ``unk``;
            or none.
        length: K, or 0.
        languages: None if the vectors are of no language.
        language_dropout: See :class:`SoftPromptOptions`.

    Attributes:
        length: Positions that it takes in the LLM's context.
        languages: As above.
    """

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        length: int,
        languages: Optional[Languages] = None,
        language_dropout: float = 0.0,
    ):
        super().__init__(
            {code: row for code, row in vectors.items() if code not in (SHARED, UNKNOWN)}
        )
        for name in {SHARED, UNKNOWN} & set(vectors):
            self.register_parameter(name, torch.nn.Parameter(vectors[name].clone()))
        self.length, self.languages = length, languages
        self.language_dropout = language_dropout

    def languages_of(self, data: Mapping[str, Any]) -> Optional[Tensor]:
        """Numbers (B,) of the languages of a batch; None if this soft prompt knows no languages.

        Args:
            data: ``lang`` (B, n) and ``lang_lengths`` (B,), see
                :mod:`~espnet_llm_plugin.data.language_codes`, and ``utt_id`` if it is known.

        Raises:
            UserError: No ``lang``, or a language that the model does not know.
        """
        return None if self.languages is None else self.languages.of_batch(data)

    def num_unknown(self, languages: Tensor) -> int:
        """How many of the numbers (B,) are of no language of the model."""
        return int(((languages < 0) | (languages >= len(self.languages))).sum())

    def forward(self, languages: Optional[Tensor], batch: int) -> Optional[Tensor]:
        """Vectors (B, K, D), or None if there are none.

        Args:
            languages: Numbers (B,), see :mod:`~espnet_llm_plugin.speech_llm.languages`; None: not
                given for any.
            batch: B.
        """
        if not self.length:
            return None
        if self.languages is None:
            return self.get_parameter(SHARED).expand(batch, -1, -1)
        unknown = self.get_parameter(UNKNOWN)
        if languages is None:
            languages = torch.full((batch,), self.languages.unknown_row, device=unknown.device)
        languages = languages.to(unknown.device)
        languages = languages.masked_fill(languages < 0, self.languages.unknown_row)
        if self.training and self.language_dropout:
            dropped = torch.rand(batch, device=languages.device) < self.language_dropout
            languages = languages.masked_fill(dropped, self.languages.unknown_row)
        return self.rows(unknown)[languages]
