"""Label units: an ASR token list, or the LLM's own tokens."""

import pickle

import numpy as np
import pytest
from tokenizers import AddedToken

from espnet_llm_plugin.bin.make_token_list import main as make_token_list
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.units import AdaptedUnits, NativeUnits, label_units
from tests.llm.tiny import tiny_model, tiny_tokenizer, train_sentencepiece
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native

TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level"])
def native(request, tmp_path_factory):
    return save_native(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


def test_token_list_of_an_llm_and_its_ids(native, tmp_path):
    """The ids are those that ESPnet's preprocessor makes with token_type hugging_face."""
    from espnet2.train.preprocessor import CommonPreprocessor

    out = tmp_path / "tokens"
    make_token_list(["--token_type", "hugging_face", "--llm", native, "--output_dir", str(out)])
    tokens = [line.rstrip() for line in (out / "tokens.txt").open(encoding="utf-8")]
    assert tokens == native_token_list(native) and len(set(tokens)) == len(tokens)
    units = label_units(native, len(tokens))
    assert isinstance(units, NativeUnits)
    units.check_token_list(tokens)
    assert tokens[-5:] == [f"<unused_{i}>" for i in range(len(tokens) - 5, len(tokens))]
    assert units.scored.tolist() == [True] * (len(tokens) - 5) + [False] * 5
    assert (tokens[units.sos], tokens[units.eos]) == ("<s>", "</s>")

    process = CommonPreprocessor(
        train=False, token_type="hugging_face", token_list=tokens, bpemodel=native
    )
    ids = process("utt", {"text": TEXT})["text"]
    assert isinstance(ids, np.ndarray) and ids.tolist() == units.encode(TEXT)
    assert units.decode(ids.tolist()) == TEXT


def test_list_that_espnet_writes(native, tmp_path):
    """hugging_face_export_vocabulary leaves out the rows without token."""
    from espnet2.bin.hugging_face_export_vocabulary import main

    main(["--model_name_or_path", native, "--output", str(tmp_path / "tokens.txt")])
    tokens = [line.rstrip() for line in (tmp_path / "tokens.txt").open(encoding="utf-8")]
    units = label_units(native, len(tokens))
    units.check_token_list(tokens)
    assert units.scored.all() and len(tokens) == units.rows - 5


def test_tokens_that_no_line_can_hold(tmp_path):
    tokenizer = tiny_tokenizer("byte_level")
    for token in ("\n", "two words", "\u3000", "<U+000A>"):
        tokenizer.add_tokens(AddedToken(token, normalized=False))
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokens = native_token_list(tmp_path)
    last = len(tokens) - 1
    expected = ["<U+000A>", "two<U+0020>words", "<U+3000>", f"<U+000A><{last}>"]
    assert tokens[-4:] == expected
    label_units(str(tmp_path), len(tokens)).check_token_list(tokens)


def test_another_token_list_is_refused(native, adapted):
    tokens = native_token_list(native)
    units = label_units(native, len(tokens))
    with pytest.raises(UserError, match="token 7 of the token list is 'other', that of LLM"):
        units.check_token_list([*tokens[:7], "other", *tokens[8:]])
    with pytest.raises(UserError, match="2 tokens; LLM .* needs those up to 2"):
        label_units(native, 2)
    with pytest.raises(UserError, match="make_token_list"):
        label_units(native, len(tokens) + 1)
    with pytest.raises(UserError, match="is over 12 tokens, the token list has 13"):
        label_units(adapted, 13)
    with pytest.raises(UserError, match="another token list"):
        label_units(adapted, 12).check_token_list([*TOKENS[:4], "x", *TOKENS[5:]])
    with pytest.raises(UserError, match="is adapted to an ASR token list"):
        native_token_list(adapted)


def test_adapted_characters(adapted):
    units = label_units(adapted, len(TOKENS))
    assert isinstance(units, AdaptedUnits)
    assert (units.sos, units.eos, units.unk) == (11, 11, 1)
    assert units.scored.tolist() == [False] + [True] * 11
    assert units.encode("bad z") == [4, 3, 6, 2, 1] and units.decode([4, 3, 6, 2, 3]) == "bad a"
    units.check_token_list(TOKENS)


def test_adapted_pieces(tmp_path):
    from tests.llm.tiny import TEXT as SENTENCES

    bpemodel, token_list = train_sentencepiece(tmp_path / "bpe", SENTENCES, 40)
    tokens = token_list.read_text().splitlines()
    llm = save_adapted(tmp_path / "llm", tokens=tokens)
    (tmp_path / "llm" / "bpe.model").write_bytes(bpemodel.read_bytes())
    units = label_units(llm, len(tokens))
    ids = units.encode(TEXT)
    assert units.decode(ids) == TEXT and units.unk not in ids
    assert pickle.loads(pickle.dumps(units)).encode(TEXT) == ids


def test_mask_token(native, adapted, tmp_path):
    assert label_units(adapted, len(TOKENS)).mask_token() == 1
    assert label_units(adapted, len(TOKENS)).mask_token("a") == 3
    units = label_units(native, len(native_token_list(native)))
    assert units.mask_token() == units.unk == 0
    with pytest.raises(UserError, match="text_mask_token 'nothing' is not a token"):
        units.mask_token("nothing")
    none = save_native(tmp_path / "none", special={"unk_token": None})
    units = label_units(none, len(native_token_list(none)))
    assert units.unk is None and units.mask_token() == len(units.tokenizer)
    full = save_native(tmp_path / "full", special={"unk_token": None}, spare_rows=0)
    units = label_units(full, len(native_token_list(full)))
    with pytest.raises(UserError, match="has none, and no spare row; give .* text_mask_token"):
        units.mask_token()
    assert units.mask_token("</s>") == units.eos
    # what stands for silence needs no option
    assert units.silence_token() == units.eos
    assert label_units(native, len(native_token_list(native))).silence_token() == 0


def test_special_tokens_that_are_missing(tmp_path):
    """Without BOS a text begins with what ends it; without both it is an error."""
    no_bos = save_native(tmp_path / "no_bos", special={"bos_token": None})
    units = label_units(no_bos, len(native_token_list(no_bos)))
    assert units.sos == units.eos == 2
    neither = save_native(tmp_path / "neither", special={"bos_token": None, "eos_token": None})
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        label_units(neither, len(native_token_list(neither)))


def test_more_tokens_than_rows(tmp_path):
    tokenizer = tiny_tokenizer("byte_level")
    tiny_model("llama", vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for call in (native_token_list, lambda llm: label_units(llm, 100)):
        with pytest.raises(UserError, match="do not belong together"):
            call(str(tmp_path))


def test_command_line_refuses_what_it_would_ignore(native, tmp_path):
    out = ["--output_dir", str(tmp_path)]
    for options in (
        ["--token_type", "hugging_face", "--text", "x", *out],
        ["--token_type", "hugging_face", *out],
        ["--token_type", "char", "--llm", native, "--text", "x", *out],
        ["--token_type", "bpe", *out],
    ):
        with pytest.raises(UserError, match="is made from --(llm|text) alone"):
            make_token_list(options)
