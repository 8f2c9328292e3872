"""Parquet files with audio in the layouts of the Hugging Face Hub."""

import io

import pyarrow
import pyarrow.parquet
import soundfile

from tests.data.conftest import tone

AUDIO = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def encoded(seconds=0.2, rate=16000, kind="WAV"):
    """A tone as the bytes of an audio file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds, rate), rate, format=kind)
    return buffer.getvalue()


def cell(audio, path=None):
    """A value of type ``Audio``."""
    return {"bytes": audio, "path": path}


def write_parquet(path, rows, audio="audio"):
    """Rows (all with the same keys) as a Parquet file; ``audio`` is the column of type Audio."""
    kinds = {audio: AUDIO, "duration": pyarrow.float32(), "audio_length_s": pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in rows[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
