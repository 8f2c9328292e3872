"""Audio that is too short for the encoder, with ESPnet's frontend and subsampling."""

import math

import pytest
import torch
from espnet.nets.pytorch_backend.transformer.subsampling import TooShortUttError
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.asr.specaug.specaug import SpecAug

from espnet_llm_plugin.encoder.short import shortest_input
from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder
from espnet_llm_plugin.inference.audio_use import measure
from espnet_llm_plugin.transducer.evaluate import corpus_nll
from tests.speech_llm import tiny as speech_llm
from tests.speech_llm.tiny_llm import save_adapted
from tests.transducer.tiny import DIM, factorized, rnnt

SAMPLES = (4000, 300, 0, 3000)  # the second has two frames of features
NAMES = ["good", "short", "empty", "good too"]
TEXTS = ((3, 4), (5,), (3,), (4,))
MELS = 8

ENCODERS = {
    "transformer": lambda: TransformerEncoder(MELS, DIM, 2, 8, 1, input_layer="conv2d"),
    "conformer": lambda: ConformerEncoder(
        MELS, DIM, 2, 8, 1, input_layer="conv2d2", normalize_before=True, cnn_module_kernel=3
    ),
    "streaming": lambda: StreamingConformerEncoder(
        MELS, DIM, attention_heads=2, linear_units=8, num_blocks=1
    ),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return str(save_adapted(tmp_path_factory.mktemp("llm")))


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(3)
    return ENCODERS[request.param]()


@pytest.fixture(params=["speech_llm", "rnnt", "factorized"])
def model(request, llm, encoder):
    if request.param == "speech_llm":
        made = speech_llm.model(llm, model_conf={"ctc_weight": 0.3})
    else:
        made = {"rnnt": rnnt, "factorized": factorized}[request.param]()
    made.frontend = DefaultFrontend(n_fft=256, hop_length=128, n_mels=MELS)
    made.encoder = encoder
    return made


def data(rows=range(4)):
    generator = torch.Generator().manual_seed(0)
    speech = torch.randn(len(SAMPLES), max(SAMPLES), generator=generator)
    lengths = torch.tensor(SAMPLES)
    speech = speech.masked_fill(torch.arange(speech.size(1)) >= lengths[:, None], 0.0)
    text = torch.tensor([[*row, *[-1] * (2 - len(row))] for row in TEXTS])
    rows = list(rows)
    longest = max(SAMPLES[row] for row in rows)
    return (
        speech[rows, :longest],
        lengths[rows],
        text[rows],
        torch.tensor([len(TEXTS[row]) for row in rows]),
    )


def too_short(model):
    """The streaming encoder completes its last frame with zeros."""
    return [2] if isinstance(model.encoder, StreamingConformerEncoder) else [1, 2]


def test_they_are_counted_and_have_no_part_in_the_loss(model, caplog):
    short = too_short(model)
    loss, stats, _ = model.eval()(*data(), utt_id=NAMES)
    assert float(stats["num_skipped"]) == len(short)
    for row, name in enumerate(NAMES):
        assert (f"skipped {name}:" in caplog.text) == (row in short)
    rest = [row for row in range(4) if row not in short]
    torch.testing.assert_close(loss, model(*data(rest))[0], atol=1e-4, rtol=1e-4)


def test_batches_of_nothing_else(model):
    rows = too_short(model)
    model.train()
    model.specaug = SpecAug(apply_time_warp=False, time_mask_width_range=(0, 2), num_time_mask=2)
    loss, stats, weight = model(*data(rows))
    assert float(loss) == 0.0 and 0 < float(weight) < 1e-10
    assert float(stats["num_skipped"]) == len(rows)
    loss.backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() == 0.0


def test_gradients_are_those_of_the_others(model):
    """Nothing that is made of padding reaches them, and nothing is not a number."""
    model.eval()
    model(*data())[0].backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rest = [row for row in range(4) if row not in too_short(model)]
    model(*data(rest))[0].backward()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, dict(model.named_parameters())[name].grad, atol=1e-4, rtol=1e-3
        )


def test_decoding_still_names_what_is_too_short(model):
    model.eval()
    if shortest_input(model.encoder) > 1:
        with pytest.raises(TooShortUttError):
            model.encode(torch.zeros(1, 300), torch.tensor([300]))
    model(*data())  # leaves no trace
    lengths = model.encode(*data([0, 3])[:2])[1]
    assert (lengths > 0).all()


def named(data, rows):
    keys = ("speech", "speech_lengths", "text", "text_lengths")
    return [NAMES[row] for row in rows], dict(zip(keys, data))


@pytest.mark.parametrize("at_once", [True, False])
def test_likelihoods_leave_them_out(model, at_once, caplog):
    groups = [range(4)] if at_once else [[row] for row in range(4)]
    if at_once and hasattr(model.decoder, "llm"):
        pytest.skip("a speech LLM's are computed one by one")
    found = corpus_nll(model, [named(data(rows), rows) for rows in groups])
    short = too_short(model)
    assert found.num_utterances == 4 - len(short) and found.num_impossible == len(short)
    rest = [row for row in range(4) if row not in short]
    alone = corpus_nll(model, [named(data([row]), [row]) for row in rest])
    # ESPnet's encoders give an utterance of a padded batch more frames than alone
    if not at_once or isinstance(model.encoder, StreamingConformerEncoder):
        assert math.isclose(found.total_nll, alone.total_nll, rel_tol=1e-3)


def test_use_of_audio_leaves_them_out(model, caplog):
    if not hasattr(model.decoder, "llm"):
        pytest.skip("of speech LLMs")
    found = measure(model, [named(data([row]), [row]) for row in range(4)]).use
    short = too_short(model)
    assert found.utterances == 4 - len(short) and found.skipped == len(short)
    assert "empty is left out" in caplog.text
