"""Internal LM of attention decoders: as a scorer, and against the decoder with frames of zeros."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.attention_ilm import ZeroContextILM
from tests.contracts.scorer_contract import ScorerContract

VOCAB, DIM = 11, 8


def make_decoder(**options):
    from espnet2.asr.decoder.transformer_decoder import TransformerDecoder

    torch.manual_seed(0)
    decoder = TransformerDecoder(
        VOCAB, DIM, attention_heads=2, linear_units=12, num_blocks=2, **options
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder.eval()


class TestAsScorer(ScorerContract):
    vocab_size = VOCAB

    def make_scorer(self):
        return ZeroContextILM(make_decoder(), DIM)

    def test_blank_is_never_predicted(self):
        """It is subtracted: a very low score of the blank would make it likely."""
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert rows[:, 0].min() > -30

    def test_audio_does_not_matter(self):
        scorer = self.make_scorer()
        y = self.prefix([4, 5])
        rows = [scorer.score(y, None, torch.randn(7, DIM))[0] for _ in range(2)]
        assert torch.equal(*rows)


def test_any_number_of_zero_frames_is_the_same():
    """Attention over equal frames: the memory's length is no choice."""
    decoder = make_decoder()
    ids = torch.tensor([[VOCAB - 1, 3, 4, 9], [VOCAB - 1, 2, 2, 2]])
    with torch.no_grad():
        found, _ = ZeroContextILM(decoder, DIM)(ids)
        expected, _ = decoder(
            torch.zeros(2, 13, DIM), torch.tensor([13, 9]), ids, torch.tensor([4, 4])
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rnn_decoders():
    from espnet2.asr.decoder.rnn_decoder import RNNDecoder

    torch.manual_seed(0)
    decoder = RNNDecoder(VOCAB, DIM, hidden_size=6, sampling_probability=0.0).eval()
    scorer = ZeroContextILM(decoder, DIM)
    ids = torch.tensor([[VOCAB - 1, 3, 4], [VOCAB - 1, 2, 2]])
    with torch.no_grad():
        together = scorer(ids)[0]
        for row, one in zip(together, ids):
            torch.testing.assert_close(scorer(one[None])[0][0], row, atol=1e-5, rtol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="this is a Linear without decoder"):
        ZeroContextILM.of(torch.nn.Linear(1, 1))
