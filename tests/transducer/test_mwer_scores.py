"""Scores of several sequences of an utterance: each as if it were alone, without copies."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from espnet_llm_plugin.transducer.base_model import Lattice
from espnet_llm_plugin.transducer.loss import factorized_rnnt_loss
from espnet_llm_plugin.transducer.nbest import nbest
from espnet_llm_plugin.transducer.nbest_scores import NBest, factorized_nbest_nll
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import Scales, TransducerSearch
from tests.transducer import tiny

# per utterance: transcript, hypotheses; empty ones, more labels than frames, fewer hypotheses
FRAMES = (4, 2, 3)
TEXTS = ((2, 3, 4), (1, 1), ())
HYPS = (((2, 3), (), (5, 3, 4, 1)), ((1, 2, 1, 2, 3),), ((4,), (4, 4)))


def make_batch(dtype=torch.double, dim=tiny.DIM, frames=FRAMES, texts=TEXTS, hyps=HYPS, seed=0):
    """Lattice of the transcripts, and the hypotheses."""
    generator = torch.Generator().manual_seed(seed)
    encoder_out = torch.randn(len(frames), max(frames), dim, generator=generator, dtype=dtype)
    text = torch.ones(len(texts), max(map(len, texts)), dtype=torch.long)
    for b, row in enumerate(texts):
        text[b, : len(row)] = torch.tensor(row)
    size = len(hyps), max(map(len, hyps))
    longest = max(len(hyp) for rows in hyps for hyp in rows)
    tokens, lengths = torch.ones(*size, longest, dtype=torch.long), torch.zeros(size).long()
    exists = torch.zeros(size, dtype=torch.bool)
    for b, rows in enumerate(hyps):
        exists[b, : len(rows)] = True
        for i, hyp in enumerate(rows):
            tokens[b, i, : len(hyp)] = torch.tensor(hyp)
            lengths[b, i] = len(hyp)
    lattice = Lattice(encoder_out, torch.tensor(frames), text, torch.tensor([*map(len, texts)]))
    return lattice, NBest(tokens, lengths, exists, torch.zeros(size))


def alone(batch, b, sequence):
    """Utterance b with another transcript, trimmed."""
    frames = batch.frame_lengths[b : b + 1]
    text = torch.tensor([sequence], dtype=torch.long).reshape(1, -1)
    return Lattice(
        batch.encoder_out[b : b + 1, : int(frames)], frames, text, torch.tensor([len(sequence)])
    )


@pytest.mark.parametrize("blank_norm", ["sigmoid", "softmax"])
@pytest.mark.parametrize("lm_scale", [0.0, 0.6, 1.0])
def test_factorized_nll_is_that_of_each_sequence_alone(blank_norm, lm_scale):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[3, 0, 2], [1, 2, 3]])
    frames = torch.tensor([4, 2])  # of the second a sequence is longer than its frames

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()

    acoustic, lm, blank = draw(2, 4, 5), draw(2, 3, 4, 5), draw(2, 4, 3, 4)
    targets = torch.randint(0, 5, (2, 3, 3), generator=generator)
    for b in range(2):
        for s in range(3):
            targets[b, s, int(lengths[b, s]) :] = -7  # padding may hold anything
    options = dict(lm_scale=lm_scale, blank_norm=blank_norm)
    nll = factorized_nbest_nll(acoustic, lm, blank, targets, frames, lengths, **options)
    weights = torch.randn(2, 3, generator=generator, dtype=torch.double)
    gradients = torch.autograd.grad((weights * nll).sum(), (acoustic, lm, blank))

    expected = torch.stack(
        [
            factorized_rnnt_loss(
                acoustic,
                lm[:, s],
                blank[:, :, s],
                targets[:, s],
                frames,
                lengths[:, s],
                reduction="none",
                **options,
            )
            for s in range(3)
        ],
        dim=1,
    )
    torch.testing.assert_close(nll, expected)
    reference = torch.autograd.grad((weights * expected).sum(), (acoustic, lm, blank))
    for ours, theirs in zip(gradients, reference):
        torch.testing.assert_close(ours, theirs)


MODELS = {
    "stateless": lambda: tiny.factorized(),
    "scaled": lambda: tiny.factorized(
        alpha=0.5, beta=0.7, label_bonus=0.3, lm_scale=0.8, predictor="lstm"
    ),
    "softmax": lambda: tiny.factorized(blank_norm="softmax", acoustic_blank=False, beta=0.4),
    "rnnt": lambda: tiny.rnnt(),
    "residual": lambda: tiny.rnnt(acoustic_residual=True, layers=2),
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_scores_are_those_of_each_sequence_alone(kind):
    model = MODELS[kind]()
    dtype = torch.float if isinstance(model, type(tiny.rnnt())) else torch.double
    model = model.to(dtype).eval()
    batch, hyps = make_batch(dtype)
    scores = model.nbest_scores(batch, hyps)
    torch.testing.assert_close(scores.nll, model.lattice_nll(batch)[0])
    decoder = model.decoder
    factorized = not kind.startswith(("rnnt", "residual"))
    if factorized:
        decoder.lm_scale = decoder.decoding_alpha  # the same inner scale as in the search
    for b, rows in enumerate(HYPS):
        for i, hyp in enumerate(rows):
            one = alone(batch, b, hyp)
            expected = -model.lattice_nll(one)[0][0]
            if factorized:
                lm = decoder.predictor(one.text - 1)[0, :-1].to(dtype)
                lm = lm.gather(1, one.text[0, :, None] - 1).sum()
                expected = expected + decoder.beta * lm + decoder.label_bonus * len(hyp)
            torch.testing.assert_close(scores.hypotheses[b, i], expected)


@pytest.mark.parametrize("kind", MODELS)
def test_model_gradients_are_those_of_each_sequence_alone(kind):
    model = MODELS[kind]()
    dtype = torch.float if kind in ("rnnt", "residual") else torch.double
    model = model.to(dtype)
    if kind == "scaled":
        model.decoder.alpha, model.decoder.beta, model.decoder.label_bonus = None, 0.0, 0.0
    batch, hyps = make_batch(dtype)
    batch.encoder_out.requires_grad_()
    weights = torch.randn(hyps.lengths.shape, dtype=dtype) * hyps.exists
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [batch.encoder_out, *parameters]
    options = dict(allow_unused=True, materialize_grads=True)
    scores = model.nbest_scores(batch, hyps)
    total = (weights * scores.hypotheses).sum() + scores.nll.sum()
    gradients = torch.autograd.grad(total, wanted, **options)
    total = model.lattice_nll(batch)[0].sum()
    for b, rows in enumerate(HYPS):
        for i, hyp in enumerate(rows):
            one = alone(batch, b, hyp)
            score = -model.lattice_nll(one)[0][0]
            if kind == "softmax":
                lm = model.decoder.predictor(one.text - 1)[0, :-1].to(dtype)
                score = score + 0.4 * lm.gather(1, one.text[0, :, None] - 1).sum()
            total = total + weights[b, i] * score
    for ours, theirs in zip(gradients, torch.autograd.grad(total, wanted, **options)):
        # predictors and joiner return float32 whatever their parameters are
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["stateless", "scaled", "rnnt"])
def test_scores_are_those_of_an_exhaustive_search(kind):
    model = MODELS[kind]().eval()
    encoder_out = torch.randn(2, tiny.DIM) * 2
    scales = Scales()
    if kind != "rnnt":
        scales = Scales(beta=model.decoder.beta, label_bonus=model.decoder.label_bonus)
    search = TransducerSearch(build_scorer(model), beam_size=4000, max_symbols_per_frame=3)
    # with three labels a frame allowed, of three labels every alignment is counted
    found = [hyp for hyp in search(encoder_out, scales, 4000) if len(hyp.labels) <= 3][:40]
    assert len({hyp.labels for hyp in found}) == 40
    rows = tuple(tuple(label + 1 for label in hyp.labels) for hyp in found)
    batch, hyps = make_batch(torch.float, frames=(2,), texts=((2, 3),), hyps=(rows,))
    batch = batch._replace(encoder_out=encoder_out[None])
    scores = model.nbest_scores(batch, hyps).hypotheses[0]
    torch.testing.assert_close(scores, torch.tensor([hyp.total for hyp in found]).float())
    # the same lists by the adapter that training uses, best first, and with the decoder's scales
    best = nbest(model, encoder_out[None], torch.tensor([2]), 50, 5, 3)[0]
    assert best == [hyp.labels for hyp in search(encoder_out, scales, 5)]


@pytest.mark.parametrize("kind", ["scaled", "rnnt"])
def test_lists_of_a_batch_are_those_of_each_utterance(kind):
    model = MODELS[kind]().eval()
    encoder_out, lengths = torch.randn(3, 7, tiny.DIM) * 2, torch.tensor([7, 2, 5])
    together = nbest(model, encoder_out, lengths, 6, 4, 2)
    for b, length in enumerate(lengths.tolist()):
        alone = nbest(model, encoder_out[b : b + 1, :length], lengths[b : b + 1], 6, 4, 2)
        assert [together[b]] == alone and len(set(together[b])) == 4


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                own = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, min(own, tensor.numel()))
        return out


@pytest.mark.parametrize("kind", ["factorized", "rnnt"])
def test_no_tensor_is_larger_than_those_of_the_plain_loss(kind):
    frames, labels, num_hyps, vocab = 60, 4, 6, 500
    tokens = ["<blank>", *(f"w{i}" for i in range(vocab - 2)), "<sos/eos>"]
    if kind == "factorized":
        model = tiny.factorized(tokens=tokens)
    else:
        from espnet2.asr.decoder.transducer_decoder import TransducerDecoder
        from espnet2.asr_transducer.joint_network import JointNetwork

        decoder = TransducerDecoder(vocab, hidden_size=5, embed_pad=0)
        joint = JointNetwork(vocab, tiny.DIM, 5, joint_space_size=6)
        parts = tiny.parts(tokens)
        model = type(tiny.rnnt())(**parts, decoder=decoder, joint_network=joint)
    text = tuple(range(1, 1 + labels))
    rows = tuple(text[:i] + (9,) + text[i + 1 :] for i in range(4)) + (text[1:], text[:-1])
    assert len(rows) == num_hyps
    batch, hyps = make_batch(torch.float, frames=(frames,) * 2, texts=(text,) * 2, hyps=(rows,) * 2)
    batch.encoder_out.requires_grad_()
    sizes = []
    for with_nbest in (False, True):
        with LargestTensor() as largest:
            if with_nbest:
                scores = model.nbest_scores(batch, hyps)
                loss = scores.nll.sum() + scores.hypotheses.sum()
            else:
                loss = model.lattice_nll(batch)[0].sum()
            loss.backward()
        sizes.append(largest.entries)
    if kind == "factorized":
        assert sizes == [2 * frames * (vocab - 2)] * 2
    else:
        assert sizes == [2 * frames * (labels + 1) * vocab] * 2
