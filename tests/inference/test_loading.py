"""Models and text converters for decoding; the recogniser as a library."""

import argparse

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.loading import TextConverter, load_asr, sample_rate
from espnet_llm_plugin.inference.recognizer import Recognizer, default_scales
from espnet_llm_plugin.transducer.hypothesis import Scales
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_speech_llm
from tests.llm.tiny import save_adapted_dir


@pytest.fixture(scope="module")
def factorized(tmp_path_factory):
    return make_asr(tmp_path_factory.mktemp("model") / "ft", "factorized")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    scp = make_audio(tmp_path_factory.mktemp("wav"), {"utt": 0.8})
    return soundfile.read(scp.parent / "utt.wav", dtype="float32")[0]


def test_text_of_characters_and_without_tokenizer():
    converter = TextConverter(TOKENS, "char", None)
    tokens = converter.tokens([3, 2, 4, 5])
    assert tokens == ["a", "<space>", "b", "c"]
    assert converter.text(tokens) == "a bc"
    assert TextConverter(TOKENS, None, None).text(tokens) is None


def test_text_of_sentence_pieces(tmp_path):
    (tmp_path / "text").write_text("a cat sat\na mat\nthat cat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "bpe"),
        vocab_size=16,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "bpe.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    converter = TextConverter(pieces, "bpe", tmp_path / "bpe.model")
    assert converter.text(converter.tokens(model.encode("that cat sat"))) == "that cat sat"
    with pytest.raises(UserError, match="no such file"):
        TextConverter(pieces, "bpe", tmp_path / "none.model")


@pytest.mark.parametrize(
    "frontend,conf,rate",
    [("default", {"fs": "16k"}, 16000), ("default", {"fs": 8000}, 8000), ("default", {}, 16000)]
    + [(None, {}, None)],
)
def test_sample_rate_of_the_front_end(frontend, conf, rate):
    assert sample_rate(argparse.Namespace(frontend=frontend, frontend_conf=conf)) == rate


def test_recogniser_from_python(factorized, speech):
    asr = load_asr(factorized.config, factorized.model)
    assert default_scales(asr) == Scales(0.7, 0.1, 0.0, 0.3)  # decoder_conf
    recognizer = Recognizer(asr, beam_size=4, nbest=3)
    results = recognizer(speech)
    assert 1 < len(results) <= 3
    assert results[0].hypothesis.total >= results[1].hypothesis.total
    for result in results:
        assert [TOKENS[i] for i in result.token_ids] == result.tokens
        assert result.text == "".join(result.tokens).replace("<space>", " ")
        assert [label + 1 for label in result.hypothesis.labels] == result.token_ids
    assert recognizer(torch.tensor(speech))[0] == results[0]


def test_double_precision(factorized, speech):
    single = Recognizer(load_asr(factorized.config, factorized.model))(speech)[0]
    asr = load_asr(factorized.config, factorized.model, dtype="float64")
    assert next(asr.model.parameters()).dtype == torch.float64
    double = Recognizer(asr)(speech.astype(np.float64))[0]
    assert double.tokens == single.tokens
    assert double.hypothesis.total == pytest.approx(single.hypothesis.total, abs=1e-2)


def test_swap_options_belong_together(factorized):
    with pytest.raises(UserError, match="need --predictor"):
        load_asr(factorized.config, factorized.model, predictor_conf={"embed_dim": 12})
    with pytest.raises(UserError, match="checkpoint"):
        load_asr(factorized.config, factorized.model, predictor="lstm")


def test_lm_weight_without_lm_is_refused(factorized):
    asr = load_asr(factorized.config, factorized.model)
    with pytest.raises(UserError, match="no LM"):
        Recognizer(asr, scales=Scales(lm_weight=0.3))


def test_auxiliary_heads_are_neither_built_nor_exported(tmp_path):
    """Their tensors in the checkpoint are ignored, and the files of their vocabularies not read."""
    from espnet_llm_plugin.llm.backbone import load_causal_lm
    from espnet_llm_plugin.llm.export_tuned import export_tuned_llm

    llm = save_adapted_dir(tmp_path / "llm", TOKENS)
    (tmp_path / "labels.txt").write_text("\n".join(TOKENS) + "\n")
    head = f"loss: rnnt, tap: llm_prefix, vocabulary: {{token_list: {tmp_path}/labels.txt}}"
    conf = {"decoder_conf": ", tuning: full", "model_conf": f", auxiliary: [{{{head}}}]"}
    files = make_speech_llm(tmp_path / "asr", llm, **conf)
    saved = torch.load(files.model)
    assert any(name.startswith("auxiliary.") for name in saved)
    (tmp_path / "labels.txt").unlink()
    model = load_asr(files.config, files.model).model
    kept = model.state_dict()
    assert kept.keys() == {name for name in saved if not name.startswith("auxiliary.")}
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    export_tuned_llm(files.config, files.model, tmp_path / "out")
    assert load_causal_lm(tmp_path / "out").state_dict().keys() == (
        load_causal_lm(llm).state_dict().keys()
    )
