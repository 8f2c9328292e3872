"""ESPnet's unmodified BeamSearchTransducer on the factorized transducer."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from espnet2.asr.transducer import beam_search_transducer as espnet
from espnet2.asr.transducer.error_calculator import ErrorCalculatorTransducer

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer import decoder as decoder_module
from tests.transducer.tiny import DIM, TOKENS, VOCAB, factorized, save_llm

SEARCHES = {
    "greedy": dict(beam_size=1),
    "default": dict(beam_size=4),
    "tsd": dict(beam_size=4, search_type="tsd", max_sym_exp=3),
    "alsd": dict(beam_size=4, search_type="alsd"),
    "nsc": dict(beam_size=4, search_type="nsc", nstep=1),
    "nsc3": dict(beam_size=4, search_type="nsc", nstep=3, prefix_alpha=2),
    "maes": dict(beam_size=4, search_type="maes", nstep=2),
    "maes3": dict(beam_size=3, search_type="maes", nstep=3, prefix_alpha=2, expansion_gamma=9.0),
}
SCALES = dict(alpha=0.4, beta=0.5, label_bonus=0.3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"))


def peaked(model, blank=0.0):
    """Make frames differ and blank likely enough for hypotheses of varied lengths."""
    with torch.no_grad():
        model.decoder.acoustic_output.weight.mul_(1.5)
        model.decoder.acoustic_output.bias[0] += blank
    return model.eval()


class SlowDecoder:
    """The same protocol without states and caches: every prefix from its first label."""

    def __init__(self, decoder):
        self.decoder, self.dunits, self.odim, self.blank_id = decoder, decoder.dunits, VOCAB, 0

    def set_device(self, device):
        pass

    def init_state(self, batch_size):
        return ["state"] * batch_size

    def select_state(self, states, idx):
        return "state"

    def create_batch_states(self, states, new_states, check_list=None):
        return ["state"] * len(new_states)

    def output(self, yseq):
        # any label stands for <sos/eos>, whose hypotheses have score minus infinity
        labels = torch.tensor([[t - 1 if t < VOCAB - 1 else 0 for t in yseq[1:]]]).long()
        last = labels[0, -1] + 1 if len(yseq) > 1 else torch.tensor(0)
        lm = self.decoder.predictor(labels.reshape(1, -1))[0, -1]
        return torch.cat([lm, self.decoder.blank.predict(last)])

    def score(self, hyp, cache):
        return self.output(hyp.yseq), "state", None

    def batch_score(self, hyps, dec_states, cache, use_lm):
        return torch.stack([self.output(h.yseq) for h in hyps]), ["state"] * len(hyps), None


def slow_joint(model):
    """Scores token by token in double precision, and as an ordinary tensor."""
    decoder = model.decoder
    alpha = decoder.lm_scale if decoder.alpha is None else decoder.alpha

    def cell(frame, output):
        lm, predictor_part = output[: VOCAB - 2].double(), output[VOCAB - 2 :]
        tokens = decoder.acoustic_output(frame).double()
        z = decoder.blank.output((decoder.blank.encoder_linear(frame) + predictor_part).tanh())[0]
        z, logits = z.double() + tokens[0], tokens[1:-1] + alpha * lm
        if decoder.blank_norm == "softmax":
            both = torch.cat([z[None], logits]).log_softmax(-1)
            blank, labels = both[0], both[1:]
        else:
            p = 1 / (1 + torch.exp(tokens[1:-1].logsumexp(-1) - z))
            blank, labels = p.log(), (1 - p).log() + logits.log_softmax(-1)
        scores = labels + decoder.beta * lm + decoder.label_bonus
        return torch.cat([blank[None], scores, torch.tensor([-torch.inf])]).float()

    def joint(frame, output):
        if output.dim() == 1:
            return cell(frame, output)
        return torch.stack([cell(f, o) for f, o in zip(frame.expand(len(output), -1), output)])

    return joint


def run(decoder, joint, encoder_out, **conf):
    search = espnet.BeamSearchTransducer(
        decoder, joint, token_list=TOKENS, **{"nbest": 4, "score_norm": False, **conf}
    )
    with torch.no_grad():
        return [(h.yseq, float(h.score)) for h in search(encoder_out)]


def same(actual, expected):
    assert [yseq for yseq, _ in actual] == [yseq for yseq, _ in expected]
    np.testing.assert_allclose([s for _, s in actual], [s for _, s in expected], atol=2e-4)


def search_both(monkeypatch, model, encoder_out, conf):
    actual = run(model.decoder, model.joint_network, encoder_out, **conf)
    with monkeypatch.context() as patch:
        # what the reference returns are final scores: no log_softmax for it either
        fake = SimpleNamespace(**{**vars(torch), "log_softmax": lambda x, dim: x})
        patch.setattr(espnet, "torch", fake)
        expected = run(SlowDecoder(model.decoder), slow_joint(model), encoder_out, **conf)
    same(actual, expected)
    return actual


@pytest.mark.parametrize(
    "predictor, blank_norm, scales",
    [
        ("stateless", "softmax", SCALES),
        ("lstm", "sigmoid", {}),
        ("lstm", "sigmoid", SCALES),
        ("llm", "sigmoid", SCALES),
    ],
)
@pytest.mark.parametrize("search", list(SEARCHES))
def test_states_and_caches_change_nothing(monkeypatch, llm, search, predictor, blank_norm, scales):
    conf = dict(predictor_conf={"llm": llm}) if predictor == "llm" else {}
    made = factorized(0, predictor=predictor, blank_norm=blank_norm, **conf)
    # a likely blank keeps the beams from running on; the greedy search must see labels at all
    model = peaked(made, -1.0 if search == "greedy" else 1.0)
    for name, value in scales.items():
        setattr(model.decoder, name, value)
    hyps = search_both(monkeypatch, model, torch.randn(5, DIM), SEARCHES[search])
    assert max(len(yseq) for yseq, _ in hyps) > 1  # not only empty hypotheses were compared


def alignments(frames, labels):
    """All ways to emit ``labels`` before the last blank: frame of each label, in order."""
    return itertools.combinations_with_replacement(range(frames), labels)


def cell_scores(model, encoder_out, sequences):
    slow, joint = SlowDecoder(model.decoder), slow_joint(model)
    return {
        prefix: torch.stack([joint(frame, slow.output([0, *prefix])) for frame in encoder_out])
        for prefix in {seq[:u] for seq in sequences for u in range(len(seq) + 1)}
    }


def exhaustive(model, encoder_out, max_labels, per_frame, total):
    """Score of every label sequence: ``total`` ("sum" or "max") over its alignments."""
    frames = len(encoder_out)
    sequences = [
        seq
        for length in range(max_labels + 1)
        for seq in itertools.product(range(1, VOCAB - 1), repeat=length)
    ]
    cells = cell_scores(model, encoder_out, sequences)
    result = {}
    for seq in sequences:
        scores = []
        for alignment in alignments(frames, len(seq)):
            if any(alignment.count(t) > per_frame for t in alignment):
                continue
            score = sum(float(cells[seq[:u]][t, seq[u]]) for u, t in enumerate(alignment))
            score += sum(
                float(cells[seq[: sum(a <= t for a in alignment)]][t, 0]) for t in range(frames)
            )
            scores.append(score)
        if scores:
            result[seq] = max(scores) if total == "max" else np.logaddexp.reduce(scores)
    return sorted(result.items(), key=lambda item: -item[1])


def two_labels(seed):
    """A model that all but excludes labels other than 1 and 2, so that a beam holds the rest."""
    model = peaked(factorized(seed), 1.5)
    with torch.no_grad():
        model.decoder.acoustic_output.bias[3:] -= 40
    for name, value in SCALES.items():
        setattr(model.decoder, name, value)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_default_search_finds_the_best_alignment(seed):
    """ESPnet's default search does not merge hypotheses: its best score is a Viterbi score."""
    model = peaked(factorized(seed, predictor="lstm"), 2.5)
    encoder_out = torch.randn(3, DIM)
    with torch.no_grad():
        (best, score), *_ = exhaustive(model, encoder_out, 3, 3, "max")
    hyps = run(model.decoder, model.joint_network, encoder_out, beam_size=6)
    assert tuple(hyps[0][0][1:]) == best
    assert hyps[0][1] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_time_synchronous_search_sums_alignments(seed):
    model = two_labels(seed)
    encoder_out = torch.randn(2, DIM)
    with torch.no_grad():
        expected = exhaustive(model, encoder_out, 2, 1, "sum")
    conf = dict(beam_size=VOCAB - 1, search_type="tsd", max_sym_exp=2, nbest=3)
    hyps = run(model.decoder, model.joint_network, encoder_out, **conf)
    same([(tuple(yseq[1:]), score) for yseq, score in hyps], expected[:3])


@pytest.mark.parametrize("seed", range(3))
def test_alignment_length_synchronous_search_sums_alignments(seed):
    model = two_labels(seed)
    encoder_out = torch.randn(2, DIM)
    with torch.no_grad():
        expected = exhaustive(model, encoder_out, 1, 1, "sum")
    conf = dict(beam_size=VOCAB - 1, search_type="alsd", nbest=1)
    hyps = run(model.decoder, model.joint_network, encoder_out, **conf)
    same([(tuple(yseq[1:]), score) for yseq, score in hyps], expected[:1])


def test_scales_take_effect():
    """Each of alpha, beta and label_bonus changes what ESPnet's searches return."""
    encoder_out = torch.randn(5, DIM)
    for search, conf in SEARCHES.items():
        model = peaked(factorized(0), -1.0 if search == "greedy" else 1.5)
        plain = run(model.decoder, model.joint_network, encoder_out, **conf)
        for name, value in SCALES.items():
            setattr(model.decoder, name, value)
            changed = run(model.decoder, model.joint_network, encoder_out, **conf)
            setattr(model.decoder, name, {"alpha": None}.get(name, 0.0))
            assert changed != plain, (search, name)


def test_label_bonus_lengthens():
    model = peaked(factorized(0), 3.0)
    encoder_out = torch.randn(8, DIM)
    lengths = []
    for bonus in (0.0, 1.0, 2.0, 4.0):
        model.decoder.label_bonus = bonus
        conf = SEARCHES["tsd"]
        lengths.append(len(run(model.decoder, model.joint_network, encoder_out, **conf)[0][0]))
    assert lengths == sorted(lengths) and lengths[-1] > lengths[0]


def test_unbounded_search_is_stopped(monkeypatch):
    """A bonus that outweighs every label's cost would keep ESPnet's default search going."""
    monkeypatch.setattr(decoder_module, "MAX_EXPANSIONS", 30)
    model = peaked(factorized(0, label_bonus=20.0), 2.5)
    encoder_out = torch.randn(40, DIM)
    with pytest.raises(UserError, match="label_bonus=20.0 .* search_type tsd"):
        run(model.decoder, model.joint_network, encoder_out, beam_size=3)
    # the count starts anew at every frame and every utterance
    model.decoder.label_bonus = 0.01
    for _ in range(2):
        run(model.decoder, model.joint_network, encoder_out, beam_size=3)


def test_external_lm_gets_last_tokens():
    """ESPnet's batched searches hand the decoder's last tokens to the external LM."""
    made = factorized(0).eval().decoder
    hyps = [SimpleNamespace(yseq=[0], dec_state=None)]
    _, states, last = made.batch_score(hyps, [None], {}, True)
    assert last.tolist() == [[0]]
    hyps = [SimpleNamespace(yseq=[0, 3], dec_state=states[0])]
    assert made.batch_score(hyps, states, {}, True)[2].tolist() == [[3]]
    assert made.score(hyps[0], {})[2].tolist() == [3]
    assert made.batch_score(hyps, states, {}, False)[2] is None


def test_same_prefix_twice_in_a_batch_is_one_predictor_call(monkeypatch):
    made = factorized(0, predictor="lstm").eval().decoder
    cache = {}
    with torch.no_grad():
        _, (state,), _ = made.batch_score(
            [SimpleNamespace(yseq=[0], dec_state=None)], [None], cache, False
        )
        calls = []
        original = made.predictor.extend

        def extend(labels, states):
            calls.append(labels.tolist())
            return original(labels, states)

        monkeypatch.setattr(made.predictor, "extend", extend)
        seqs = ([0, 3], [0, 1], [0, 3])
        hyps = [SimpleNamespace(yseq=seq, dec_state=state) for seq in seqs]
        out, _, _ = made.batch_score(hyps, [state] * 3, cache, False)
        made.batch_score(hyps, [state] * 3, cache, False)
    assert calls == [[2, 0]]
    torch.testing.assert_close(out[0], out[2])


def test_espnets_error_calculator():
    model = peaked(factorized(0), 1.0)
    calculator = ErrorCalculatorTransducer(
        model.decoder, model.joint_network, TOKENS, "<space>", "<blank>", True, True
    )
    with torch.no_grad():
        cer, wer = calculator(torch.randn(2, 5, DIM), torch.tensor([[2, 3], [4, 2]]))
    assert cer >= 0 and wer >= 0
