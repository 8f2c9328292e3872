"""An n-gram LM over ASR tokens as an external LM: kenlm's, or one of ``estimate_ngram``.

N prefixes, V tokens of the list.
"""

import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, Sequence, Union

import torch
from espnet.nets.scorer_interface import BatchScorerInterface
from torch import Tensor

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.token_list import BLANK, SOS_EOS, UNK

_SPECIAL = (BLANK, UNK, SOS_EOS)
# Contexts whose rows are kept, 4 V bytes each.
_ROWS = 4096
# As causal_llm's: finite, so that a weight of zero leaves zero.
_BLANK = -1.0e9


def load_ngram(path: Union[str, Path], tokens: Sequence[str]) -> BatchScorerInterface:
    """The n-gram LM of a file: ``estimate_ngram``'s (``.npz``), ARPA, or kenlm's binary.

    Args:
        path: File.
        tokens: V tokens.

    Raises:
        UserError: An unreadable file, one of another vocabulary, or kenlm is not installed.
    """
    if not Path(path).is_file():
        raise UserError(f"n-gram file {path} does not exist")
    if Path(path).suffix == ".npz":
        return LabelNgram.load(path, tokens)
    return NgramLM(path, tokens)


class NgramLM(BatchScorerInterface):
    """Log-probs of the next token, natural logarithms.

    ESPnet's own n-gram scorer reads the same files, but its scores are kenlm's decimal logarithms:
    a weight here is ESPnet's divided by 2.3.

    Args:
        path: ARPA or kenlm's binary file over the tokens of the list, separated by spaces (a space
            of a character list as ``<space>``).
        tokens: V tokens.

    Raises:
        UserError: kenlm is not installed, an unreadable file, or one of another vocabulary.
    """

    # The row depends on the state alone, whatever the lengths of the prefixes in a batch.
    batch_any_length = True

    def __init__(self, path: Union[str, Path], tokens: Sequence[str]):
        try:
            import kenlm
        except ImportError:
            raise UserError("n-gram LMs need kenlm: pip install kenlm") from None
        if not Path(path).is_file():
            raise UserError(f"n-gram file {path} does not exist")
        try:
            self._lm = kenlm.Model(str(path))
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"kenlm cannot read n-gram file {path} ({reason})") from None
        self._new_state = kenlm.State
        self._tokens = ["</s>" if token == SOS_EOS else token for token in tokens]
        self._rows: OrderedDict[Any, Tensor] = OrderedDict()
        text = [token for token in tokens if token not in _SPECIAL]
        unknown = [token for token in text if token not in self._lm]
        if len(unknown) > len(text) / 2:
            raise UserError(
                f"n-gram file {path} is of another vocabulary: it lacks {len(unknown)} of the "
                f"{len(text)} tokens of the ASR model, e.g. {', '.join(map(repr, unknown[:3]))}. "
                "Train it on text cut into the model's tokens, separated by spaces"
            )
        if unknown:
            logging.warning(
                f"n-gram file {path} lacks {len(unknown)} of {len(text)} tokens; they count as "
                "unknown"
            )

    def init_state(self, x: Any) -> Any:
        """State of the empty prefix."""
        return None

    def score(self, y: Tensor, state: Any, x: Any) -> tuple[Tensor, Any]:
        """Log-probs (V,) of the token after prefix ``y`` (L,) beginning with sos; blank masked.

        Args:
            y: Prefix.
            state: Of the prefix without its last token; None where that is empty.
            x: Unused.
        """
        after = self._new_state()
        if state is None:
            self._lm.BeginSentenceWrite(after)
            for token in y.tolist()[_begin(y) :]:
                before, after = after, self._new_state()
                self._lm.BaseScore(before, self._tokens[token], after)
        else:
            self._lm.BaseScore(state, self._tokens[int(y[-1])], after)
        return self._row(after).to(y.device), after

    def batch_score(self, ys: Tensor, states: Sequence[Any], xs: Any) -> tuple[Tensor, list[Any]]:
        """As :meth:`score` for N prefixes (N, L), shorter ones padded on the left with 0."""
        scored = [self.score(y, state, None) for y, state in zip(ys, states)]
        rows, new = zip(*scored)
        return torch.stack(rows), list(new)

    def _row(self, state: Any) -> Tensor:
        row = self._rows.get(state)
        if row is None:
            end = self._new_state()
            scores = [self._lm.BaseScore(state, token, end) for token in self._tokens]
            row = torch.tensor(scores) * math.log(10)
            row[0] = _BLANK
            self._rows[state] = row
            if len(self._rows) > _ROWS:
                self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(state)
        return row


def _begin(y: Tensor) -> int:
    """Place after sos, which comes after the padding."""
    padding = 0
    while padding < len(y) and int(y[padding]) == 0:
        padding += 1
    return padding + 1
