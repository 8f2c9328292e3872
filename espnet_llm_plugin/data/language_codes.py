"""Language codes as arrays, which is what a batch of ESPnet can carry beside speech and text.

A code travels as its UTF-8 bytes. So the model's configuration has the only list of languages, and
no second list, whose order nobody could check, stands between the data and the model.

B utterances, n bytes of the longest code.
"""

from typing import Any, Optional

import numpy as np

# The name of the language id among the data: `dump/raw/train/utt2lang,lang,text`.
NAME = "lang"
# Code of an utterance whose language is known to be unknown, which is never predicted then.
UNKNOWN = "unk"


def encode_language(code: Optional[str]) -> np.ndarray:
    """A code -> its bytes (n,) int64; (0,) for None or an empty code: no language is given."""
    return np.frombuffer((code or "").strip().encode(), dtype=np.uint8).astype(np.int64)


def decode_languages(codes: Any, lengths: Any) -> list[Optional[str]]:
    """Codes of bytes (B, n), of which (B,) count each; None where there are none."""
    rows = zip(codes.tolist(), lengths.tolist())
    return [bytes(row[:length]).decode(errors="replace") or None for row, length in rows]
