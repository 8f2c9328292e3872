"""Greedy drafts with their alternatives: what :mod:`espnet_llm_plugin.fusion.verify` starts from.

T frames, V tokens (blank 0, sos/eos V-1), D encoder width.
"""

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from espnet_llm_plugin.fusion.prior import Prior
from espnet_llm_plugin.fusion.verify import Slot
from espnet_llm_plugin.transducer.prefix_tree import ROOT, PrefixTree

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.scorer import TransducerScorer

BLANK_ID = 0


def ctc_slots(
    log_probs: Tensor,
    *,
    alternatives: int = 4,
    margin: float = 8.0,
    prior: Optional[Prior] = None,
    prior_weight: float = 0.0,
) -> list[Slot]:
    """The greedy CTC path as slots.

    A run of frames with one best token is a slot: of a label, or of nothing where the blank is
    best. The score of an alternative label is that of the best path in the run that emits it once
    (``blank* label+ blank*``), the score of nothing that of blanks throughout. The scores of all
    slots thus sum to that of a CTC path. The draft's labels of the
    runs beside a run are no alternatives in it: without a blank between, both would be one.

    Args:
        log_probs: Of one utterance (T, V).
        alternatives: Besides the draft's, at most so many.
        margin: Alternatives whose score is further below the draft's are left out.
        prior: Subtracted for each label (``label`` mode).
        prior_weight: Its weight.
    """
    log_probs = log_probs.float().cpu()
    best = log_probs[:, :-1].argmax(dim=1)
    starts = [0, *(torch.nonzero(best[1:] != best[:-1])[:, 0] + 1).tolist()] if len(best) else []
    runs = list(zip(starts, [*starts[1:], len(best)]))
    subtracted = torch.zeros(log_probs.size(1))
    if prior is not None:
        subtracted = prior_weight * prior.log_prior.cpu()
    slots = []
    for number, (begin, end) in enumerate(runs):
        token = int(best[begin])
        rows = log_probs[begin:end]
        # where the blank is best in all frames, a label is best emitted in one of them
        blanks = rows[:, BLANK_ID].sum()
        emitted = blanks + (rows - rows[:, :1]).amax(dim=0) if token == BLANK_ID else _once(rows)
        scores = emitted - subtracted
        scores[-1] = -torch.inf  # sos/eos
        scores[BLANK_ID] = blanks
        own = float(scores[token])
        for beside in (number - 1, number + 1):
            if 0 <= beside < len(runs):
                neighbour = int(best[runs[beside][0]])
                if neighbour != BLANK_ID:
                    scores[neighbour] = -torch.inf
        scores[token] = -torch.inf
        slots.append(_slot(token, own, scores, alternatives, margin))
    return slots


def _once(rows: Tensor) -> Tensor:
    """Best path score that emits each token exactly once in some frames (T, V): (V,)."""
    before = torch.zeros(())  # blanks only, so far
    within = torch.full((rows.size(1),), -torch.inf)
    after = within.clone()
    for row in rows:
        after = torch.maximum(after, within) + row[BLANK_ID]
        within = torch.maximum(within, before.expand_as(within)) + row
        before = before + row[BLANK_ID]
    return torch.maximum(within, after)


def _slot(token: int, own: float, scores: Tensor, alternatives: int, margin: float) -> Slot:
    """The draft's token, and the best others of ``scores`` (V,), in which it is left out."""
    top = scores.topk(min(alternatives, len(scores)))
    kept = [
        (index, score)
        for index, score in zip(top.indices.tolist(), top.values.tolist())
        if score >= own - margin
    ]
    return Slot(
        tuple(() if index == BLANK_ID else (index,) for index in (token, *(i for i, _ in kept))),
        (own, *(score for _, score in kept)),
    )


@torch.inference_mode()
def transducer_slots(
    scorer: "TransducerScorer",
    encoder_out: Tensor,
    labels: Sequence[int],
    frames: Sequence[int],
    *,
    alternatives: int = 4,
    margin: float = 8.0,
    alpha: float = 0.0,
    forbidden: Sequence[int] = (),
) -> list[Slot]:
    """The labels of a greedy transducer search as slots.

    Alternatives of a label are what the transducer found most probable at the frame and after the
    labels where the draft's was emitted; nothing has the blank's score there. Labels where the
    draft has none are not considered.

    Args:
        scorer: Of the model.
        encoder_out: Of one utterance (T, D).
        labels: The draft, label = token id - 1.
        frames: Where each was emitted.
        alternatives, margin: See :func:`ctc_slots`.
        alpha: LM scale inside a factorized transducer's softmax.
        forbidden: Token ids that are never emitted.
    """
    if not labels:
        return []
    tree = PrefixTree(scorer.prefixes(), scorer.num_labels)
    nodes = [ROOT]
    for label in labels[:-1]:
        nodes.append(int(tree.children(np.array(nodes[-1:]), np.array([label]))[0]))
    prefixes, number = np.array(nodes), len(nodes)
    tree.need_predictor(prefixes)
    device = encoder_out.device
    cells = scorer.cells(
        scorer.frames(encoder_out[None]),
        torch.zeros(number, dtype=torch.long, device=device),
        torch.tensor(list(frames), device=device),
        tree.pool,
        prefixes,
        tree.label[prefixes],
        torch.full((number,), alpha, device=device),
    )
    rows = cells.labels(torch.arange(number, device=device)).float()
    rows = torch.cat([cells.blank.float()[:, None], rows], dim=1).cpu()
    slots = []
    rows[:, list(forbidden)] = -torch.inf
    for label, row in zip(labels, rows):
        scores, token = row.clone(), label + 1
        scores[token] = -torch.inf
        slots.append(_slot(token, float(row[token]), scores, alternatives, margin))
    return slots
