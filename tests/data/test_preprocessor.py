"""The preprocessor that carries the language, and the codes as arrays."""

import numpy as np
import pytest
import torch
from espnet2.train.collate_fn import CommonCollateFn
from espnet2.train.preprocessor import CommonPreprocessor

from espnet_llm_plugin.data.language_codes import decode_languages, encode_language
from espnet_llm_plugin.data.preprocessor import MultilingualPreprocessor
from espnet_llm_plugin.errors import UserError

OPTIONS = {"train": True, "token_type": "char", "token_list": ["<unk>", "a", "b"]}


def item(**more):
    return {"speech": np.zeros(8, dtype=np.float32), "text": "ab a", **more}


def test_codes_survive_batching():
    codes = ["en", None, "pt-BR", "", "zh_Hant", "हि"]
    collate = CommonCollateFn(float_pad_value=0.0, int_pad_value=-1)
    _, batch = collate([(str(i), {"lang": encode_language(c)}) for i, c in enumerate(codes)])
    assert decode_languages(batch["lang"], batch["lang_lengths"]) == [c or None for c in codes]
    # moved and cast as ESPnet's to_device does
    assert decode_languages(batch["lang"].to(torch.int32), batch["lang_lengths"])[0] == "en"
    nothing = collate([("a", {"lang": encode_language("")}), ("b", {"lang": encode_language("")})])
    assert decode_languages(nothing[1]["lang"], nothing[1]["lang_lengths"]) == [None, None]


def test_all_else_is_as_espnets():
    ours = MultilingualPreprocessor(**OPTIONS)
    theirs = CommonPreprocessor(**OPTIONS)
    expected = theirs("utt", item())
    for data in (item(), item(lang="en"), item(lang="")):
        found = ours("utt", data)
        assert ("lang" in found) == ("lang" in data)
        assert set(found) - {"lang"} == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    assert found["lang"].shape == (0,) and found["lang"].dtype == np.int64


def test_numbers_are_no_languages():
    with pytest.raises(UserError, match="utterance utt7: `lang` is no text; .*utt2lang,lang,text"):
        MultilingualPreprocessor(**OPTIONS)("utt7", item(lang=np.array([3])))
