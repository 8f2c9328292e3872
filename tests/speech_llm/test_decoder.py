"""The speech LLM as an ESPnet decoder: teacher-forced, step by step, in ESPnet's searches."""

import copy

import pytest
import torch

from espnet_llm_plugin.errors import UserError, UtteranceError
from espnet_llm_plugin.llm.backbone import load_causal_lm
from tests.contracts.scorer_contract import ScorerContract
from tests.speech_llm.tiny import DIM, decoder, reference_logits
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native

PROMPT = {"before": "bad", "after": " cab"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return save_native(tmp_path_factory.mktemp("native"))


def speech(frames=7, seed=0):
    return torch.randn(frames, DIM, generator=torch.Generator().manual_seed(seed))


class Listening:
    """A decoder and one utterance, which the contract's calls do not know of."""

    def __init__(self, made, x):
        self.decoder, self.x = made, x

    def __call__(self, ids, _):
        expand = self.x[None].expand(len(ids), -1, -1)
        lengths = torch.full((len(ids),), len(self.x))
        return self.decoder(expand, lengths, ids, torch.full((len(ids),), ids.shape[1]))

    def init_state(self, x):
        return self.decoder.init_state(self.x)

    def score(self, y, state, x):
        return self.decoder.score(y, state, self.x)

    def batch_score(self, ys, states, xs):
        return self.decoder.batch_score(ys, states, self.x[None].expand(len(ys), -1, -1))


@pytest.mark.parametrize("prompt", ["none", PROMPT], ids=["none", "prompt"])
@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
class TestScorer(ScorerContract):
    vocab_size = len(TOKENS)

    @pytest.fixture(autouse=True)
    def _conf(self, llm, interface, prompt):
        made = decoder(llm, interface=interface, prompt=prompt, adapter_conf={"stack": 2}).eval()
        for name, parameter in made.interface.named_parameters():
            if "gate" in name:  # closed at the start
                parameter.data.fill_(0.7)
        self.decoder = made

    def make_scorer(self):
        scorer = Listening(self.decoder, speech())
        # what the contract's searches ask for
        from espnet.nets.scorer_interface import BatchScorerInterface

        scorer.__class__ = type("Scorer", (Listening, BatchScorerInterface), {})
        return scorer


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_logits_are_those_of_transformers(llm, native, kind):
    directory = llm if kind == "adapted" else native
    prompt = PROMPT if kind == "adapted" else "long"
    made = decoder(directory, kind == "native", prompt=prompt, adapter_conf={"stack": 2}).eval()
    reference = load_causal_lm(directory)
    hs = torch.stack([speech(7), torch.nn.functional.pad(speech(4, 1), (0, 0, 0, 3), value=9.0)])
    text = torch.tensor([[5, 3, 4], [8, 5, 5]])
    tokens = torch.nn.functional.pad(text, (1, 0), value=made.prompt.sos)
    lengths = torch.tensor([4, 3])
    logits, given = made(hs, torch.tensor([7, 4]), tokens, lengths)
    assert torch.equal(given, lengths)
    audio = made.adapt(hs, torch.tensor([7, 4]))
    assert audio.lengths.tolist() == [4, 2]
    for i in range(2):
        embeddings = audio.embeddings[i, : audio.lengths[i]]
        expected = reference_logits(reference, made, embeddings, text[i, : lengths[i] - 1].tolist())
        ours = logits[i, : lengths[i]]
        scored = made.scored
        torch.testing.assert_close(ours[:, scored], expected[:, scored], atol=1e-4, rtol=1e-4)
        assert (ours[:, ~scored] < -1e8).all()
    assert (~made.scored).sum() == (1 if kind == "adapted" else 5)


def test_list_without_the_rows_beyond_the_tokenizer(native):
    """ESPnet's own export of a vocabulary leaves them out."""
    from espnet_llm_plugin.speech_llm.decoder import SpeechLLMDecoder

    rows = decoder(native, native=True).units.rows
    made = SpeechLLMDecoder(rows - 5, DIM, llm=native, tuning="frozen").eval()
    row, _ = made.score(torch.tensor([made.prompt.sos]), made.init_state(speech()), speech())
    assert row.shape == (rows - 5,)


def test_batches_of_utterances(llm):
    """start and step for a batch equal ESPnet's scoring one by one; rows share their utterance."""
    made = decoder(llm, prompt=PROMPT).eval()
    hs, lengths = torch.stack([speech(7), speech(7, 1)]), torch.tensor([7, 5])
    state = made.start(hs, lengths)
    sos = torch.full((2,), made.prompt.sos)
    first, state = made.step(sos, state, torch.arange(2))
    second, state = made.step(torch.tensor([5, 6, 7]), state, torch.tensor([1, 0, 1]))
    for i, x in enumerate((speech(7), speech(7, 1)[:5])):
        row, _ = made.score(sos[:1], made.init_state(x), x)
        torch.testing.assert_close(first[i].log_softmax(-1), row, atol=1e-5, rtol=1e-5)
    for i, (token, u) in enumerate([(5, 1), (6, 0), (7, 1)]):
        x = hs[u, : lengths[u]]
        row, _ = made.score(torch.tensor([made.prompt.sos, token]), made.init_state(x), x)
        torch.testing.assert_close(second[i].log_softmax(-1), row, atol=1e-5, rtol=1e-5)


def test_without_audio_it_is_a_language_model(llm):
    made = decoder(llm, prompt=PROMPT).eval()
    state = made.start_without_audio(2, torch.device("cpu"))
    sos = torch.full((2,), made.prompt.sos)
    logits, _ = made.step(sos, state, torch.arange(2))
    ids = [*made.prompt.before, *made.prompt.after, made.prompt.sos]
    expected = load_causal_lm(llm)(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits[0, 1:], expected[1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(logits[0], logits[1])


def test_states_that_were_lost_or_come_from_several_searches(llm):
    made = decoder(llm).eval()
    x, sos = speech(), made.prompt.sos
    ys = torch.tensor([[sos, 5, 4], [sos, 6, 3]])
    xs = x[None].expand(2, -1, -1)
    expected, _ = made.batch_score(ys, [None, None], xs)
    _, (state,) = made.batch_score(ys[:1, :1], [None], xs[:1])
    _, (other,) = made.batch_score(ys[1:, :2], [None], xs[:1])
    mixed, new = made.batch_score(ys, [state, other], xs)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    assert [row.length for row in new] == [3, 3]


def test_text_ends_with_the_context(llm):
    """After 64 tokens in all only the end can follow."""
    made = decoder(llm, prompt=PROMPT).eval()
    x = speech(50)
    state, y = made.init_state(x), [made.prompt.sos]
    for position in range(64 - 50 - made.prompt.length + 1):
        row, state = made.score(torch.tensor(y), state, x)
        assert (row[3] > -1e8) == (position < 64 - 50 - made.prompt.length)
        y.append(3)
    assert row.argmax() == made.units.eos
    with pytest.raises(UtteranceError, match="60 embeddings, the prompt 8 tokens: the LLM sees 64"):
        made.init_state(speech(60))
    with pytest.raises(UtteranceError, match="it is empty"):
        made.init_state(speech(0))


def test_copies_decode_like_the_original(llm):
    """ESPnet's quantisation copies models."""
    made = decoder(llm).eval()
    x, y = speech(), torch.tensor([made.prompt.sos])
    expected, _ = made.score(y, made.init_state(x), x)
    other = copy.deepcopy(made)
    assert torch.equal(other.score(y, other.init_state(x), x)[0], expected)


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"promt": "none"}, "decoder_conf of 'speech_llm': unknown option 'promt'; valid.*prompt"),
        ({"adapter": "none"}, "unknown adapter 'none'"),
        ({"adapter_conf": {"stak": 2}}, "unknown option 'stak'"),
        ({"tuning": "some"}, "some"),
        ({"interface": "none"}, "none"),
        ({"interface_conf": {"maks": 1}}, "maks"),
        ({"prompt": "tall"}, "unknown prompt"),
        ({"llm": "no/such/llm"}, "does not exist"),
        ({"llm": None}, "needs llm"),
    ],
)
def test_bad_configurations(llm, conf, message):
    from espnet_llm_plugin.speech_llm.decoder import SpeechLLMDecoder

    conf = {"llm": llm, "tuning": "frozen", **conf}
    with pytest.raises(UserError, match=message):
        SpeechLLMDecoder(len(TOKENS), DIM, **conf)
