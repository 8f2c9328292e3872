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
