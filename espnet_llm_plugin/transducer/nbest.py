"""N-best lists of a training batch: searched on the fly, or kept for a number of batches.

B utterances, T frames, N hypotheses, U labels, D encoder width.
"""

from array import array
from contextlib import contextmanager
from typing import Callable, Iterator, Optional, Sequence

import torch
from torch import Tensor

Labels = tuple[int, ...]


@torch.no_grad()
def nbest(
    model: torch.nn.Module,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    beam_size: int,
    nbest: int,
    max_symbols_per_frame: int,
) -> list[list[Labels]]:
    """The best label sequences of each utterance, best first, no sequence twice.

    The search uses the decoder's own scores (``alpha``, ``beta``, ``label_bonus`` of
    ``decoder_conf``) without length normalisation [arXiv 2404.01716], in the precision of the
    parameters whatever autocast says, and without dropout. Training modes are left as they were.

    Args:
        model: transducer of this package.
        encoder_out: (B, T, D).
        encoder_lengths: (B,) integers in [1, T].
        beam_size: hypotheses kept after a frame.
        nbest: hypotheses returned, at most.
        max_symbols_per_frame: labels emitted in a frame, at most.

    Returns:
        B lists of label sequences; token id = label + 1.
    """
    # imported here: the scorers import the models, which import this module
    from espnet_llm_plugin.transducer.prefix_tree import MAX_BYTES
    from espnet_llm_plugin.transducer.scorer import build_scorer
    from espnet_llm_plugin.transducer.search import Scales, TransducerSearch

    decoder = model.decoder
    scales = Scales(
        beta=getattr(decoder, "beta", 0.0), label_bonus=getattr(decoder, "label_bonus", 0.0)
    )
    encoder_out = encoder_out.to(next(decoder.parameters()).dtype)
    with (
        evaluation_mode(decoder, model.joint_network),
        torch.autocast(encoder_out.device.type, enabled=False),
    ):
        scorer = build_scorer(model)
        search = TransducerSearch(
            scorer,
            beam_size=beam_size,
            max_symbols_per_frame=max_symbols_per_frame,
            # an RNN-T has <sos/eos> = token V - 1 among its labels, though it never trains it
            forbidden_labels=[model.eos - 1] if scorer.num_labels >= model.eos else [],
            max_bytes=MAX_BYTES,
        )
        found = search.batch(encoder_out, encoder_lengths, scales, nbest)
        return [[hyp.labels for hyp in hyps] for hyps in found]


@contextmanager
def evaluation_mode(*modules: object) -> Iterator[None]:
    """Put modules (other objects are passed over) in evaluation mode; restores every submodule."""
    before = {
        part: part.training
        for module in modules
        if isinstance(module, torch.nn.Module)
        for part in module.modules()
    }
    try:
        for part in before:
            part.training = False
        yield
    finally:
        for part, training in before.items():
            part.training = training


class NBestCache:
    """N-best lists by utterance name, reused until they are ``refresh`` batches old.

    Searching is the most expensive part of MWER training; lists a fraction of an epoch old train
    as well as new ones [arXiv 2007.13802: refreshed every 1.25 M utterances or less]. Only the
    label sequences are kept: their probabilities always come from the current model.

    The lists belong to the process and are in no checkpoint. A resumed training starts without
    any, as does an utterance that another process of a distributed training had before; both cost
    a search and nothing else. An utterance of U labels takes about 4 * N * U bytes.

    Args:
        refresh: batches for which a list is reused; 0 keeps nothing.
    """

    def __init__(self, refresh: int):
        self.refresh = refresh
        self._batch = 0
        self._lists: dict[str, tuple[int, list[array]]] = {}

    def next_batch(self) -> None:
        """Count a training batch."""
        self._batch += 1

    def lists(
        self,
        names: Optional[Sequence[str]],
        size: int,
        search: Callable[[list[int]], list[list[Labels]]],
    ) -> list[list[Labels]]:
        """The lists of a batch of ``size`` utterances.

        Args:
            names: their names; None: nothing is kept or reused.
            size: B.
            search: gets the numbers (in 0..B-1) of the utterances to search, all in one call, and
                returns their lists; not called if there are none.
        """
        if not self.refresh or names is None:
            return search(list(range(size)))
        fresh = self._batch - self.refresh
        missing = [
            i for i, name in enumerate(names) if self._lists.get(name, (fresh, []))[0] <= fresh
        ]
        found = dict(zip(missing, search(missing))) if missing else {}
        for i, hyps in found.items():
            if hyps:  # none: the model's output was not finite, and may be again at the next try
                self._lists[names[i]] = self._batch, [array("i", labels) for labels in hyps]
        return [
            found[i] if i in found else [tuple(labels) for labels in self._lists[name][1]]
            for i, name in enumerate(names)
        ]
