"""CTC prefix scores in the label-synchronous search: with the package's scorer and with a slow one.

V tokens; CTC label 0 is the blank.
"""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
from espnet_llm_plugin.speech_llm.joint_ctc import JointCTC
from espnet_llm_plugin.speech_llm.search import LabelSearch
from tests.speech_llm.table_lm import TableCTC, TableLM
from tests.speech_llm.test_search import V, posteriors

WEIGHTS = SearchWeights(ctc_weight=0.4, penalty=0.2)


def padded(frames):
    lengths = torch.tensor([len(one) for one in frames])
    return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths


def decode(ctc, number, weights=WEIGHTS, beam=4, **more):
    search = LabelSearch(
        sos=V - 1, eos=V - 1, vocab_size=V, beam_size=beam, nbest=beam, weights=weights, **more
    )
    return search({"decoder": TableLM(V, 0).begin(range(number))}, [6] * number, ctc=ctc)


@pytest.mark.parametrize("weights", [WEIGHTS, SearchWeights(ctc_weight=1.0)], ids=str)
@pytest.mark.parametrize("beam", [1, 4])
def test_search_with_the_scorer_equals_that_with_sums_over_paths(weights, beam):
    frames = posteriors(4, seed=3)
    ours = JointCTC(*padded(frames), vocab_size=V, eos=V - 1)
    assert ours.candidates is None
    fast = decode(ours, 4, weights, beam)
    slow = decode(TableCTC(frames, V - 1), 4, weights, beam)
    for a, b in zip(fast, slow):
        assert [hyp.tokens for hyp in a] == [hyp.tokens for hyp in b]
        for one, other in zip(a, b):
            assert one.total == pytest.approx(other.total, abs=1e-4)
            assert one.scores["ctc"] == pytest.approx(other.scores["ctc"], abs=1e-4)


def test_top_k_labels_bound_the_search():
    frames = posteriors(5, seed=5)
    ctc = JointCTC(*padded(frames), vocab_size=V, eos=V - 1, top_k=2)
    assert ctc.candidates.shape == (5, 4)
    kept = [set(row.tolist()) for row in ctc.candidates]
    lists = decode(ctc, 5)
    for hyps, allowed in zip(lists, kept):
        assert {token for hyp in hyps for token in hyp.tokens} <= allowed - {0}
    # the one token kept is the one that some frame gives the most
    ctc = JointCTC(*padded(frames), vocab_size=V, eos=V - 1, top_k=1)
    for one, row in zip(frames, ctc.candidates.tolist()):
        assert set(row) == {0, 1 + int(one[:, 1:].amax(0).argmax()), V - 1}


def test_compression_of_sure_frames_changes_little():
    """Frames repeated are frames once."""
    frames = [
        torch.tensor([[0.02, 0.94, 0.02, 0.02], [0.9, 0.04, 0.03, 0.03], [0.1, 0.1, 0.7, 0.1]])
    ]
    frames = [torch.cat([one, one.new_full((len(one), 1), 1e-9)], 1).log() for one in frames]
    repeated = [one[[0, 0, 0, 1, 1, 2]] for one in frames]
    once = decode(JointCTC(*padded(frames), vocab_size=V, eos=V - 1, compress_threshold=0.9), 1)
    more = decode(JointCTC(*padded(repeated), vocab_size=V, eos=V - 1, compress_threshold=0.9), 1)
    full = decode(JointCTC(*padded(repeated), vocab_size=V, eos=V - 1), 1)
    assert [hyp.tokens for hyp in once[0]] == [hyp.tokens for hyp in more[0]]
    assert once[0][0].total == pytest.approx(more[0][0].total, abs=1e-5)
    assert full[0][0].total != pytest.approx(more[0][0].total, abs=1e-3)


def test_another_vocabulary_is_an_error():
    with pytest.raises(UserError, match="4 labels, the decoder 5 tokens"):
        JointCTC(torch.zeros(1, 3, 4), torch.tensor([3]), vocab_size=V, eos=V - 1)
