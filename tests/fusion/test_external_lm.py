"""ESPnet LMs as external LMs: their own whole-sequence scores, any mix of prefix lengths."""

import pytest
import torch
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM

from espnet_llm_plugin.fusion.external_lm import ExternalLM
from espnet_llm_plugin.llm.causal_llm import CausalLLM

VOCAB = 9


def make(kind):
    torch.manual_seed(0)
    if kind == "causal_llm":
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2)
        heads = dict(num_attention_heads=2, num_key_value_heads=1)
        return CausalLLM(VOCAB, config=dict(model_type="llama", **sizes, **heads)).eval()
    if kind == "transformer":
        return TransformerLM(VOCAB, embed_unit=8, att_unit=8, head=2, unit=8, layer=2).eval()
    return SequentialRNNLM(VOCAB, unit=8, nlayers=2, rnn_type=kind).eval()


def whole(lm, labels, num_labels):
    """Log-probs of the labels after a prefix, from the LM's training forward."""
    tokens = torch.tensor([[VOCAB - 1] + [label + 1 for label in labels]])
    with torch.no_grad():
        logits, _ = lm(tokens, None)
    return logits[0, -1].log_softmax(-1)[1 : 1 + num_labels]


@pytest.mark.parametrize("num_labels", [VOCAB - 2, VOCAB - 1])
@pytest.mark.parametrize("kind", ["transformer", "lstm", "gru", "rnn_tanh", "causal_llm"])
def test_stepwise_equals_the_whole_sequence(kind, num_labels):
    lm = make(kind)
    external = ExternalLM(lm, VOCAB, num_labels)
    row, state = external.start()
    torch.testing.assert_close(row, whole(lm, [], num_labels), atol=1e-5, rtol=1e-5)
    # a trie: every node extends an earlier one; lengths mixed in each call
    prefixes, states = [()], [state]
    for parents, labels in (([0, 0], [2, 5]), ([1, 0, 2], [0, 6, 1]), ([4, 1, 5, 3], [3, 3, 2, 2])):
        rows, new = external.extend(labels, [states[p] for p in parents])
        for parent, label, row in zip(parents, labels, rows):
            prefixes.append((*prefixes[parent], label))
            expected = whole(lm, prefixes[-1], num_labels)
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
        states += new


@pytest.mark.parametrize("kind,calls", [("lstm", 1), ("causal_llm", 1), ("transformer", 2)])
def test_one_call_for_all_prefixes_where_the_lm_can(kind, calls):
    external = ExternalLM(make(kind), VOCAB, VOCAB - 2)
    _, root = external.start()
    _, (first, _) = external.extend([1, 2], [root, root])
    before = external.num_calls
    external.extend([1, 2, 3], [root, first, first])
    assert external.num_calls - before == calls


def test_lm_that_takes_any_lengths_gets_them_padded_on_the_left():
    class Counting(torch.nn.Module):
        batch_any_length = True

        def batch_score(self, ys, states, xs):
            self.ys = ys.tolist()
            return torch.zeros(len(ys), VOCAB), [None] * len(ys)

    lm = Counting()
    external = ExternalLM(lm, VOCAB, VOCAB - 2)
    _, root = external.start()
    _, (longer,) = external.extend([3], [root])
    external.extend([0, 4], [root, longer])
    assert lm.ys == [[0, 8, 1], [8, 4, 5]]


def test_several_labels_longer_in_one_call():
    lm = make("causal_llm")
    external = ExternalLM(lm, VOCAB, VOCAB - 2)
    assert external.takes_paths and not ExternalLM(make("lstm"), VOCAB, VOCAB - 2).takes_paths
    _, root = external.start()
    _, (one,) = external.extend([2], [root])
    before = external.num_calls, lm._prefix_lm.num_forwards
    paths = [(3,), (3, 1), (3, 1, 1), (0,), (3, 1, 4)]
    rows, states = external.extend_paths(paths, [one, one, one, root, one])
    assert (external.num_calls, lm._prefix_lm.num_forwards) == (before[0] + 1, before[1] + 1)
    for row, path in zip(rows, [(2, *path) if path != (0,) else path for path in paths]):
        expected = whole(lm, path, VOCAB - 2)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
    _, deeper = external.extend([2], [states[2]])
    assert external.end_log_probs(deeper)[0] == pytest.approx(
        float(full_row(lm, (2, 3, 1, 1, 2))[-1]), abs=1e-5
    )


def full_row(lm, labels):
    tokens = torch.tensor([[VOCAB - 1] + [label + 1 for label in labels]])
    with torch.no_grad():
        logits, _ = lm(tokens, None)
    return logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["lstm", "causal_llm"])
def test_end_and_temperature(kind, temperature):
    lm = make(kind)
    external = ExternalLM(lm, VOCAB, VOCAB - 2, temperature=temperature)
    row, state = external.start()
    expected = (full_row(lm, ()) / temperature).log_softmax(-1)
    torch.testing.assert_close(row, expected[1:-1], atol=1e-5, rtol=1e-5)
    assert external.end_log_probs([state])[0] == pytest.approx(float(expected[-1]), abs=1e-5)


def test_tree_asks_for_missing_prefixes_at_once():
    """An LM that can is called once for prefixes of several new labels; the rows are the same."""
    import numpy as np

    from espnet_llm_plugin.transducer.prefix_tree import PrefixTree

    lm = make("causal_llm")
    at_once, stepwise = (ExternalLM(lm, VOCAB, VOCAB - 2) for _ in range(2))
    stepwise.takes_paths = False
    sums = []
    for external in (at_once, stepwise):
        tree = PrefixTree(None, VOCAB - 2, external)
        nodes = [0]
        for label in (1, 4, 2):
            nodes.append(int(tree.children(np.array(nodes[-1:]), np.array([label]))[0]))
        branch = tree.children(np.array([nodes[1]]), np.array([3]))
        asked = np.array([nodes[3], branch[0]])
        sums.append((tree.external_sums(asked), tree.external_ends(asked)))
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5)
    assert (at_once.num_calls, at_once.num_prefixes) == (3, 5)
    assert (stepwise.num_calls, stepwise.num_prefixes) == (4, 5)
