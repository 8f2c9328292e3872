"""The three interfaces under their contract, for families of LLMs that differ in what matters."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.interface import build_interface
from espnet_llm_plugin.speech_llm.state import SpeechState
from tests.contracts.interface_contract import InterfaceContract
from tests.speech_llm.held_llm import held, randomize

# rotary; with biases; learned positions; these, two widths and norms after the layers
FAMILIES = ["llama", "qwen2", "gpt2", "opt"]


def interface_fixture(name, families=FAMILIES, **conf):
    @pytest.fixture(params=families)
    def interface(self, request):
        return randomize(build_interface(name, held(request.param), conf))

    return interface


class TestPrefix(InterfaceContract):
    interface = interface_fixture("prefix")

    def test_keys_are_shared(self, interface, batch):
        assert isinstance(interface.start(*batch[:2]), SpeechState)


class TestBidirectionalPrefix(InterfaceContract):
    soft_is_prompt = False
    interface = interface_fixture("prefix", ["llama", "opt"], mask="bidirectional")


class TestLeftPaddedPrefix(InterfaceContract):
    interface = interface_fixture("prefix", ["qwen2", "gpt2"], padding="left")


class TestMerged(InterfaceContract):
    interface = interface_fixture("merged")


class TestCrossAttention(InterfaceContract):
    interface = interface_fixture("cross_attention")


class TestSparseCrossAttention(InterfaceContract):
    @pytest.fixture
    def interface(self):
        llm = held(num_hidden_layers=3)
        return randomize(build_interface("cross_attention", llm, {"every": 2, "heads": 2}))


class TestBloomPrefix(InterfaceContract):
    """ALiBi: keys carry their positions."""

    sees_all_audio = False

    @pytest.fixture
    def interface(self):
        llm = held("bloom", hidden_dropout=0.0)
        llm.context = 64  # of its training; it would take any number
        return build_interface("prefix", llm).eval()

    def test_keys_are_shared(self, interface, batch, caplog):
        assert isinstance(interface.start(*batch[:2]), SpeechState)
        assert not caplog.messages

    def test_dropout_of_training_is_the_models_own(self, batch):
        interface = build_interface("prefix", held("bloom", hidden_dropout=0.5)).eval()
        interface.start(*batch[:2])
        interface.llm.model().train()
        state = interface.start(*batch[:2])
        assert not isinstance(state, SpeechState)
        logits, _ = interface.step(batch[2][:, 0], state)
        assert torch.isfinite(logits).all()


class TestRecomputedPrefix(InterfaceContract):
    """Attention windows: columns are not all that a hypothesis must know."""

    sees_all_audio = False

    @pytest.fixture(params=["mistral", "gemma2"])
    def interface(self, request):
        return build_interface("prefix", held(request.param)).eval()

    def test_keys_are_not_shared(self, interface, batch, caplog):
        assert not isinstance(interface.start(*batch[:2]), SpeechState)
        assert "attention windows" in caplog.text


@pytest.mark.parametrize("conf", [{}, {"mask": "bidirectional"}, {"padding": "left"}])
def test_eager_attention_is_sdpa(conf):
    llm = held()
    interface = build_interface("prefix", llm, conf).eval()
    batch = (torch.randn(2, 5, 16), torch.tensor([5, 2]), torch.ones(2, 3, dtype=torch.long))
    lengths = torch.tensor([3, 3])
    expected, _ = interface(*batch, lengths)
    llm.config._attn_implementation = "eager"
    torch.testing.assert_close(interface(*batch, lengths)[0], expected, atol=1e-5, rtol=1e-5)
    assert llm.config._attn_implementation == "eager"


def test_masks_that_an_attention_function_does_not_take():
    llm = held()
    llm.config._attn_implementation = "flash_attention_2"
    batch = (torch.randn(1, 2, 16), torch.tensor([2]), torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(UserError, match="'flash_attention_2' knows no masks"):
        build_interface("prefix", llm, {"padding": "left"})(*batch, torch.tensor([3]))


def test_long_searches_clear_away_what_nobody_sees():
    """More tokens than are allocated at once: the columns in use stay those of the live rows."""
    llm = held(max_position_embeddings=400)
    interface = build_interface("prefix", llm).eval()
    audio, lengths = torch.randn(2, 6, 16), torch.tensor([6, 4])
    state = interface.start(audio, lengths)
    _, state = interface.step(torch.tensor([1, 1]), state)
    best = [[1], [1]]
    columns = []
    for step in range(120):
        parents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]) * (1 if step == 0 else 4)
        tokens = torch.tensor([2 + step % 30, 3, 4, 5, 2 + step % 31, 6, 7, 8])
        logits, state = interface.step(tokens, state, parents)
        for u in range(2):
            best[u].append(int(tokens[4 * u]))
        columns.append(state._seen.size(1))
    assert max(columns) < 2 * 120 + 6  # and not 4 * 120
    # of 2 utterances, not of 8 hypotheses
    assert all(key.size(0) == value.size(0) == 2 for key, value in state._keys.layers)
    _, rest = interface.step(torch.tensor([2, 3, 4]), state, torch.tensor([5, 7, 7]))
    assert all(key.size(0) == 1 for key, _ in rest._keys.layers)
    assert rest.utterance.tolist() == [1, 1, 1]
    for u in range(2):
        with torch.no_grad():
            text = torch.tensor(best[u : u + 1])
            one, _ = interface(audio[u : u + 1], lengths[u : u + 1], text, torch.tensor([121]))
        torch.testing.assert_close(logits[4 * u], one[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["prefix", "merged"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_context_is_that_of_each_row(name, family):
    """Short audio in a batch with long audio may have a text that the long one has no room for."""
    llm = held(family, max_position_embeddings=20)
    interface = randomize(build_interface(name, llm))
    audio, lengths = torch.randn(2, 16, llm.hidden_size), torch.tensor([16, 3])
    state = interface.start(audio, lengths)
    _, state = interface.step(torch.tensor([1, 1]), state)
    rows = torch.tensor([1])
    for token in range(2, 14):
        logits, state = interface.step(torch.tensor([token]), state, rows)
        rows = torch.tensor([0])
    text = torch.arange(1, 14)[None]
    with torch.no_grad():
        one, _ = interface(audio[1:, :3], lengths[1:], text, torch.tensor([13]))
    torch.testing.assert_close(logits[0], one[0, -1], atol=1e-4, rtol=1e-4)
    for token in range(4):
        _, state = interface.step(torch.tensor([token + 2]), state)
    with pytest.raises(UserError, match="take 21 positions of the LLM, which sees 20"):
        interface.step(torch.tensor([2]), state)


def test_unknown_names():
    with pytest.raises(UserError, match="unknown interface 'infix'; expected one of prefix, merge"):
        build_interface("infix", held())
    with pytest.raises(UserError, match="interface_conf of 'prefix': unknown option 'maks'"):
        build_interface("prefix", held(), {"maks": "causal"})
    with pytest.raises(UserError, match="mask 'left'; expected causal or bidirectional"):
        build_interface("prefix", held(), {"mask": "left"})
    with pytest.raises(UserError, match="every 3; expected 1 to 2"):
        build_interface("cross_attention", held(), {"every": 3})
    with pytest.raises(UserError, match="3 heads do not divide the LLM's width 16"):
        build_interface("cross_attention", held(), {"heads": 3})


@pytest.mark.parametrize("name", ["merged", "cross_attention"])
@pytest.mark.parametrize(
    "family, reason", [("gptj", "model type gptj"), ("mistral", "attention windows of 3 tokens")]
)
def test_llms_whose_layers_are_not_known(name, family, reason):
    with pytest.raises(UserError, match=f"{name}: the LLM has .*{reason}.*use `interface: prefix`"):
        build_interface(name, held(family))
