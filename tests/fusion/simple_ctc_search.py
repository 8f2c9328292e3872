"""A CTC prefix search as simple as can be: one utterance, dictionaries of label tuples.

Every label is tried after every prefix at every frame.
"""

import math

import numpy as np

NOTHING = -math.inf


def simple_search(
    log_probs,
    beam_size,
    *,
    lm=None,
    lm_weight=0.0,
    end=True,
    bonus=0.0,
    prior=None,
    prior_weight=0.0,
    combine=np.logaddexp,
    late=None,
):
    """Prefix -> score.

    Args:
        log_probs: (T, V) as an array.
        beam_size: Prefixes kept.
        lm: With ``row(labels)`` and ``end(labels)``; label-wise.
        prior: Log prior of labels (L,), label-wise.
        late: ``late(t, prefix, inherited)``: the delayed score of a prefix after frame t.
    """
    beam = {(): (0.0, NOTHING, 0.0)}  # ending in a blank, in the label; delayed score
    for t, frame in enumerate(log_probs):
        frame = frame.astype(float)
        new, inherited = {}, {prefix: delayed for prefix, (_, _, delayed) in beam.items()}

        def add(prefix, blank, label, new=new):
            b, n = new.get(prefix, (NOTHING, NOTHING))
            new[prefix] = (combine(b, blank), combine(n, label))

        for prefix, (b, n, delayed) in beam.items():
            both = combine(b, n)
            add(prefix, both + frame[0], n + frame[prefix[-1] + 1] if prefix else NOTHING)
            for label in range(len(frame) - 2):
                before = b if prefix and prefix[-1] == label else both
                longer = (*prefix, label)
                score = before + frame[label + 1] + bonus
                if lm is not None and lm_weight:
                    score += lm_weight * float(lm.row(prefix)[label])
                if prior is not None:
                    score -= prior_weight * prior[label]
                inherited.setdefault(longer, delayed)
                add(longer, NOTHING, score)
        ranked = sorted(new, key=lambda p: -(combine(*new[p]) + inherited[p]))[:beam_size]
        beam = {}
        for prefix in ranked:
            if combine(*new[prefix]) > NOTHING:
                delayed = inherited[prefix]
                if late is not None:
                    delayed = late(t, prefix, delayed)
                beam[prefix] = (*new[prefix], delayed)
    scores = {}
    for prefix, (b, n, delayed) in beam.items():
        scores[prefix] = combine(b, n) + delayed
        if lm is not None and end:
            scores[prefix] += lm_weight * lm.end(prefix)
    return scores
