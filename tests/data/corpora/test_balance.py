"""Text with as many characters of every language."""

import pytest

from espnet_llm_plugin.data.corpora.balance import write_balanced_text
from espnet_llm_plugin.errors import UserError
from tests.data.conftest import table

TEXT = {f"en_{i:03d}": f"sentence number {i:03d}" for i in range(200)}
TEXT |= {f"pl_{i:03d}": f"zdanie {i:02d}" for i in range(30)}
LANGUAGES = {key: key[:2] for key in TEXT}


def test_every_language_gets_as_much_as_the_smallest(tmp_path):
    counts = write_balanced_text(TEXT, LANGUAGES, tmp_path / "text")
    assert counts["pl"] == 30 * len("zdanie 00")
    assert counts["pl"] <= counts["en"] < counts["pl"] + len("sentence number 000")
    written = table(tmp_path / "text")
    assert written.items() <= TEXT.items()
    assert {key for key in written if key[:2] == "pl"} == {key for key in TEXT if key[:2] == "pl"}
    # chosen at random, not the first ones
    assert sorted(key for key in written if key[:2] == "en") != sorted(TEXT)[: len(written) - 30]


def test_the_seed_decides(tmp_path):
    contents = []
    for seed in (0, 0, 1):
        write_balanced_text(TEXT, LANGUAGES, tmp_path / "text", seed=seed)
        contents.append((tmp_path / "text").read_text())
    assert contents[0] == contents[1] != contents[2]


def test_errors(tmp_path):
    with pytest.raises(UserError, match="1 utterance.* have no language, e.g. xx"):
        write_balanced_text({**TEXT, "xx": "a"}, LANGUAGES, tmp_path / "text")
    with pytest.raises(UserError, match="a language without text among en, xx"):
        write_balanced_text({"a": "b", "c": ""}, {"a": "en", "c": "xx"}, tmp_path / "text")
    with pytest.raises(UserError, match="among none"):
        write_balanced_text({}, {}, tmp_path / "text")


def test_every_character_can_be_asked_for(tmp_path):
    rare = {f"en_q{i}": f"{char} rare" for i, char in enumerate("äöüßéèñ")}
    text, languages = {**TEXT, **rare}, {**LANGUAGES, **dict.fromkeys(rare, "en")}
    plain = write_balanced_text(text, languages, tmp_path / "plain")
    counts = write_balanced_text(text, languages, tmp_path / "all", cover_characters=True)
    assert set("".join(table(tmp_path / "all").values())) >= set("äöüßéèñ")
    assert not set("".join(table(tmp_path / "plain").values())) >= set("äöüßéèñ")
    assert table(tmp_path / "plain").items() <= table(tmp_path / "all").items()
    assert counts["pl"] == plain["pl"] and counts["en"] > plain["en"]
    # Each sentence more brings a character that was missing.
    added = set(table(tmp_path / "all")) - set(table(tmp_path / "plain"))
    english = "".join(t for k, t in table(tmp_path / "plain").items() if k[:2] == "en")
    assert 7 <= len(added) <= len(set("".join(text.values())) - set(english))
