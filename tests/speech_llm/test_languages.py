"""Numbers of languages, and the parameters under their codes."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.languages import LanguageRows, Languages, train_only
from tests.speech_llm.tiny_languages import lang

CODES = ["en", "de", "to"]


def test_numbers_of_a_batch():
    languages = Languages(CODES)
    found = languages.of_batch(lang("to", None, "en", "unk", ""))
    assert found.tolist() == [2, -1, 0, 3, -1]
    assert [languages.code_of(n) for n in found.tolist()] == ["to", "unk", "en", "unk", "unk"]


def test_unknown_codes_are_counted_beside_the_known_ones():
    message = r"'fr' \(2 utterances, e.g. utt1\), 'it' \(1 utterance, e.g. utt3\); .* en, de, to"
    with pytest.raises(UserError, match=message):
        Languages(CODES).of_batch(lang("en", "fr", "unk", "it", "fr", None))
    with pytest.raises(UserError, match=r"'fr' \(1 utterance\); it knows"):
        Languages(CODES).numbers(["fr"])


def test_unknown_codes_can_be_unknown_languages(caplog):
    languages = Languages(CODES, "unk")
    for _ in range(3):
        assert languages.of_batch(lang("fr", "de", "it")).tolist() == [3, 1, 3]
    assert caplog.text.count("'fr'") == caplog.text.count("'it'") == 1


def test_no_language_is_reported_once(caplog):
    languages = Languages(CODES)
    for _ in range(3):
        languages.of_batch(lang("en", None))
    assert caplog.text.count("utt1 has no language") == 1


def test_data_without_languages():
    with pytest.raises(UserError, match="utt2lang,lang,text.*allow_variable_data_keys"):
        Languages(CODES).of_batch({"speech": torch.zeros(1)})


@pytest.mark.parametrize(
    "languages, message",
    [
        (None, "list of codes"),
        ([], "list of codes"),
        ("en", "list of codes"),
        (["en", "unk"], "'unk'"),
        (["en", False], "False.*needs quotation marks"),  # `no` of YAML
        (["en", "a.b"], "'a.b'"),
        (["en", "en"], "twice"),
    ],
)
def test_impossible_languages(languages, message):
    with pytest.raises(UserError, match=message):
        Languages(languages)


def test_policy():
    with pytest.raises(UserError, match="unknown_language 'ignore'; expected error or unk"):
        Languages(CODES, "ignore")


def test_names():
    assert Languages(["pl"]).name_of("pl") == "polish"
    assert Languages({"pl": "Polski"}).name_of("pl") == "Polski"
    with pytest.raises(
        UserError, match="'xx' has no known name.*languages: {xx: ...}|init: random"
    ):
        Languages(["xx"]).name_of("xx")


def rows(codes, seed=0):
    torch.manual_seed(seed)
    return LanguageRows({code: torch.randn(2, 3) for code in codes})


def test_order_of_the_languages_means_nothing_to_a_checkpoint():
    first, second = rows(["en", "de", "to"]), rows(["to", "en", "de"], seed=1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.rows(), first.rows()[[2, 0, 1]])
    assert set(first.state_dict()) == {"lang_en", "lang_de", "lang_to"}


def test_a_language_left_out_is_an_error_even_if_not_strict():
    with pytest.raises(UserError, match="the checkpoint has table for to, which"):
        torch.nn.ModuleDict({"table": rows(["en", "de"])}).load_state_dict(
            torch.nn.ModuleDict({"table": rows(["en", "de", "to"])}).state_dict(), strict=False
        )


def test_train_only():
    model = torch.nn.ModuleDict({"table": rows(CODES), "other": torch.nn.Linear(2, 2)})
    train_only(model, ["de"], model["table"], None)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["table.lang_de"]
    for codes in (["fr"], [], "de"):
        with pytest.raises(UserError, match="train_languages.*de, en, to"):
            train_only(model, codes, model["table"])
    with pytest.raises(UserError, match="per_language is needed"):
        train_only(model, ["de"])
