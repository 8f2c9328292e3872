"""An ESPnet language model as an external LM of a search over labels.

N prefixes, V tokens (blank 0, sos/eos V-1), L labels; label v is token v + 1.
"""

from typing import Any, Optional, Sequence

import torch
from espnet.nets.scorer_interface import BatchScorerInterface


class ExternalLM:
    """Next-label log-probs of an ESPnet LM, for many prefixes at once.

    Prefixes begin with ``<sos/eos>`` as ESPnet's own decoding does. The log-probs are the LM's, not
    renormalised over the labels: scores equal those of ESPnet's shallow fusion.

    Args:
        lm: ``LMTask``'s ``model.lm``: ``transformer``, ``seq_rnn``, ``causal_llm``, or any other
            ``BatchScorerInterface`` that reads token ids.
        vocab_size: V.
        num_labels: L (V - 2 without ``<sos/eos>``, V - 1 with it).
        device: Where the LM lives.
        temperature: The LM's probabilities are flattened (above 1) or sharpened by it.
    """

    def __init__(
        self,
        lm: BatchScorerInterface,
        vocab_size: int,
        num_labels: int,
        device: str = "cpu",
        temperature: float = 1.0,
    ):
        self.lm = lm
        self.sos = vocab_size - 1
        self.num_labels = num_labels
        self.device = torch.device(device)
        self.temperature = temperature
        # Some take prefixes that are several tokens longer than their states in one call.
        self.takes_paths = bool(getattr(lm, "batch_any_extension", False))
        # Tokens that matter, of an LM that says so: no more are handed on.
        self._context: Optional[int] = getattr(lm, "context", None)
        self.num_calls = 0
        self.num_prefixes = 0
        # Nearly every ESPnet LM stacks the states of a batch and so needs prefixes of one length;
        # recurrent ones read the last token only, others can say that they take any lengths.
        self.any_length = bool(getattr(lm, "batch_any_length", False)) or hasattr(lm, "rnn")

    def start(self) -> tuple[torch.Tensor, Any]:
        """Log-probs (L,) of the first label, and the state of the empty prefix."""
        rows, states = self._run([(self.sos,)], [None])
        return rows[0], states[0]

    def extend(self, labels: Sequence[int], states: Sequence[Any]) -> tuple[torch.Tensor, list]:
        """One label more for each of N prefixes.

        Args:
            labels: New last labels (N).
            states: States of the prefixes before it (N).

        Returns:
            Log-probs (N, L) of the labels that may follow, and N new states.
        """
        return self.extend_paths([(label,) for label in labels], states)

    def extend_paths(
        self, paths: Sequence[Sequence[int]], states: Sequence[Any]
    ) -> tuple[torch.Tensor, list]:
        """As :meth:`extend`, by any number of labels (N paths) if the LM :attr:`takes_paths`."""
        prefixes = [
            tokens + tuple(label + 1 for label in path)
            for (tokens, _, _), path in zip(states, paths)
        ]
        if self._context is not None:
            prefixes = [prefix[-self._context :] for prefix in prefixes]
        old = [state for _, state, _ in states]
        if self.any_length or len({len(prefix) for prefix in prefixes}) == 1:
            return self._run(prefixes, old)
        rows: Optional[torch.Tensor] = None
        new: list[Any] = [None] * len(prefixes)
        for length in sorted({len(prefix) for prefix in prefixes}):
            at = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
            part, part_states = self._run([prefixes[i] for i in at], [old[i] for i in at])
            if rows is None:
                rows = part.new_empty(len(prefixes), part.size(1))
            rows[torch.tensor(at, device=part.device)] = part
            for i, state in zip(at, part_states):
                new[i] = state
        return rows, new

    def end_log_probs(self, states: Sequence[Any]) -> list[float]:
        """Log-probs of ``<sos/eos>`` after each of N prefixes."""
        return [end for _, _, end in states]

    def _run(self, prefixes: list[tuple[int, ...]], states: list) -> tuple[torch.Tensor, list]:
        self.num_calls += 1
        self.num_prefixes += len(prefixes)
        # Ragged batches are padded on the left: the last column is every prefix's last token.
        longest = max(len(prefix) for prefix in prefixes)
        ys = torch.tensor(
            [(0,) * (longest - len(prefix)) + prefix for prefix in prefixes], device=self.device
        )
        with torch.inference_mode():
            log_probs, new = self.lm.batch_score(ys, states, None)
            log_probs = log_probs.float()
            if self.temperature != 1.0:
                log_probs = (log_probs / self.temperature).log_softmax(dim=-1)
        rows, ends = log_probs[:, 1 : 1 + self.num_labels], log_probs[:, self.sos].tolist()
        return rows, list(zip(prefixes, new, ends))
