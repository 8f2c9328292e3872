"""ESPnet's LSTM LM as a predictor: the same probabilities, renormalised over the labels."""

import pytest
import torch
from espnet2.lm.espnet_model import ESPnetLanguageModel
from espnet2.lm.seq_rnn_lm import SequentialRNNLM

from espnet_llm_plugin.bin.lstm_predictor import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.lstm_lm import predictor_weights
from espnet_llm_plugin.transducer.predictors import build_predictor

V = 9  # <blank>, <unk>, six pieces, <sos/eos>


def language_model(**options):
    lm = SequentialRNNLM(V, unit=5, nhid=7, nlayers=2, **options)
    return lm, ESPnetLanguageModel(lm, V).state_dict()


def test_probabilities_of_labels(tmp_path):
    lm, weights = language_model()
    torch.save(weights, tmp_path / "lm.pth")
    main(["--lm_file", str(tmp_path / "lm.pth"), "--output", str(tmp_path / "predictor.pth")])
    checkpoint = torch.load(tmp_path / "predictor.pth", weights_only=True)
    predictor = build_predictor("lstm", V - 2, embed_dim=5, hidden_dim=7, num_layers=2)
    predictor.load_state_dict(
        {name.removeprefix("decoder.predictor."): value for name, value in checkpoint.items()}
    )
    labels = torch.randint(V - 2, (3, 6))
    history = torch.cat([torch.full((3, 1), V - 1), labels + 1], 1)  # after <sos/eos>
    logits, _ = lm(history, None)
    torch.testing.assert_close(predictor(labels), logits[..., 1:-1].log_softmax(-1))


def test_tied_tables():
    """A tied table is read as table of inputs and of outputs."""
    lm = SequentialRNNLM(V, unit=5, nlayers=1, tie_weights=True)
    found = predictor_weights(ESPnetLanguageModel(lm, V).state_dict())
    embed, output = (found[f"decoder.predictor.{name}.weight"] for name in ("embed", "output"))
    torch.testing.assert_close(embed[1:], output)
    torch.testing.assert_close(embed[0], lm.encoder.weight[-1])


def test_what_is_no_lstm_lm(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint of ESPnet's LM seq_rnn: .*lm.encoder"):
        predictor_weights({"decoder.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="no LSTM"):
        predictor_weights(language_model(rnn_type="gru")[1])
    with pytest.raises(UserError, match="there is no such file"):
        main(["--lm_file", str(tmp_path / "no.pth"), "--output", str(tmp_path / "x.pth")])
