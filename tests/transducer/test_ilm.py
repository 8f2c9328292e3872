"""A bigram in place of an RNN-T's own internal LM."""

import itertools

import pytest
import torch

from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.ilm import WithBigramILM
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.contracts.search_contract import Case, SearchContract
from tests.transducer import tiny


@pytest.fixture(scope="module")
def bigram():
    generator = torch.Generator().manual_seed(0)
    sentences = [
        torch.randint(1, tiny.VOCAB - 1, (n % 5,), generator=generator).tolist() for n in range(20)
    ]
    return LabelNgram.estimate(sentences, tiny.VOCAB, 2)


class TestSearchContract(SearchContract):
    scales = Scales(beta=-0.4, label_bonus=1.0)
    max_labels = 3

    def case(self, seed):
        bigram = LabelNgram.estimate([[2, 3], [3, 3, 1], [2]], tiny.VOCAB, 2)
        frames = torch.randn(2, tiny.DIM, generator=torch.Generator().manual_seed(seed)) * 2
        return Case(WithBigramILM(build_scorer(tiny.rnnt().eval()), bigram), frames)


def test_what_is_subtracted_is_the_bigram_of_the_labels(bigram):
    model = tiny.rnnt().eval()
    torch.manual_seed(3)
    encoder_out = torch.randn(6, tiny.DIM) * 2
    plain = TransducerSearch(build_scorer(model), beam_size=4)
    search = TransducerSearch(WithBigramILM(build_scorer(model), bigram), beam_size=4)
    found = search(encoder_out, Scales(beta=-0.5), nbest=4)
    assert any(hyp.labels for hyp in found)
    for hyp in found:
        tokens = [tiny.VOCAB - 1, *(label + 1 for label in hyp.labels)]
        expected = sum(
            float(bigram.rows(torch.tensor([[a]]))[0, b]) for a, b in itertools.pairwise(tokens)
        )
        assert hyp.lm == pytest.approx(-0.5 * expected, abs=1e-4)
    # the acoustic scores are the model's
    own = {hyp.labels: hyp.acoustic for hyp in plain(encoder_out, nbest=4)}
    common = [hyp for hyp in search(encoder_out, nbest=4) if hyp.labels in own]
    assert common and all(hyp.acoustic == pytest.approx(own[hyp.labels]) for hyp in common)


def test_many_prefixes(bigram):
    """More than the first room for last labels."""
    model = tiny.rnnt().eval()
    torch.manual_seed(4)
    search = TransducerSearch(WithBigramILM(build_scorer(model), bigram), beam_size=16)
    state = search.start([Scales(beta=-0.3)])
    state = search.step(state, torch.randn(12, tiny.DIM) * 2)
    assert len(state.tree) > 64
    for hyp in state.nbest(16)[0]:
        tokens = [tiny.VOCAB - 1, *(label + 1 for label in hyp.labels)]
        rows = torch.zeros(0, tiny.VOCAB)
        if hyp.labels:
            rows = bigram.rows(torch.tensor(tokens[:-1])[:, None])
        expected = float(rows[torch.arange(len(rows)), torch.tensor(tokens[1:], dtype=int)].sum())
        assert hyp.lm == pytest.approx(-0.3 * expected, abs=1e-4)
