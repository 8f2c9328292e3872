"""Transcripts: Kaldi ``text`` files in, sclite's ``trn`` files out."""

from pathlib import Path
from typing import Iterable, Mapping, Optional, Sequence, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError


def read_keyed(path: Union[str, Path]) -> dict[str, str]:
    """Read a Kaldi file of ``<utterance> <value>`` lines; the value may be empty.

    Words of the value are separated by one space whatever the file has, as ESPnet does.

    Raises:
        UserError: No such file, no line, a blank line, a repeated utterance, not UTF-8.
    """
    table = read_clean_table(path, may_be_empty=True)
    if not table:
        raise UserError(f"{path}: the file is empty")
    return {utterance: " ".join(value.split()) for utterance, value in table.items()}


def read_token_ids(path: Union[str, Path]) -> dict[str, list[int]]:
    """Read the ``token_int`` file of a decoding; a hypothesis may be empty.

    Raises:
        UserError: As :func:`read_keyed`, or something else than numbers.
    """
    ids = {}
    for utterance, value in read_keyed(path).items():
        try:
            ids[utterance] = [int(number) for number in value.split()]
        except ValueError as error:
            raise UserError(
                f"{path}: {utterance} has no token ids; expected the file token_int of a decoding "
                f"directory ({error})"
            ) from error
    return ids


def name_some(ids: Iterable[str], limit: int = 5) -> str:
    """Name a few of many utterances: ``a, b, ... (12 in all)``."""
    ids = list(ids)
    shown = ", ".join(ids[:limit])
    return shown if len(ids) <= limit else f"{shown}, ... ({len(ids)} in all)"


def speakers_of(ids: Sequence[str], utt2spk: Optional[Union[str, Path]]) -> dict[str, str]:
    """Look up the speaker of each utterance; without a file each is a speaker of its own."""
    if utt2spk is None:
        return {utterance: utterance for utterance in ids}
    table = read_keyed(utt2spk)
    missing = [utterance for utterance in ids if not table.get(utterance)]
    if missing:
        raise UserError(f"{utt2spk}: no speaker for {name_some(missing)}")
    return {utterance: table[utterance] for utterance in ids}


def write_trn(
    path: Union[str, Path], tokens: Mapping[str, Sequence[str]], speakers: Mapping[str, str]
) -> None:
    """Write ``<tokens>\\t(<speaker>-<utterance>)`` lines, as ESPnet's asr.sh does.

    sclite (``-i rm``) takes for the speaker what stands before the first ``-``.
    """
    with atomic_write(path) as stream:
        for utterance, words in tokens.items():
            stream.write(f"{' '.join(words)}\t({speakers[utterance]}-{utterance})\n")


def read_scored_words(directory: Union[str, Path]) -> dict[str, tuple[list[str], list[str]]]:
    """``{utterance: (reference, hypothesis)}`` in words, of a scored decoding directory.

    Raises:
        UserError: The directory is not scored, or its files do not belong together.
    """
    source = Path(directory) / "score_wer"
    tables = []
    for name in ("utterances.tsv", "ref.trn", "hyp.trn"):
        if not (source / name).is_file():
            raise UserError(
                f"{source / name}: no such file; score {directory} first "
                "(espnet_llm_plugin.bin.score)"
            )
        tables.append((source / name).read_text(encoding="utf-8").split("\n")[:-1])
    rows, references, hypotheses = tables[0][1:], tables[1], tables[2]
    if not len(rows) == len(references) == len(hypotheses):
        raise UserError(f"{source}: its files differ in utterances; score {directory} again")

    def words(line: str) -> list[str]:
        return line.rpartition("\t")[0].split()

    return {
        row.split("\t")[0]: (words(ref), words(hyp))
        for row, ref, hyp in zip(rows, references, hypotheses)
    }


def sclite_markup(tokens: Mapping[str, Sequence[str]]) -> list[str]:
    """Find tokens that sclite would take for markup; here they are ordinary tokens.

    sclite reads ``{ a / b }`` as alternatives and ``@`` as no word, drops a backslash, a final
    ``*`` and all that follows a ``;``, and skips lines that begin with ``;;``.
    """
    found = {
        token
        for words in tokens.values()
        for token in words
        if token == "@"
        or (len(token) > 1 and token.endswith("*"))
        or any(mark in token for mark in "{};\\")
    }
    return sorted(found)
