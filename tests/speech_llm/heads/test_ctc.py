"""Auxiliary CTC: its vocabularies, its loss against ESPnet's, targets that do not fit."""

from pathlib import Path

import numpy
import pytest
import torch
from espnet.nets.ctc_prefix_score import CTCPrefixScore
from espnet2.asr.ctc import CTC

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.heads.ctc import VocabularyCTC
from espnet_llm_plugin.speech_llm.heads.vocabulary import label_vocabulary
from espnet_llm_plugin.speech_llm.units import label_units
from tests.llm.tiny import TEXT, train_sentencepiece
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native

WIDTH = 6


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return label_units(save_adapted(tmp_path_factory.mktemp("llm") / "llm"), len(TOKENS))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    llm = save_native(tmp_path_factory.mktemp("native"))
    return label_units(llm, len(native_token_list(llm)))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    bpemodel, tokens = train_sentencepiece(tmp_path_factory.mktemp("spm") / "bpe", TEXT, 40)
    return {"token_list": str(tokens), "bpemodel": str(bpemodel)}


def batch():
    torch.manual_seed(0)
    text = torch.tensor([[3, 4, 4, 5], [6, 3, -1, -1], [4, -1, -1, -1]])
    return torch.randn(3, 9, WIDTH), torch.tensor([9, 4, 6]), text, torch.tensor([4, 2, 1])


def test_tokens_of_an_asr_list_are_their_own_labels(adapted):
    """Loss and scores are those of ESPnet's CTC."""
    ctc = VocabularyCTC(label_vocabulary("key", None, adapted), WIDTH)
    reference = CTC(len(TOKENS), WIDTH)
    reference.load_state_dict(ctc.state_dict())
    hs, hlens, text, lengths = batch()
    loss = ctc.loss(hs, hlens, text, lengths)
    flat = reference(hs, hlens, text, lengths)
    torch.testing.assert_close(loss.reduced(by_length=False), flat)
    torch.testing.assert_close(loss.reduced(by_length=True), flat * 3 / 7)
    torch.testing.assert_close(ctc.log_softmax(hs), reference.log_softmax(hs))
    assert ctc.ctc_lo.out_features == len(TOKENS)


def test_dropout_is_for_training(adapted):
    ctc = VocabularyCTC(label_vocabulary("key", None, adapted), WIDTH, dropout_rate=0.5)
    data = batch()
    assert ctc.loss(*data).nll.sum() != ctc.loss(*data).nll.sum()
    ctc.eval()
    assert torch.equal(ctc.loss(*data).nll, ctc.loss(*data).nll)


def test_an_llms_own_tokens_have_labels_beside_blank(native):
    vocabulary = label_vocabulary("key", None, native)
    ctc = VocabularyCTC(vocabulary, WIDTH)
    hs, hlens, text, lengths = batch()
    assert ctc.ctc_lo.out_features == native.vocab_size + 1
    labels, counts = vocabulary.targets(text, lengths)
    assert labels[0].tolist() == [4, 5, 5, 6] and counts.tolist() == [4, 2, 1]
    expected = torch.nn.functional.ctc_loss(
        ctc.ctc_lo(hs).log_softmax(-1).transpose(0, 1), labels, hlens, counts, reduction="none"
    )
    torch.testing.assert_close(ctc.loss(hs, hlens, text, lengths).nll, expected)

    # what ESPnet's prefix scorer, with blank 0 and the LLM's EOS, makes of the columns
    scores = ctc.log_softmax(hs)
    assert scores.shape == (3, 9, native.vocab_size)
    for i in range(3):
        scorer = CTCPrefixScore(scores[i, : hlens[i]].detach().numpy(), 0, native.eos, numpy)
        state, total = scorer.initial_state(), 0.0
        prefix = [native.sos]
        for token in [*text[i, : lengths[i]].tolist(), native.eos]:
            total, state = scorer(prefix, numpy.array([token]), state)
            state = state[0]
            prefix.append(token)
        torch.testing.assert_close(-float(total[0]), float(expected[i]), atol=1e-4, rtol=1e-4)


def test_pieces_beside_an_llms_own_tokens(native, pieces):
    import sentencepiece

    vocabulary = label_vocabulary("key", pieces, native)
    ctc = VocabularyCTC(vocabulary, WIDTH)
    sentences = ["the cat sat", "reading", ""]
    rows = [native.encode(sentence) for sentence in sentences]
    longest = max(map(len, rows))
    text = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])
    labels, counts = vocabulary.targets(text, torch.tensor([len(row) for row in rows]))
    tokens = Path(pieces["token_list"]).read_text(encoding="utf-8").splitlines()
    processor = sentencepiece.SentencePieceProcessor(model_file=pieces["bpemodel"])
    for row, count, sentence in zip(labels.tolist(), counts.tolist(), sentences):
        assert [tokens[i] for i in row[:count]] == processor.encode(sentence, out_type=str)
    assert ctc.ctc_lo.out_features == len(tokens) != native.vocab_size
    lengths = torch.tensor([len(row) for row in rows])
    loss = ctc.loss(torch.randn(3, 40, WIDTH), torch.tensor([40, 30, 2]), text, lengths)
    assert loss.fits.all() and torch.equal(loss.counts, counts)
    with pytest.raises(UserError, match="decode with ctc_weight 0"):
        ctc.log_softmax(torch.randn(1, 4, WIDTH))


def test_pieces_beside_an_adapted_llm(adapted, pieces):
    vocabulary = label_vocabulary("key", pieces, adapted)
    labels, counts = vocabulary.targets(torch.tensor([[5, 3, 4]]), torch.tensor([3]))
    assert counts[0] == len(labels[0]) > 0


@pytest.mark.parametrize("unit", ["adapted", "native"])
def test_target_longer_than_the_frames_is_left_out(request, unit):
    """Counted with the blanks that repeated labels need; the others' losses are as without it."""
    units = request.getfixturevalue(unit)
    ctc = VocabularyCTC(label_vocabulary("key", None, units), WIDTH)
    hs, _, text, lengths = batch()
    hlens = torch.tensor([4, 2, 6])  # 4 labels with one repetition need 5
    loss = ctc.loss(hs, hlens, text, lengths)
    assert loss.fits.tolist() == [False, True, True] and loss.num_skipped == 1.0
    assert loss.nll[0] == 0.0 and loss.counts.tolist() == [0, 2, 1]
    rest = ctc.loss(hs[1:], hlens[1:], text[1:], lengths[1:])
    for by_length in (True, False):
        torch.testing.assert_close(loss.reduced(by_length), rest.reduced(by_length))
    loss.reduced(True).backward()
    assert torch.isfinite(ctc.ctc_lo.weight.grad).all()
    nothing = ctc.loss(hs, torch.tensor([1, 1, 0]), text, lengths)
    assert not nothing.fits.any() and nothing.reduced(True) == 0.0
    exact = ctc.loss(hs, torch.tensor([5, 2, 1]), text, lengths)
    assert exact.fits.all() and (exact.nll > 0).all()


def test_bad_vocabularies(native, pieces, tmp_path):
    with pytest.raises(UserError, match="key: unknown option 'bpe'"):
        label_vocabulary("key", {**pieces, "bpe": ""}, native)
    with pytest.raises(UserError, match="needs token_list"):
        label_vocabulary("key", {}, native)
    with pytest.raises(UserError, match="give their model as bpemodel, got None"):
        label_vocabulary("key", {"token_list": pieces["token_list"]}, native)
    with pytest.raises(UserError, match="cannot be read"):
        label_vocabulary(
            "model_conf: ctc_vocabulary", {"token_list": str(tmp_path / "none")}, native
        )
