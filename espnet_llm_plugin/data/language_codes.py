"""Language codes as arrays, which is what a batch of ESPnet can carry beside speech and text.

A code travels as its UTF-8 bytes. So the model's configuration has the only list of languages, and
no second list, whose order nobody could check, stands between the data and the model.

B utterances, n bytes of the longest code.
"""

from typing import Any, Mapping, Optional, Sequence

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


def describe_foreign(utterances: Mapping[str, Sequence[Optional[str]]]) -> str:
    """Of languages that a model does not know: how many utterances, and one, by code.

    Args:
        utterances: Names by code; None where they are not known.
    """
    codes = []
    for code, names in utterances.items():
        example = "" if names[0] is None else f", e.g. {names[0]}"
        codes.append(f"'{code}' ({len(names)} utterance{'s' * (len(names) > 1)}{example})")
    return f"languages that the model does not know: {', '.join(codes)}"
