"""Greedy transducer search by label looping, the beam search's beam of one.

R rows, A of them not at their end, F frames of look-ahead, L labels.

As long as a hypothesis emits no label its blanks can be scored for many frames at once: rows jump
to the next frame where a label may beat the blank, each by itself.
[Label-looping, arXiv 2406.06220]
"""

from typing import TYPE_CHECKING

import numpy as np

from espnet_llm_plugin.transducer.beam import Beam, check_scores

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.chunk import Chunk

# Frames scored at once. More save calls, but those after the next label are scored in vain.
LOOK_AHEAD = 4


def greedy_step(chunk: "Chunk") -> None:
    """Extend ``chunk.state.beam`` (R, 1) by the chunk's frames."""
    state, scales = chunk.state, chunk.scales
    beam = state.beam
    node, path = beam.node[:, 0].copy(), beam.path[:, 0].copy()
    score, blanks = beam.score[:, 0].copy(), beam.blank[:, 0].copy()
    end = chunk.count[scales.utterance]
    time, symbols = np.zeros(len(end), dtype=np.int64), np.zeros(len(end), dtype=np.int64)
    rows = np.nonzero(time < end)[0]
    while len(rows):
        # 1. Blanks of the next frames; those beyond the end count for nothing.
        frame = time[rows, None] + np.arange(LOOK_AHEAD)
        inside = frame < end[rows, None]
        a, f = np.nonzero(inside)
        cells = chunk.cells(rows[a], frame[a, f], node[rows[a]])
        check_scores(cells.blank, chunk.emitted_at(rows[a], frame[a, f]))
        blank = np.zeros(frame.shape)
        blank[a, f] = cells.blank

        # 2. The first frame of each row where a label may win, and its best label.
        may = np.zeros(frame.shape, dtype=bool)
        may[a, f] = cells.ceiling + scales.most_added[rows[a]] > cells.blank
        may[:, 0] &= symbols[rows] < chunk.max_symbols_per_frame
        stop = np.where(may.any(axis=1), may.argmax(axis=1), inside.sum(axis=1))
        hopeful = np.nonzero(may.any(axis=1))[0]
        entry = np.zeros(frame.shape, dtype=np.int64)
        entry[a, f] = np.arange(len(a))
        wins = np.zeros(len(rows), dtype=bool)
        if len(hopeful):
            at = rows[hopeful]
            index = entry[hopeful, stop[hopeful]]
            totals = chunk.totals(cells, index, at, node[at], node[rows])
            best, label = (array.cpu().numpy() for array in totals.max(dim=1))
            best = check_scores(best.astype(float), chunk.emitted_at(at, time[at] + stop[hopeful]))
            wins[hopeful] = best > blank[hopeful, stop[hopeful]]

        # 3. Go there. A label that loses after all ends its frame by the blank.
        passed = stop + (may.any(axis=1) & ~wins)
        skipped = np.where(np.arange(LOOK_AHEAD) < passed[:, None], blank, 0.0).sum(axis=1)
        score[rows] += skipped
        blanks[rows] += skipped
        symbols[rows] = np.where(passed > 0, 0, symbols[rows])
        time[rows] += passed
        if wins.any():
            won = wins[hopeful]
            at = rows[wins]
            score[at] += best[won]
            node[at] = state.tree.children(node[at], label[won])
            path[at] = state.emissions.add(path[at], chunk.emitted_at(at, time[at]))
            symbols[at] += 1
        state.tree.release(node)
        rows = np.nonzero(time < end)[0]
    score = score[:, None]
    state.beam = Beam(
        node[:, None], score, score.copy(), blanks[:, None], path[:, None], np.zeros_like(score)
    )
