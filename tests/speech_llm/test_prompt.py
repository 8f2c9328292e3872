"""Prompts around the audio, and text masking."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.masking import mask_text
from espnet_llm_plugin.speech_llm.prompt import PromptRecord, make_prompt
from espnet_llm_plugin.speech_llm.units import label_units
from tests.speech_llm.tiny_llm import CHAT_TEMPLATE, TOKENS, save_adapted, save_native


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level"])
def units(request, tmp_path_factory):
    llm = save_native(
        tmp_path_factory.mktemp(request.param), request.param, chat_template=CHAT_TEMPLATE
    )
    return label_units(llm, len(native_token_list(llm)))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return label_units(save_adapted(tmp_path_factory.mktemp("llm") / "llm"), len(TOKENS))


def text_of(units, prompt):
    return [
        " ".join(units.tokenizer.decode(ids, clean_up_tokenization_spaces=False).split())
        for ids in (prompt.before, prompt.after)
    ]


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("none", "", ""),
        ("short", "", "transcribe speech to text"),
        ("long", "USER:", "Transcribe speech to text. ASSISTANT:"),
        ({"before": "</s> hear"}, "</s> hear", ""),
        ({"after": "say"}, "", "say"),
    ],
)
def test_templates(units, name, before, after):
    prompt = make_prompt(name, units)
    assert text_of(units, prompt) == [before, after]
    assert prompt.sos == units.sos
    assert prompt.length == len(prompt.before) + len(prompt.after) + 1
    if name != "none" and "</s>" in before:  # a special token, not its letters
        assert prompt.before[0] == units.eos


def test_words_have_the_tokens_of_running_text(units):
    """No second space where the tokenizer adds one itself."""
    after = make_prompt({"after": " the cat"}, units).after
    assert list(after) == units.tokenizer("a the cat", add_special_tokens=False)["input_ids"][-2:]


def test_the_day_of_a_chat_template_never_changes(tmp_path):
    """Or the next day's run could not go on."""
    template = "Today: {{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE
    llm = save_native(tmp_path / "llm", "byte_level", chat_template=template)
    units = label_units(llm, len(native_token_list(llm)))
    before = make_prompt("chat", units).before
    assert "26Jul2024" in units.tokenizer.decode(before).replace(" ", "")


def test_chat_format_answers_without_bos(units):
    """The transcript follows the last token of the template."""
    prompt = make_prompt("chat", units)
    tokenizer = units.tokenizer
    everything = tokenizer.decode([*prompt.before, *prompt.after, prompt.sos])
    assert everything.replace(" ", "") == ("<s><|user|>Transcribespeechtotext.</s><|assistant|>!")
    assert prompt.before[0] == units.sos and prompt.sos != units.sos
    same = make_prompt({"before": "a", "after": " b c", "bos": False}, units)
    assert [*same.after, same.sos] == units.encode(" b c")


def test_bad_prompts(units, adapted, tmp_path):
    with pytest.raises(UserError, match="unknown prompt 'tall'; expected none, short, long, chat"):
        make_prompt("tall", units)
    for bad in ({"befor": ""}, {"before": 3}, {"bos": "no"}):
        with pytest.raises(UserError, match="expected the keys before and after"):
            make_prompt(bad, units)
    with pytest.raises(UserError, match="`bos: false` needs a text `after`"):
        make_prompt({"before": "x", "bos": False}, units)
    with pytest.raises(UserError, match="'before', 'USER: ', has characters or words"):
        make_prompt("long", adapted)
    with pytest.raises(UserError, match="the prompt has .* tokens, LLM .* sees 8: nothing is left"):
        make_prompt("long", units, context=8)
    with pytest.raises(UserError, match="needs an LLM with a chat template"):
        make_prompt("chat", adapted)
    without = save_native(tmp_path / "plain")
    with pytest.raises(UserError, match="needs an LLM with a chat template"):
        make_prompt("chat", label_units(without, len(native_token_list(without))))
    silent = save_native(tmp_path / "silent", chat_template="nothing")
    with pytest.raises(UserError, match="writes the user's turn 0 times"):
        make_prompt("chat", label_units(silent, len(native_token_list(silent))))


def test_adapted_prompt(adapted):
    prompt = make_prompt({"before": "bad", "after": " cab"}, adapted, context=64)
    assert (prompt.before, prompt.after, prompt.sos) == ((4, 3, 6), (2, 5, 3, 4), 11)


def test_record_of_the_prompt(adapted):
    record = PromptRecord(make_prompt({"before": "bad"}, adapted))
    state = record.state_dict()
    average = {key: (value + value + value) / 3 for key, value in state.items()}
    PromptRecord(make_prompt({"before": "bad"}, adapted)).load_state_dict(average)
    half = {key: value.half() for key, value in state.items()}
    PromptRecord(make_prompt({"before": "bad"}, adapted)).load_state_dict(half)
    other = PromptRecord(make_prompt({"after": "bad"}, adapted))
    with pytest.raises(UserError, match="another prompt"):
        other.load_state_dict(state)


def test_masking_hides_a_fraction_of_the_text():
    text = torch.randint(3, 9, (50, 41))
    text[:, 0] = 11
    lengths = torch.arange(50) % 41 + 1
    masked = mask_text(text, lengths, 0.25, 1)
    inside = torch.arange(41) < lengths[:, None]
    changed = masked != text
    assert (masked[changed] == 1).all()
    assert not changed[~inside].any() and not changed[:, 0].any()
    share = changed.sum() / inside[:, 1:].sum()
    assert 0.2 < share < 0.3
    assert torch.equal(mask_text(text, lengths, 0.0, 1), text)
