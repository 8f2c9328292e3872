"""Our search against ESPnet's ``BeamSearchTransducer`` on the same models: scores and cost."""

import pytest
import torch
from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

from espnet_llm_plugin.transducer.hypothesis import Scales
from espnet_llm_plugin.transducer.scorer import build_scorer
from espnet_llm_plugin.transducer.search import TransducerSearch
from tests.transducer.test_espnet_beam_search import peaked
from tests.transducer.test_scorer import lattice_nll
from tests.transducer.tiny import DIM, factorized, rnnt, save_llm

SEEDS = range(30)
FRAMES = 8


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def make_model(llm):
    """(kind, seed) -> a model whose frames differ and that emits labels."""

    def make(kind, seed):
        if kind == "rnnt":
            model = rnnt(seed, acoustic_residual=True)
            output = model.joint_network.acoustic_output
            torch.nn.init.normal_(model.joint_network.lin_out.weight)
        else:
            conf = {"predictor_conf": {"llm": llm}} if kind == "llm" else {}
            model = factorized(seed, predictor=kind, alpha=0.6, **conf)
            output = model.decoder.acoustic_output
        with torch.no_grad():
            output.weight.mul_(8.0)
            output.bias[0] += 3.0
        return model.eval()

    return make


def encoder_out(seed):
    return 2 * torch.randn(FRAMES, DIM, generator=torch.Generator().manual_seed(seed))


def espnet(model, frames, beam, **conf):
    search = BeamSearchTransducer(
        model.decoder, model.joint_network, beam, score_norm=False, nbest=1, **conf
    )
    with torch.no_grad():
        best = search(frames)[0]
    return tuple(token - 1 for token in map(int, best.yseq) if token != 0), float(best.score)


def ours(model, frames, beam, max_symbols):
    scorer = build_scorer(model)
    # <sos/eos> is a label to ESPnet's search of an RNN-T
    search = TransducerSearch(scorer, beam_size=beam, max_symbols_per_frame=max_symbols)
    return search(frames)[0]


@pytest.mark.parametrize("kind", ["rnnt", "lstm", "llm"])
def test_same_greedy_output(make_model, kind):
    outputs = set()
    for seed in SEEDS:
        model, frames = make_model(kind, seed), encoder_out(seed)
        hyp = ours(model, frames, 1, max_symbols=1)  # ESPnet's emits one label a frame
        labels, score = espnet(model, frames, 1)
        assert hyp.labels == labels
        # ESPnet's greedy search does not count blanks
        assert hyp.total - hyp.blank == pytest.approx(score, abs=1e-3)
        outputs.add(labels)
    assert len(outputs) > 5 and max(map(len, outputs)) > 3


@pytest.mark.parametrize(
    "kind, conf",
    [
        # `default` may stay in a frame for ever, with random models: see below
        ("rnnt", {"search_type": "tsd", "max_sym_exp": 4}),
        ("rnnt", {"search_type": "alsd", "u_max": 30}),
        ("rnnt", {"search_type": "maes", "nstep": 3, "expansion_beta": 1}),
        ("lstm", {"search_type": "tsd", "max_sym_exp": 4}),
        ("lstm", {"search_type": "maes", "nstep": 3, "expansion_beta": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["search_type"],
)
def test_never_worse_on_average_at_equal_beam(make_model, kind, conf):
    """By the exact log-probability of the label sequence that each search returns."""
    mine, theirs = [], []
    for seed in SEEDS:
        model, frames = make_model(kind, seed), encoder_out(seed)
        labels, _ = espnet(model, frames, 4, **conf)
        found = ours(model, frames, 4, max_symbols=6)
        mine.append(-float(lattice_nll(build_scorer(model), frames, found.labels)))
        theirs.append(-float(lattice_nll(build_scorer(model), frames, labels)))
    assert sum(mine) >= sum(theirs) - 1e-3, (mine, theirs)


def test_never_worse_than_the_default_search_with_an_llm(llm):
    """Frames have likely blanks, without which ESPnet's ``default`` search does not leave them."""
    mine, theirs, lengths = [], [], set()
    for seed in range(10):
        model = peaked(factorized(seed, predictor="llm", predictor_conf={"llm": llm}), 1.0)
        frames = torch.randn(5, DIM, generator=torch.Generator().manual_seed(seed))
        labels, _ = espnet(model, frames, 4, search_type="default")
        found = ours(model, frames, 4, max_symbols=6)
        scorer = build_scorer(model)
        mine.append(-float(lattice_nll(scorer, frames, found.labels)))
        theirs.append(-float(lattice_nll(scorer, frames, labels)))
        lengths.add(len(labels))
    assert sum(mine) >= sum(theirs) - 1e-3, (mine, theirs)
    assert len(lengths) > 1


def test_the_llm_reads_a_token_for_each_prefix_explored_at_most(llm):
    """DESIGN: once per new prefix, state shared, nothing copied on a blank."""
    model = factorized(3, predictor="llm", predictor_conf={"llm": llm}, alpha=0.6).eval()
    with torch.no_grad():
        model.decoder.acoustic_output.weight.mul_(3.0)
    out = torch.stack([encoder_out(seed) for seed in range(6)])
    search = TransducerSearch(build_scorer(model), beam_size=8)
    state = search.start([Scales(label_bonus=0.5)], utterances=len(out))
    lm = model.decoder.predictor._prefix_lm
    tokens, calls = lm.num_token_forwards, lm.num_forwards
    state = search.step(state, out, torch.tensor([8, 6, 8, 3, 5, 7]))
    tokens, calls = lm.num_token_forwards - tokens, lm.num_forwards - calls
    assert tokens == state.tree.num_predictor <= 1.1 * state.tree.num_created
    assert tokens > 3 * calls > 0, "the prefixes of a step go together"
