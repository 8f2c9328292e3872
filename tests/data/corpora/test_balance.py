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
