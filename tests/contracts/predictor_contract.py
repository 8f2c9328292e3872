"""What every predictor of a factorized transducer must show."""

import pytest
import torch

CPU = torch.device("cpu")


def walk(predictor, labels):
    """Log-probabilities (U+1, L) of one label sequence, extended label by label."""
    log_probs, state = predictor.start(CPU)
    rows = [log_probs]
    for label in labels:
        log_probs, (state,) = predictor.extend(torch.tensor([label]), [state])
        rows.append(log_probs[0])
    return torch.stack(rows)


class PredictorContract:
    """Mix into a test class that has a fixture ``predictor`` (an ``AbsPredictor``, L >= 5)."""

    tolerance = 1e-5

    @pytest.fixture(autouse=True)
    def evaluating(self, predictor):
        predictor.eval()
        with torch.no_grad():
            yield

    def close(self, actual, expected):
        torch.testing.assert_close(actual, expected, atol=self.tolerance, rtol=self.tolerance)

    def test_scores_are_log_probabilities_of_the_labels(self, predictor):
        log_probs = predictor(torch.randint(predictor.num_labels, (3, 6)))
        assert log_probs.shape == (3, 7, predictor.num_labels)
        assert log_probs.dtype == torch.float32
        self.close(log_probs.logsumexp(-1), torch.zeros(3, 7))

    def test_teacher_forced_is_step_by_step(self, predictor):
        labels = torch.randint(predictor.num_labels, (3, 6))
        expected = torch.stack([walk(predictor, row) for row in labels.tolist()])
        self.close(predictor(labels), expected)

    def test_batch_is_single(self, predictor):
        labels = torch.randint(predictor.num_labels, (4, 6))
        singles = torch.cat([predictor(row[None]) for row in labels])
        self.close(predictor(labels), singles)

    def test_padding_and_later_labels_are_not_seen(self, predictor):
        labels = torch.randint(predictor.num_labels, (1, 6))
        other = labels.clone()
        other[:, 3:] = (other[:, 3:] + 1) % predictor.num_labels
        self.close(predictor(labels)[:, :4], predictor(other)[:, :4])
        self.close(predictor(labels)[:, :4], predictor(labels[:, :3]))

    def test_empty_sequence(self, predictor):
        empty = torch.zeros(2, 0, dtype=torch.long)
        self.close(predictor(empty), predictor.start(CPU)[0].expand(2, 1, -1))

    def test_last_label_matters(self, predictor):
        """No predictor is constant: the tests above would pass for one that is."""
        _, state = predictor.start(CPU)
        log_probs, _ = predictor.extend(torch.tensor([0, 1]), [state, state])
        assert (log_probs[0] - log_probs[1]).abs().max() > 1e-3

    def test_mixed_lengths_in_one_extend(self, predictor):
        _, root = predictor.start(CPU)
        states, prefixes = [root], [[]]
        for label in (2, 0, 4):
            _, (state,) = predictor.extend(torch.tensor([label]), [states[-1]])
            states.append(state)
            prefixes.append([*prefixes[-1], label])
        log_probs, new = predictor.extend(torch.tensor([3, 3, 1, 0]), states)
        for prefix, label, row in zip(prefixes, (3, 3, 1, 0), log_probs):
            self.close(row, walk(predictor, [*prefix, label])[-1])
        log_probs, _ = predictor.extend(torch.tensor([1, 2, 3, 4]), new)  # the new states too
        for prefix, first, second, row in zip(prefixes, (3, 3, 1, 0), (1, 2, 3, 4), log_probs):
            self.close(row, walk(predictor, [*prefix, first, second])[-1])

    def test_order_of_the_batch_does_not_matter(self, predictor):
        _, root = predictor.start(CPU)
        _, one = predictor.extend(torch.tensor([1]), [root])
        forward, _ = predictor.extend(torch.tensor([2, 3]), [root, one[0]])
        backward, _ = predictor.extend(torch.tensor([3, 2]), [one[0], root])
        self.close(forward, backward.flip(0))

    def test_states_are_not_modified(self, predictor):
        _, root = predictor.start(CPU)
        first, (shared,) = predictor.extend(torch.tensor([1]), [root])
        before, _ = predictor.extend(torch.tensor([2]), [shared])
        _, children = predictor.extend(torch.tensor([0, 3, 4]), [shared] * 3)
        predictor.extend(torch.tensor([0, 1, 2]), children)
        after, _ = predictor.extend(torch.tensor([2]), [shared])
        self.close(after, before)
        again, _ = predictor.extend(torch.tensor([1]), [root])
        self.close(again, first)

    def test_shared_prefixes_are_as_separate_ones(self, predictor):
        """All sequences of 3 labels over {0, 1, 2}, as a tree and each on its own."""
        _, root = predictor.start(CPU)
        level = {(): root}
        for _ in range(3):
            keys = [(*key, label) for key in level for label in range(3)]
            parents = [state for state in level.values() for _ in range(3)]
            labels = torch.tensor([key[-1] for key in keys])
            log_probs, states = predictor.extend(labels, parents)
            for key, row in zip(keys, log_probs):
                self.close(row, walk(predictor, key)[-1])
            level = dict(zip(keys, states))

    def test_two_utterances_at_once(self, predictor):
        """States of an earlier start stay valid after a later one."""
        _, first = predictor.start(CPU)
        _, (first,) = predictor.extend(torch.tensor([2]), [first])
        _, second = predictor.start(CPU)
        log_probs, _ = predictor.extend(torch.tensor([1, 1]), [first, second])
        self.close(log_probs[0], walk(predictor, [2, 1])[-1])
        self.close(log_probs[1], walk(predictor, [1])[-1])
