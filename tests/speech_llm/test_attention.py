"""What each interface computes, against slow obvious references."""

import pytest
import torch
from torch.nn.functional import pad

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.tuning import TunedLLM
from espnet_llm_plugin.speech_llm.interface import build_interface
from tests.llm.tiny import save_llm_dir
from tests.speech_llm.held_llm import held, randomize

BEFORE, AFTER = (3, 4), (5,)
LENGTHS, TEXT_LENGTHS = torch.tensor([5, 2]), torch.tensor([4, 3])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def batch():
    return torch.randn(2, 5, 16), LENGTHS, torch.randint(1, 37, (2, 4)), TEXT_LENGTHS


def utterances(llm, batch):
    """Embeddings of each utterance put together by hand: (audio columns, text columns, all)."""
    audio, _, text, _ = batch
    for i, (p, u) in enumerate(zip(LENGTHS.tolist(), TEXT_LENGTHS.tolist())):
        parts = [
            llm.embed(torch.tensor(BEFORE)),
            audio[i, :p],
            llm.embed(torch.tensor(AFTER)),
            llm.embed(text[i, :u]),
        ]
        start = len(BEFORE) + p + len(AFTER)
        columns = slice(len(BEFORE), len(BEFORE) + p), slice(start, start + u)
        yield i, *columns, torch.cat(parts)[None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_causal_prefix_is_the_llm_on_the_sequence(family, padding, batch):
    llm = held(family)
    batch = (torch.randn(2, 5, llm.hidden_size), *batch[1:])
    interface = build_interface("prefix", llm, {"padding": padding}).eval()
    logits, hidden = interface(*batch, before=BEFORE, after=AFTER)
    for i, audio, text, embeddings in utterances(llm, batch):
        close(logits[i, : TEXT_LENGTHS[i]], llm.model()(inputs_embeds=embeddings).logits[0, text])
        outputs = llm.model().base_model(inputs_embeds=embeddings).last_hidden_state[0]
        close(hidden["audio"][i, : LENGTHS[i]], outputs[audio])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_audio_of_a_bidirectional_prefix_sees_all_audio(family, batch):
    llm = held(family)
    interface = build_interface("prefix", llm, {"mask": "bidirectional"}).eval()
    logits, hidden = interface(*batch, before=BEFORE, after=AFTER)
    for i, audio, text, embeddings in utterances(llm, batch):
        seen = torch.ones(embeddings.size(1), embeddings.size(1), dtype=torch.bool).tril()
        seen[audio, audio] = True
        options = dict(inputs_embeds=embeddings, attention_mask=seen[None, None])
        close(logits[i, : TEXT_LENGTHS[i]], llm.model()(**options).logits[0, text])
        outputs = llm.model().base_model(**options).last_hidden_state[0]
        close(hidden["audio"][i, : LENGTHS[i]], outputs[audio])


def rotate(x, positions, theta):
    """Rotary embedding of x (H, L, D), as complex numbers."""
    half = x.size(-1) // 2
    angles = positions[:, None] / theta ** (torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def merged_llama(model, tokens, token_positions, audio, audio_positions):
    """A LLaMA over tokens (Q, D) of which those after the audio see it, layer by layer."""
    theta = model.config.rope_parameters["rope_theta"]
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    x, layers = tokens, model.model.layers

    def project(linear, y, number):
        return linear(y).unflatten(1, (number, -1)).transpose(0, 1)

    every = torch.cat([audio_positions, token_positions])
    seen = every <= token_positions[:, None]
    seen[:, len(audio) :] = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for layer in layers:
        attention = layer.self_attn
        y = layer.input_layernorm(x)
        read = torch.cat([layer.input_layernorm(audio), y])  # the audio is never updated
        query = rotate(project(attention.q_proj, y, heads), token_positions, theta)
        key = rotate(project(attention.k_proj, read, kv_heads), every, theta)
        value = project(attention.v_proj, read, kv_heads)
        key, value = (z.repeat_interleave(heads // kv_heads, dim=0) for z in (key, value))
        scores = query @ key.transpose(1, 2) / query.size(-1) ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + attention.o_proj((weights @ value).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def test_merged_audio_is_read_and_not_updated(batch):
    llm = held("llama")
    logits, hidden = build_interface("merged", llm)(*batch, before=BEFORE, after=AFTER)
    assert hidden == {}
    for i, audio, _, embeddings in utterances(llm, batch):
        every = torch.arange(embeddings.size(1))
        is_text = torch.ones(len(every), dtype=torch.bool)
        is_text[audio] = False
        expected = merged_llama(
            llm.model(),
            embeddings[0, is_text],
            every[is_text],
            embeddings[0, audio],
            every[audio],
        )
        close(logits[i, : TEXT_LENGTHS[i]], expected[len(BEFORE + AFTER) :])


def test_cross_attention_begins_as_the_llm_and_learns_its_gates_first(batch):
    llm = held("llama")
    interface = build_interface("cross_attention", llm)
    audio, lengths, text, text_lengths = batch
    logits, hidden = interface(*batch, before=BEFORE, after=AFTER)
    prompt = torch.tensor([BEFORE + AFTER]).expand(2, -1)
    plain = llm.model()(torch.cat([prompt, text], dim=1)).logits[:, 3:]
    close(logits, plain)
    assert hidden == {} and interface.gates().tolist() == [0, 0]
    logits.square().sum().backward()
    for layer in interface.layers:
        assert layer.gate.grad.abs() > 0
        assert layer.query.weight.grad.abs().max() == 0
    with torch.no_grad():
        interface.layers[0].gate.fill_(0.5)
    assert interface.gates().tolist() == pytest.approx([0.4621, 0], abs=1e-4)
    interface.zero_grad()
    interface(*batch)[0].square().sum().backward()
    for parameter in (*interface.layers[0].key_value.parameters(), interface.layers[0].out.weight):
        assert parameter.grad.abs().max() > 0
    # and the LLM itself still is one
    close(llm.model()(torch.cat([prompt, text], dim=1)).logits[:, 3:], plain)


def test_cross_attention_that_is_trained_after_decoding(batch):
    interface = build_interface("cross_attention", held("llama")).eval()
    interface.start(*batch[:2])
    randomize(interface)
    state = interface.start(*batch[:2])
    close(interface.step(batch[2][:, 0], state)[0], interface(*batch)[0][:, 0])


@pytest.mark.parametrize("name", ["prefix", "merged"])
def test_steps_of_a_llama_need_no_modules_and_follow_its_weights(name, batch, monkeypatch):
    llm = held("llama")
    interface = build_interface(name, llm).eval()
    interface.start(*batch[:2])
    for parameter in llm.model().parameters():
        parameter.mul_(1.1)
    expected, _ = interface(*batch)
    state = interface.start(*batch[:2])
    monkeypatch.delattr(type(llm.model().base_model), "forward")
    close(interface.step(batch[2][:, 0], state)[0], expected[:, 0])


def test_cross_attention_before_every_second_layer(batch):
    llm = held("llama", num_hidden_layers=5)
    interface = randomize(build_interface("cross_attention", llm, {"every": 2}))
    assert len(interface.layers) == 3
    expected, _ = interface(*batch)
    for layer in interface.layers:
        with torch.no_grad():
            gate, layer.gate.data = layer.gate.data, torch.zeros(())
            assert (interface(*batch)[0] - expected).abs().max() > 1e-3
            layer.gate.data = gate


def test_interfaces_of_one_llm_do_not_disturb_each_other(batch):
    llm = held("llama")
    names = ["prefix", "merged", "cross_attention", "merged", "prefix", "cross_attention"]

    def build(name, llm):
        torch.manual_seed(1)
        return randomize(build_interface(name, llm))

    expected = {name: build(name, held("llama"))(*batch)[0] for name in set(names)}
    interfaces = {name: build(name, llm) for name in set(names)}
    for name in names:
        logits, _ = interfaces[name](*batch)
        state = interfaces[name].start(*batch[:2])
        close(interfaces[name].step(batch[2][:, 0], state)[0], logits[:, 0])
        close(logits, expected[name])


def test_dropout_of_cross_attention(batch):
    interface = randomize(build_interface("cross_attention", held(), {"dropout": 0.5}))
    with torch.no_grad():
        close(interface(*batch)[0], interface(*batch)[0])
        interface.train()
        assert (interface(*batch)[0] - interface(*batch)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_mass_is_that_of_the_weights(family, mask, batch):
    llm = held(family)
    interface = build_interface("prefix", llm, {"mask": mask}).eval()
    mass = interface.attention_mass(*batch, before=BEFORE, after=AFTER)
    assert mass.shape == (2, 2)
    llm.config._attn_implementation = "eager"
    for i, audio, text, embeddings in utterances(llm, batch):
        seen = torch.ones(embeddings.size(1), embeddings.size(1)).tril()
        if mask == "bidirectional":
            seen[audio, audio] = 1
        outputs = llm.model()(
            inputs_embeds=embeddings,
            attention_mask=(1 - seen[None, None]) * -1e9,
            output_attentions=True,
        )
        for layer, weights in enumerate(outputs.attentions):
            close(mass[i, layer], weights[0][:, text, audio].sum(-1).mean())


def test_attention_mass_of_merged_audio(batch):
    interface = build_interface("merged", held()).eval()
    audio, lengths, text, text_lengths = batch
    mass = interface.attention_mass(*batch, before=BEFORE)
    assert mass.shape == (2, 2) and (mass > 0).all() and (mass < 1).all()
    alone = interface.attention_mass(
        audio[1:, :2], lengths[1:], text[1:, :3], text_lengths[1:], before=BEFORE
    )
    close(mass[1:], alone)
    # the first layer reads what it reads in a prefix
    prefix = build_interface("prefix", interface.llm).eval()
    close(mass[:, 0], prefix.attention_mass(*batch, before=BEFORE)[:, 0])
    assert (mass[:, 1] - prefix.attention_mass(*batch, before=BEFORE)[:, 1]).abs().min() > 1e-4


def test_attention_mass_of_no_audio_and_of_cross_attention(batch):
    audio, lengths, text, text_lengths = batch
    for name in ("prefix", "merged"):
        interface = build_interface(name, held()).eval()
        assert interface.attention_mass(audio, 0 * lengths, text, text_lengths).sum() == 0
    with pytest.raises(UserError, match="gates"):
        build_interface("cross_attention", held()).attention_mass(*batch)


@pytest.mark.parametrize("name", ["prefix", "merged", "cross_attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora(tmp_path, name, checkpointing):
    """A real tuned LLM: LoRA has gradients, and takes part in decoding."""
    directory = save_llm_dir(tmp_path / "llm", "llama")
    llm = TunedLLM(str(directory), tuning="lora", gradient_checkpointing=checkpointing)
    interface = build_interface(name, llm)
    names = {n for n, _ in interface.named_parameters()}
    assert not names or name == "cross_attention"
    randomize(interface), randomize(llm)
    audio, text = torch.randn(2, 4, llm.hidden_size), torch.randint(1, 30, (2, 5))
    lengths, text_lengths = torch.tensor([4, 1]), torch.tensor([5, 5])
    llm.train(), interface.train()
    logits, _ = interface(audio, lengths, text, text_lengths)
    logits.square().mean().backward()
    for parameter in llm.weights.parameters():
        assert parameter.grad.abs().max() > 0
    llm.eval(), interface.eval()
    with torch.no_grad():
        expected, _ = interface(audio, lengths, text, text_lengths)
    state = interface.start(audio, lengths)
    for u in range(5):
        logits, state = interface.step(text[:, u], state)
        close(logits, expected[:, u])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_greedy_steps_are_those_of_generate(family):
    llm = held(family, seed=4)
    model, bos = llm.model(), llm.embed(torch.tensor([[1], [1]]))
    audio, lengths = torch.randn(2, 5, 16), torch.tensor([5, 3])
    # transformers wants the padding on the left
    embeddings = torch.stack([audio[0], pad(audio[1, :3], (0, 0, 2, 0))])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    found = model.generate(
        inputs_embeds=torch.cat([embeddings, bos], dim=1),
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=36,
        pad_token_id=0,
    )
    interface = build_interface("prefix", llm).eval()
    state, tokens = interface.start(audio, lengths), torch.tensor([1, 1])
    ended = torch.zeros(2, dtype=torch.bool)
    for expected in found.T:
        logits, state = interface.step(tokens, state)
        tokens = logits.argmax(-1)
        assert torch.equal(tokens.masked_fill(ended, 0), expected)
        ended |= tokens == 36
