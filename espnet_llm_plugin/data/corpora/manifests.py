"""From lhotse's recordings and supervisions to Kaldi data directories."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from espnet_llm_plugin.data import kaldi
from espnet_llm_plugin.data.kaldi import DataDir
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError


def require_lhotse() -> None:
    """Raise a :class:`UserError` that says how to install lhotse, if it is not there."""
    try:
        import lhotse  # noqa: F401
    except ImportError:
        raise UserError(
            "preparing this corpus needs the Python package 'lhotse', which is not installed: run "
            "pip install 'lhotse>=1.33,<2'  (or install this package with its extra 'recipes')"
        ) from None


@contextmanager
def reading_audio(source: Path) -> Iterator[None]:
    """Turn lhotse's error for a damaged audio file into a :class:`UserError`."""
    from lhotse.audio.utils import AudioLoadingError

    try:
        yield
    except AudioLoadingError as error:
        # What each of lhotse's audio backends says; the first is libsndfile.
        lines = " ".join(str(error).splitlines()[:2])
        raise UserError(
            f"{source} has a damaged audio file: {lines} Unpack the archive again"
        ) from error


def to_data_dir(
    path: Path, recordings: Iterable, supervisions: Iterable, *, prefix: str = ""
) -> DataDir:
    """Recordings that are one utterance and one audio file each, as a data directory in memory.

    Args:
        path: Corpus directory (for messages only).
        recordings: lhotse ``Recording`` objects.
        supervisions: lhotse ``SupervisionSegment`` objects with speaker and text.
        prefix: Put before utterance and speaker ids, e.g. ``de_``: readers of several languages
            have one id in all of them.

    Returns:
        wav.scp with absolute paths, text, utt2spk, and spk2gender for speakers whose gender is
        known.
    """
    files = {recording.id: recording.sources[0].source for recording in recordings}
    wav, text, utt2spk, spk2gender = {}, {}, {}, {}
    for supervision in supervisions:
        utterance, speaker = prefix + supervision.id, prefix + supervision.speaker
        wav[utterance] = str(Path(files[supervision.recording_id]).absolute())
        text[utterance] = " ".join(supervision.text.split())
        utt2spk[utterance] = speaker
        if supervision.gender:
            spk2gender[speaker] = supervision.gender.lower()
    extra = {"spk2gender": spk2gender} if spk2gender else {}
    return DataDir(path, wav, utt2spk, text, extra=extra)


def check_pairs(
    source: Path,
    transcripts: dict[str, str],
    audio: set[str],
    more: Problems,
    *,
    allow_empty: bool = False,
) -> None:
    """Every audio file must have a transcript that is not empty, and the reverse.

    Args:
        source: Directory that the message names.
        transcripts: Transcripts by utterance id.
        audio: Utterance ids of the audio files.
        more: Faults found so far; all are reported together.
        allow_empty: Empty transcripts are the caller's business.

    Raises:
        UserError: There are faults, or there is no utterance at all.
    """
    known = more.keys
    for utterance in sorted(audio - transcripts.keys() - known):
        more.add(kaldi.NO_TEXT, utterance)
    for utterance in sorted(transcripts.keys() - audio - known):
        more.add(kaldi.NO_AUDIO, utterance)
    if not allow_empty:
        for utterance in sorted(key for key, text in transcripts.items() if not text.strip()):
            more.add(kaldi.EMPTY_TEXT, utterance)
    more.check("The corpus is not complete: unpack its archives again, or mend these files.")
    if not transcripts:
        raise UserError(f"{source} has neither transcripts nor audio: unpack its archive again")
