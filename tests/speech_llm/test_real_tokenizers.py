"""Native units and prompts with the tokenizers of real LLMs."""

import shutil

import pytest

from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.prompt import make_prompt
from espnet_llm_plugin.speech_llm.units import label_units
from tests.contracts.sentences import SENTENCES
from tests.llm.tiny import tiny_model


@pytest.fixture(scope="module")
def llama2(shared_data, tmp_path_factory):
    """Llama 2's tokenizer and a small model with its 32,000 rows."""
    directory = tmp_path_factory.mktemp("llama2")
    for file in (shared_data / "llm" / "llama2_tokenizer").iterdir():
        shutil.copyfile(file, directory / file.name)
    tiny_model("llama", vocab_size=32000, max_position_embeddings=4096).save_pretrained(directory)
    return str(directory)


def test_llama2(llama2, tmp_path):
    from espnet2.train.preprocessor import CommonPreprocessor

    tokens = native_token_list(llama2)
    assert len(tokens) == 32000 and len(set(tokens)) == 32000
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    read = [line.rstrip() for line in (tmp_path / "tokens.txt").open(encoding="utf-8")]
    assert read == tokens
    units = label_units(llama2, 32000)
    units.check_token_list(read)
    assert (tokens[units.sos], tokens[units.eos], tokens[units.unk]) == ("<s>", "</s>", "<unk>")
    process = CommonPreprocessor(
        train=False, token_type="hugging_face", token_list=tokens, bpemodel=llama2
    )
    for sentence in (s for sentences in SENTENCES.values() for s in sentences):
        ids = process("utt", {"text": sentence})["text"].tolist()
        assert ids == units.encode(sentence)
        assert units.decode(ids) == sentence


def test_prompts_of_llama2(llama2):
    """As its tokenizer writes them in running text."""
    units = label_units(llama2, 32000)
    prompt = make_prompt("long", units, context=4096)
    text = units.tokenizer.convert_ids_to_tokens
    assert text(list(prompt.before)) == ["▁US", "ER", ":", "▁"]
    words = units.tokenizer.convert_tokens_to_string(text(list(prompt.after)))
    assert words == "Transcribe speech to text. ASSISTANT:"
    assert units.unk not in prompt.before + prompt.after and prompt.sos == 1


def test_stories260k(shared_data):
    llm = str(shared_data / "llm" / "stories260K")
    tokens = native_token_list(llm)
    units = label_units(llm, len(tokens))
    units.check_token_list(tokens)
    sentence = "once upon a time there was a little girl"
    assert units.decode(units.encode(sentence)) == sentence
    assert make_prompt("short", units).after
