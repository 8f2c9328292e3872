"""Scorers of the label-synchronous search: ESPnet LMs, and rows that share a parent."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
from espnet_llm_plugin.speech_llm.scorers import ESPnetLM, LLMScorer
from espnet_llm_plugin.speech_llm.search import LabelSearch
from tests.fusion.test_external_lm import VOCAB, make
from tests.speech_llm.table_lm import TableLM


def whole(lm, tokens):
    """LM's log-prob of a sentence, from its training forward."""
    ids = torch.tensor([[VOCAB - 1, *tokens]])
    with torch.no_grad():
        rows = lm(ids, None)[0][0].log_softmax(-1)
    return float(sum(rows[i, token] for i, token in enumerate([*tokens, VOCAB - 1])))


@pytest.mark.parametrize("kind", ["transformer", "lstm", "causal_llm"])
def test_external_lm_in_the_search_scores_whole_sentences(kind):
    lm = make(kind)
    search = LabelSearch(
        sos=VOCAB - 1,
        eos=VOCAB - 1,
        vocab_size=VOCAB,
        beam_size=3,
        nbest=3,
        weights=SearchWeights(lm_weight=0.7),
        forbidden=(0,),
    )
    scorers = {
        "decoder": TableLM(VOCAB, 0, end=1.0).begin(range(3)),
        "lm": ESPnetLM(lm, VOCAB, VOCAB - 1, torch.device("cpu")),
    }
    for hyps in search(scorers, [12] * 3):
        for hyp in hyps:
            assert hyp.ended
            assert hyp.scores["lm"] == pytest.approx(whole(lm, hyp.tokens), abs=1e-4)


def test_lm_with_another_end_symbol_is_refused():
    with pytest.raises(UserError, match="--textlm_weight"):
        ESPnetLM(make("lstm"), VOCAB, 2, torch.device("cpu"))


def test_unscored_tokens_share_in_no_probability():
    class Fixed:
        def step(self, tokens, state, parents):
            return torch.tensor([[9.0, 1.0, 2.0, 9.0]]).expand(len(tokens), -1), state + 1

    scored = torch.tensor([False, True, True, False])
    scorer = LLMScorer(Fixed(), 0, scored)
    rows = scorer.step(torch.zeros(2, dtype=torch.long), torch.arange(2))
    assert scorer.state == 1
    assert rows[:, ~scored].eq(-torch.inf).all()
    assert rows[:, scored].exp().sum(1) == pytest.approx(torch.ones(2))
