"""When a streaming recogniser knew a token, against when the token was spoken.

T encoder frames, V tokens, U tokens of a text.
"""

from typing import Optional, Sequence

import numpy as np
import torch

from espnet_llm_plugin.inference.simulate import Piece


@torch.no_grad()
def last_frames(ctc_log_probs: torch.Tensor, token_ids: Sequence[int]) -> Optional[list[int]]:
    """The last frame of each token in the best CTC alignment; None if there are too few frames.

    Args:
        ctc_log_probs: (T, V), blank 0.
        token_ids: (U,) in [1, V).
    """
    from torchaudio.functional import forced_align

    token_ids = list(token_ids)
    if not token_ids:
        return []
    repeats = sum(a == b for a, b in zip(token_ids, token_ids[1:]))
    if len(ctc_log_probs) < len(token_ids) + repeats:
        return None
    targets = torch.tensor([token_ids], device=ctc_log_probs.device, dtype=torch.int32)
    path = forced_align(ctc_log_probs[None].float().contiguous(), targets)[0][0].tolist()
    # A token's frames are in a row; the same token again has a blank between.
    after = [*path[1:], 0]
    last = [t for t, (now, then) in enumerate(zip(path, after)) if now != 0 and now != then]
    assert len(last) == len(token_ids)
    return last


def known_seconds(
    pieces: Sequence[Piece], token_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """When each token of the final result was shown for good, and when it was stable: (U,) each.

    In seconds of audio that had been given. What only the end of the stream brought was known at
    the end.

    Args:
        pieces: Of a recording without endpoints.
        token_ids: The final result.
    """
    final = list(token_ids)
    end = pieces[-1].given_seconds
    shown, stable = np.full(len(final), end), np.full(len(final), end)
    # Backwards: what is shown for good must be there in all later results too.
    agreed = len(final)
    for piece in reversed(pieces[:-1]):
        found = piece.partial.token_ids[:agreed]
        agreed = next(
            (u for u, (ours, other) in enumerate(zip(found, final)) if ours != other), len(found)
        )
        shown[:agreed] = piece.given_seconds
        stable[: piece.partial.num_stable] = piece.given_seconds
    return shown, stable
