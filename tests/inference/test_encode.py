"""Encoder outputs of several utterances: as of each alone, in one batch where that is the same."""

import numpy as np
import pytest
import torch

from espnet_llm_plugin.inference.loading import load_asr
from espnet_llm_plugin.inference.recognizer import encode, encode_batch, encodes_batches
from tests.inference.tiny_asr import RATE, make_asr
from tests.inference.tiny_streaming import ENCODERS, make_streaming_asr

GLOBAL = ""
PER_UTTERANCE = "normalize: utterance_mvn\nnormalize_conf: {}\n"


def noises(*seconds):
    generator = np.random.default_rng(0)
    return [0.1 * generator.normal(size=int(s * RATE)) for s in seconds]


def counted(encoder, monkeypatch):
    """Batch sizes that the encoder is called with."""
    sizes, forward = [], encoder.forward

    def count(feats, *args, **kwargs):
        sizes.append(len(feats))
        return forward(feats, *args, **kwargs)

    monkeypatch.setattr(encoder, "forward", count)
    return sizes


@pytest.mark.parametrize("normalize", [GLOBAL, PER_UTTERANCE], ids=["global", "per utterance"])
@pytest.mark.parametrize("chunk_size", [8, None])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_streaming_encoders_in_one_batch(encoder, chunk_size, normalize, tmp_path, monkeypatch):
    files = make_streaming_asr(tmp_path / encoder, encoder, "ctc", normalize)
    model = load_asr(files.config, files.model, dtype="float64").model
    model.encoder.set_chunk_size(chunk_size)
    speech = noises(1.3, 0.4, 2.0, 0.07)
    alone = [encode(model, [one]) for one in speech]
    sizes = counted(model.encoder, monkeypatch)
    together, lengths = encode_batch(model, [torch.from_numpy(one)[None] for one in speech])
    assert sizes == [4] and together.device == alone[0][0].device
    assert lengths.tolist() == [int(length) for _, length in alone]
    assert together.size(1) == max(lengths)
    for row, length, (expected, _) in zip(together, lengths, alone):
        assert length > 1 and expected.std() > 0.1
        torch.testing.assert_close(row[:length], expected[0], atol=1e-9, rtol=1e-9)
    assert encodes_batches(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_batch_on_a_gpu(tmp_path, monkeypatch):
    files = make_streaming_asr(tmp_path / "emformer", "emformer", "ctc")
    model = load_asr(files.config, files.model).model.cuda()
    sizes = counted(model.encoder, monkeypatch)
    encode(model, noises(1.3, 0.4))
    assert sizes == [2]


def test_others_one_by_one(tmp_path, monkeypatch):
    """ESPnet's subsampling adds frames of padding in a batch."""
    files = make_asr(tmp_path / "ctc", "ctc")
    model = load_asr(files.config, files.model).model
    assert not encodes_batches(model)
    sizes = counted(model.encoder, monkeypatch)
    speech = noises(1.3, 0.4)
    together, lengths = encode(model, speech)
    assert sizes == [1, 1]
    for row, length, one in zip(together, lengths, speech):
        expected, _ = encode(model, [one])
        torch.testing.assert_close(row[:length], expected[0])


def test_post_encoders_one_by_one(tmp_path):
    files = make_streaming_asr(tmp_path / "emformer", "emformer", "ctc")
    model = load_asr(files.config, files.model).model
    assert encodes_batches(model)
    model.postencoder = torch.nn.Identity()  # any: it may look across frames
    assert not encodes_batches(model)
