"""The MWER loss itself, word errors of token sequences, and the options."""

import random

import jiwer
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.mwer import MWERConf, mwer_loss
from espnet_llm_plugin.transducer.nbest import NBestCache
from espnet_llm_plugin.transducer.word_errors import WordErrors


def example(batch=3, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, size, generator=generator, dtype=torch.double) * 3
    errors = torch.randint(0, 6, (batch, size), generator=generator).double()
    return scores.requires_grad_(), errors


@pytest.mark.parametrize("score_scale", [0.3, 1.0, 2.0])
def test_gradient_is_the_published_formula_and_that_of_finite_differences(score_scale):
    scores, errors = example()
    exists = torch.ones_like(errors, dtype=torch.bool)
    exists[1, 3:] = False

    def loss(scores):
        return mwer_loss(scores, errors, exists, score_scale)[0]

    (gradient,) = torch.autograd.grad(loss(scores).sum(), scores)
    for b, count in enumerate((5, 3, 5)):
        p = (score_scale * scores[b, :count].detach()).softmax(0)
        risk = errors[b, :count]
        expected = score_scale * p * (risk - (p * risk).sum())  # arXiv 2007.13802, eq. 8
        torch.testing.assert_close(gradient[b, :count], expected)
        value = (p * (risk - risk.mean())).sum()
        torch.testing.assert_close(loss(scores)[b], value)
    assert (gradient[1, 3:] == 0).all()
    assert torch.autograd.gradcheck(loss, scores)


def test_the_mean_changes_the_value_but_not_the_gradient():
    scores, errors = example()
    risk = (scores.softmax(-1) * errors).sum()
    (expected,) = torch.autograd.grad(risk, scores)
    (gradient,) = torch.autograd.grad(mwer_loss(scores, errors)[0].sum(), scores)
    torch.testing.assert_close(gradient, expected)


def test_a_large_scale_looks_at_the_best_hypothesis_alone():
    scores, errors = example()
    loss, probs = mwer_loss(scores, errors, score_scale=1e4)
    best = scores.argmax(-1)
    assert (probs.argmax(-1) == best).all()
    expected = errors.gather(1, best[:, None])[:, 0] - errors.mean(-1)
    torch.testing.assert_close(loss, expected)


def test_lists_without_variance_without_hypotheses_and_with_impossible_ones():
    scores, errors = example(batch=5)
    errors[0] = 2.0
    exists = torch.ones_like(errors, dtype=torch.bool)
    exists[1, 1:] = False
    exists[2] = False
    with torch.no_grad():
        scores[3, 1:3] = -torch.inf
        scores[4] = -torch.inf
    loss, probs = mwer_loss(scores, errors, exists)
    probs = probs.detach()
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert loss.isfinite().all() and gradient.isfinite().all()
    for b in (0, 1, 2, 4):
        assert abs(loss[b].item()) < 1e-12 and gradient[b].abs().max() < 1e-12
    assert (probs[3, 1:3] == 0).all() and probs[3].sum() == pytest.approx(1)
    rest = [0, 3, 4]
    alone = mwer_loss(scores[3:4, rest], errors[3:4, rest])[0]
    torch.testing.assert_close(loss[3:4], alone)


def test_batch_is_single():
    scores, errors = example()
    together = mwer_loss(scores, errors)[0]
    for b in range(3):
        alone = mwer_loss(scores[b : b + 1], errors[b : b + 1])[0]
        torch.testing.assert_close(together[b : b + 1], alone)


# --- words ---

PIECES = ["<blank>", "<unk>", "▁the", "▁c", "at", "s", "▁", "<sos/eos>"]
CHARS = ["<blank>", "<unk>", "<space>", "a", "b", "c", "<sos/eos>"]
WORDS = ["<blank>", "<unk>", "the", "cat", "sat", "<sos/eos>"]


@pytest.mark.parametrize(
    "tokens, ids, words",
    [
        (PIECES, [2, 3, 4, 5], ["the", "cats"]),
        (PIECES, [4, 6, 5, 1], ["at", "s<unk>"]),
        (PIECES, [6, 6], []),
        (CHARS, [3, 4, 2, 2, 5, 2], ["ab", "c"]),
        (CHARS, [3, 1, 4], ["a<unk>b"]),
        (WORDS, [2, 3, 1], ["the", "cat", "<unk>"]),
        (WORDS, [], []),
    ],
)
def test_words_of_tokens(tokens, ids, words):
    assert WordErrors(tokens).words(ids) == words


def test_words_are_those_of_sentencepiece(tmp_path):
    import sentencepiece

    text = ["the cat sat on the mat", "a cat and a dog ran to the market", "dogs chase cats"]
    (tmp_path / "text").write_text("\n".join(text * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "bpe"),
        vocab_size=25,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    words = WordErrors(pieces)
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(3, len(pieces)) for _ in range(draw.randrange(9))]
        assert words.words(ids) == model.decode_ids(ids).split()


def test_counts_are_those_of_jiwer():
    draw = random.Random(0)
    count = WordErrors(CHARS)
    for _ in range(50):
        reference = [3, *(draw.choice([2, 3, 4, 5]) for _ in range(draw.randrange(8)))]
        hyps = [[draw.choice([2, 3, 4, 5]) for _ in range(draw.randrange(9))] for _ in range(3)]
        text = " ".join(count.words(reference))
        for errors, hyp in zip(count(reference, hyps), hyps):
            result = jiwer.process_words(text, " ".join(count.words(hyp)))
            assert errors == result.substitutions + result.deletions + result.insertions
    assert count([], [[3, 2, 4], []]) == [2, 0]
    assert count([3, 2, 4], [[]]) == [2]


# --- options ---


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"nbest": 1}, "nbest must be an integer of at least 2, got 1"),
        ({"nbest": 4, "beam_size": 3}, r"beam_size must .* at least 4 \(nbest: 4\), got 3"),
        ({"beam_size": 8.0}, "beam_size must be an integer .* got 8.0"),
        ({"max_symbols_per_frame": 0}, "max_symbols_per_frame must .* at least 1, got 0"),
        ({"refresh": -1}, "refresh must be an integer of at least 0, got -1"),
        ({"refresh": True}, "refresh must be an integer of at least 0, got True"),
        ({"score_scale": 0}, "score_scale must be positive, got 0"),
        ({"rnnt_weight": -0.1}, "rnnt_weight must not be negative, got -0.1"),
    ],
)
def test_wrong_options(conf, message):
    with pytest.raises(UserError, match=f"model_conf.mwer_conf: {message}"):
        MWERConf(**conf)


# --- the cache ---


def search_counting(calls):
    def search(which):
        calls.append(which)
        return [[(len(calls), i), (i,)] for i in which]

    return search


def test_lists_are_kept_until_they_are_old():
    calls = []
    cache, search = NBestCache(refresh=2), search_counting(calls)
    history = []
    for names in (["a", "b"], ["a", "c"], ["a", "b"]):
        cache.next_batch()
        history.append(cache.lists(names, 2, search))
    # c is new in batch 2; in batch 3 both a and b are two batches old
    assert calls == [[0, 1], [1], [0, 1]]
    assert history[1] == [[(1, 0), (0,)], [(2, 1), (1,)]]
    assert history[2] == [[(3, 0), (0,)], [(3, 1), (1,)]]


def test_nothing_is_kept_without_refresh_or_without_names():
    for refresh, names in ((0, ["a", "b"]), (9, None)):
        calls = []
        cache = NBestCache(refresh)
        for _ in range(3):
            cache.next_batch()
            cache.lists(names, 2, search_counting(calls))
        assert calls == [[0, 1]] * 3


def test_an_utterance_without_hypotheses_is_searched_again():
    cache = NBestCache(refresh=9)
    assert cache.lists(["a"], 1, lambda which: [[]]) == [[]]
    assert cache.lists(["a"], 1, lambda which: [[(1,)]]) == [[(1,)]]
    assert cache.lists(["a"], 1, lambda which: [[(2,)]]) == [[(1,)]]
