"""Mini-LSTM internal LM: as a scorer, and against a decoder that is written out in float64."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.attention_ilm import ZeroContextILM
from espnet_llm_plugin.fusion.mini_lstm import MiniLSTM, MiniLSTMILM
from tests.contracts.scorer_contract import ScorerContract
from tests.fusion.test_attention_ilm import DIM, VOCAB, make_decoder

HIDDEN = 5
IDS = torch.tensor([[VOCAB - 1, 3, 4, 9], [VOCAB - 1, 2, 2, 2]])


def make_ilm(decoder=None):
    decoder = decoder or make_decoder()
    torch.manual_seed(1)
    ilm = MiniLSTMILM(decoder, MiniLSTM(DIM, DIM, HIDDEN))
    with torch.no_grad():
        for parameter in ilm.mini_lstm.output.parameters():
            parameter.normal_()
    ilm.mini_lstm.eval()
    return ilm


class TestAsScorer(ScorerContract):
    vocab_size = VOCAB

    def make_scorer(self):
        return make_ilm()

    def test_blank_is_never_predicted(self):
        """It is subtracted: a very low score of the blank would make it likely."""
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert rows[:, 0].min() > -30

    def test_audio_does_not_matter(self):
        scorer = self.make_scorer()
        y = self.prefix([4, 5])
        rows = [scorer.score(y, None, torch.randn(7, DIM))[0] for _ in range(2)]
        assert torch.equal(*rows)

    def test_prefixes_that_begin_with_several_tokens(self):
        """As ESPnet's --lang_prompt_token begins: no state of a shorter prefix."""
        scorer = self.make_scorer()
        row, state = scorer.score(self.prefix([4, 5, 3]), None, None)
        expected = self.full_log_probs(scorer, [4, 5, 3, 9])
        torch.testing.assert_close(row, expected[3])
        row, _ = scorer.score(self.prefix([4, 5, 3, 9]), state, None)
        torch.testing.assert_close(row, expected[4])


def lstm_by_hand(lstm, inputs):
    """Hidden vectors (L, H) of inputs (L, E)."""
    hidden = cell = torch.zeros(lstm.hidden_size, dtype=inputs.dtype)
    found = []
    for x in inputs:
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ hidden
        i, f, g, o = (gates + lstm.bias_hh_l0).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        found.append(hidden)
    return torch.stack(found)


class Context(torch.nn.Module):
    """In place of a layer's cross-attention: what one frame for each label makes of it."""

    def __init__(self, attention, frames):
        super().__init__()
        self.attention, self.frames = attention, frames

    def forward(self, query, key, value, mask):
        values = self.frames @ self.attention.linear_v.weight.T + self.attention.linear_v.bias
        out = values @ self.attention.linear_out.weight.T + self.attention.linear_out.bias
        return out[None]


@pytest.mark.parametrize("options", [{}, {"normalize_before": False}, {"concat_after": True}])
def test_reference(options):
    """Without cache and masks, context vectors put where the cross-attentions were."""
    decoder = make_decoder(**options).double()
    ilm = make_ilm(decoder)
    rows, state = [], ilm.init_state(None)
    with torch.no_grad():
        found, _ = ilm(IDS)
        for end in range(1, IDS.size(1) + 1):
            row, state = ilm.score(IDS[0, :end], state, None)
            rows.append(row)
        expected = []
        for ids in IDS:
            hidden = lstm_by_hand(ilm.mini_lstm.lstm, decoder.embed[0].weight[ids])
            frames = hidden @ ilm.mini_lstm.output.weight.T + ilm.mini_lstm.output.bias
            attentions = [layer.src_attn for layer in decoder.decoders]
            for layer, attention in zip(decoder.decoders, attentions):
                layer.src_attn = Context(attention, frames)
            nothing, one = torch.zeros(1, 3, DIM).double(), torch.tensor([3])
            expected.append(decoder(nothing, one, ids[None], torch.tensor([len(ids)]))[0][0])
            for layer, attention in zip(decoder.decoders, attentions):
                layer.src_attn = attention
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        torch.stack(rows), expected[0].log_softmax(-1), atol=1e-10, rtol=1e-10
    )


def test_begins_as_the_zero_context_estimate():
    decoder = make_decoder()
    ilm = MiniLSTMILM(decoder, MiniLSTM(DIM, DIM, HIDDEN))
    with torch.no_grad():
        expected = ZeroContextILM(decoder, DIM)(IDS)[0]
        torch.testing.assert_close(ilm(IDS)[0], expected)
        torch.testing.assert_close(ilm.score(IDS[0], None, None)[0], expected[0, -1].log_softmax(0))
        assert (make_ilm(decoder)(IDS)[0] - expected).abs().max() > 0.1


def test_other_decoders_are_refused():
    from espnet2.asr.decoder.rnn_decoder import RNNDecoder

    with pytest.raises(UserError, match="this model has a RNNDecoder: use --ilm zero_context"):
        MiniLSTMILM(RNNDecoder(VOCAB, DIM, hidden_size=6), MiniLSTM(6, DIM))
    with pytest.raises(UserError, match="--ilm mini_lstm .* this is a Linear without decoder"):
        MiniLSTMILM.new(torch.nn.Linear(1, 1))
