"""The data of egs2/indic: FLEURS, more training data beside it, one spelling for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.corpora.ai4bharat import SETS, read_set
from espnet_llm_plugin.data.corpora.fleurs import (
    SPLITS,
    Mismatch,
    find_languages,
    read_fleurs,
)
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.indic_text import DEFAULTS, TextOptions
from espnet_llm_plugin.data.indic_transcripts import normalize_transcripts
from espnet_llm_plugin.data.kaldi import DataDir, Segment, write_data_dir
from espnet_llm_plugin.data.perturb import combine
from espnet_llm_plugin.data.problems import Problem, listing
from espnet_llm_plugin.errors import UserError

PathLike = Union[str, Path]

REPORT = "transcripts.txt"  # in each split: utterances with odd transcripts, and why


@dataclass
class Prepared:
    """What :func:`prepare_indic` wrote, by split."""

    data: dict[str, DataDir] = field(default_factory=dict)
    odd: dict[str, list[Problem]] = field(default_factory=dict)
    utt2lang: dict[str, str] = field(default_factory=dict)  # of all, also of what was dropped
    mismatches: list[Mismatch] = field(default_factory=list)


def prepare_indic(
    fleurs: PathLike,
    output_dir: PathLike,
    langs: Sequence[str],
    *,
    more_train: Optional[Mapping[str, PathLike]] = None,
    text_field: str = "transcription",
    options: TextOptions = DEFAULTS,
    mixed_scripts: str = "keep",
    nj: int = 1,
) -> Prepared:
    """Write ``output_dir/{train,dev,test}`` with ``utt2lang`` and normalised transcripts.

    Args:
        fleurs: See :func:`~.fleurs.find_languages`.
        output_dir: Usually ``data``; wav.scp refers to the corpora's audio files.
        langs: Codes of the ten languages.
        more_train: Directories of :data:`~.ai4bharat.SETS` whose training data is added to train.
        text_field: See :func:`~.fleurs.read_fleurs`.
        options: See :class:`~..indic_text.TextOptions`.
        mixed_scripts: ``drop`` leaves utterances with words of other scripts out of train. Dev and
            test keep them in any case.
        nj: Processes that read the headers of the audio.

    Raises:
        UserError: See the readers of the corpora.
    """
    more_train = more_train or {}
    unknown = [name for name in more_train if name not in SETS]
    if unknown:
        raise UserError(f"unknown set '{unknown[0]}'; expected one of {', '.join(SETS)}")
    languages = find_languages(fleurs, langs)
    result = Prepared()
    for split in SPLITS:
        parts = []
        for language in languages:
            data, odd = read_fleurs(language, split, text_field=text_field, nj=nj)
            parts.append(data)
            result.mismatches += odd
        if split == "train" and more_train:
            parts = [_with_segments(part) for part in parts]
            parts += [
                read_set(name, Path(directory), lang)
                for name, directory in more_train.items()
                for lang in langs
            ]
        joined = combine(parts)
        result.utt2lang |= joined.extra["utt2lang"]
        result.data[split], result.odd[split] = normalize_transcripts(
            joined, options, mixed_scripts=mixed_scripts if split == "train" else "keep"
        )
    for split, data in result.data.items():
        directory = Path(output_dir) / split
        with writing(output_dir):
            with atomic_write(directory / REPORT) as stream:
                stream.write(listing(result.odd[split]))
            write_data_dir(data, directory)
    return result


def _with_segments(data: DataDir) -> DataDir:
    return replace(data, segments={key: Segment(key, 0.0, -1) for key in data.wav})
